"""Two runs -> how far they agree, what changed, and how far scores, labels and features have drifted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.features import FeatureRun, features_kind, matrix
from tlbatch.output.run import Run, read_named_runs, read_report, read_table_runs, run_at
from tlbatch.output.snapshot import snapshot
from tlbatch.output.table import read_table
from tlbatch.report.drift import index_of_shares, stability_index
from tlbatch.storage.resolve import resolve

#: Images whose features are looked at: the first files up to so many.
_MOST_VECTORS = 20_000
_COLUMNS = ["uri", "key", "label", "score"]
_MOST_CHANGED = 20


def compare(
    run_a: str, run_b: str, *, most: int = _MOST_CHANGED, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hold two runs against each other.

    Args:
        run_a: a run's folder, or an output, of which the newest published run is taken.
        run_b: the same.
        most: how many of the most changed images are named.
        storage_options: fsspec's options for both.

    Returns:
        `images` in both, `only_a` and `only_b`; `agreement`, the share of those in both with the same label; `moved`, how
        often one label became another; `most_changed`; `psi_scores`, `psi_labels` and, where both runs have features,
        `psi_features` (the mean over all of them); `psi`, the largest of these. Above 0.1 a population stability index tells
        of a small change, above 0.25 of a large one (Siddiqi, "Credit Risk Scorecards", 2006).

    Raises:
        OutputError: there is no run, or one without predictions.
    """
    return compare_tables(_find(run_a, storage_options), _find(run_b, storage_options), most)


def _find(url: str, options: Mapping[str, Any] | None) -> list[Run]:
    """The runs that make up a table, the oldest first."""
    named = run_at(url, options)
    if named is not None:
        output, run = named
        return [*read_named_runs(output, run.on), run]
    location = resolve(url, options)
    found = read_table_runs(location)
    if not found:
        raise OutputError(f"Nothing is published at {location.url}, and it is no run's folder.")
    return found


def compare_tables(table_a: Sequence[Run], table_b: Sequence[Run], most: int = _MOST_CHANGED) -> dict[str, Any]:
    """`compare`, of the runs that make up two tables, each the oldest first."""
    first, second = (read_table(runs, "predictions", _COLUMNS).to_pandas() for runs in (table_a, table_b))
    both = _side_by_side(first, second)
    same = both["label_a"] == both["label_b"]
    indices = {
        "psi_scores": stability_index(first["score"].to_numpy(), second["score"].to_numpy()),
        "psi_labels": index_of_shares(*_shares_of_labels(first["label"], second["label"])),
    }
    vectors = [_vectors(runs) for runs in (table_a, table_b)]
    if vectors[0] is not None and vectors[1] is not None and vectors[0].shape[1] == vectors[1].shape[1]:
        columns = range(vectors[0].shape[1])
        indices["psi_features"] = float(np.mean([stability_index(vectors[0][:, at], vectors[1][:, at]) for at in columns]))
    return {
        "run_a": table_a[-1].location.url,
        "run_b": table_b[-1].location.url,
        "images": len(both),
        "only_a": len(first) - len(both),
        "only_b": len(second) - len(both),
        "agreement": float(same.mean()) if len(both) else 0.0,
        "moved": _moved(both[~same]),
        "most_changed": _most_changed(both, same, most),
        **indices,
        "psi": max(indices.values()),
    }


def _side_by_side(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The images of both runs. A name that stands twice in a run is told apart by its place among its likes."""
    names = ["uri", "key", "copy"]
    numbered = [frame.assign(copy=frame.groupby(["uri", "key"]).cumcount()) for frame in (first, second)]
    return numbered[0].merge(numbered[1], on=names, suffixes=("_a", "_b"))


def _moved(changed: pd.DataFrame) -> list[dict[str, Any]]:
    counted = Counter(zip(changed["label_a"], changed["label_b"], strict=True))
    return [{"from": old, "to": new, "images": count} for (old, new), count in counted.most_common()]


def _most_changed(both: pd.DataFrame, same: pd.Series, most: int) -> list[dict[str, Any]]:
    """Labels that changed come first, the surer on both sides the further up; then scores that moved."""
    moved = (both["score_a"] - both["score_b"]).abs()
    change = moved.where(same, 1 + both["score_a"] + both["score_b"])
    chosen = both.assign(change=change).nlargest(most, "change")
    chosen = chosen[chosen["change"] > 0]
    names = {"key": "key", "uri": "uri", "label_a": "from", "label_b": "to", "score_a": "score_a", "score_b": "score_b"}
    found: Any = chosen[list(names)].rename(columns=names).to_dict("records")
    return list(found)


def _shares_of_labels(first: pd.Series, second: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    labels = sorted({*first.unique(), *second.unique()})
    one, other = (series.value_counts(normalize=True).reindex(labels, fill_value=0.0).to_numpy() for series in (first, second))
    return one, other


def _vectors(runs: Sequence[Run]) -> np.ndarray | None:
    """(n, F) features of a table's images, the newest runs' first; None where a run of it has none, or others."""
    if not all(run.facts["spec"].get("features") and run.location.join(schema.REPORT).exists() for run in runs):
        return None
    if len({features_kind(run) for run in runs}) > 1:
        return None
    tables: list[pa.Table] = []
    for one in snapshot(runs):
        for table in FeatureRun(one.run, read_report(one.run)).vectors():
            tables.append(one.current_rows(table).slice(0, _MOST_VECTORS))
            if sum(table.num_rows for table in tables) >= _MOST_VECTORS:
                return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]
    return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]
