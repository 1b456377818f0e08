"""Two runs -> how far they agree, what moved, and how far scores, labels and features have drifted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tlbatch import ledger, schema
from tlbatch.errors import ConfigError, OutputError
from tlbatch.features import FeatureRun, matrix
from tlbatch.ledger import Run, read_sealed
from tlbatch.overlay import layers
from tlbatch.report.table import read_table
from tlbatch.report.verdict import index_of_shares
from tlbatch.storage import Place, resolve

#: Bins of a population stability index, cut where the first run has as many images in each.
_BINS = 10
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
    named = ledger.run_at(url, options)
    if named is not None:
        return ledger.table_after(*named)
    place = resolve(url, options)
    found = ledger.published_runs(place)
    if not found:
        raise OutputError(f"Nothing is published at {place.url}, and it is no run's folder.")
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
        "run_a": table_a[-1].place.url,
        "run_b": table_b[-1].place.url,
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


def stability_index(first: np.ndarray, second: np.ndarray) -> float:
    """Population stability index of two samples of numbers, over bins with a tenth of the first sample each.

    Sum of (q - p) ln(q / p) over the bins, p and q being the shares of the first and the second sample. Where the first
    sample has few values, bins that would be cut at the same value are one.
    Without a number on one side there is nothing to tell, and the index is 0.
    """
    if not len(first) or not len(second):
        return 0.0
    edges = np.unique(np.quantile(first.astype(np.float64), np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(edges, values.astype(np.float64), side="left"), minlength=len(edges) + 1)
        for values in (first, second)
    ]
    return index_of_shares(*(count / max(1, count.sum()) for count in counts))


def _shares_of_labels(first: pd.Series, second: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    labels = sorted({*first.unique(), *second.unique()})
    one, other = (series.value_counts(normalize=True).reindex(labels, fill_value=0.0).to_numpy() for series in (first, second))
    return one, other


def _vectors(runs: Sequence[Run]) -> np.ndarray | None:
    """(n, F) features of a table's images, the newest runs' first; None where a run of it has none, or others."""
    if not all(run.facts["spec"].get("features") and run.place.join(schema.REPORT).exists() for run in runs):
        return None
    kinds = {FeatureRun(run, {}).kind for run in runs}
    if len(kinds) > 1:
        return None
    tables: list[pa.Table] = []
    for layer in layers(runs):
        for table in FeatureRun(layer.run, read_sealed(layer.run.place.join(schema.REPORT))).vectors():
            tables.append(layer.visible(table).slice(0, _MOST_VECTORS))
            if sum(table.num_rows for table in tables) >= _MOST_VECTORS:
                return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]
    return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]


class Condition(NamedTuple):
    """One part of what `promote_if` says: a number of `compare`, and how it must stand to another."""

    name: str
    operator: str
    value: float

    def holds(self, measured: float) -> bool:
        """Whether it is so."""
        return _OPERATORS[self.operator](measured, self.value)


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda one, other: one <= other,
    ">=": lambda one, other: one >= other,
    "<": lambda one, other: one < other,
    ">": lambda one, other: one > other,
}
_NAMES = ("psi", "psi_scores", "psi_labels", "psi_features", "agreement")


def parse_conditions(text: str) -> list[Condition]:
    """`psi<0.2 and agreement>0.9` as conditions.

    Raises:
        ConfigError: it says something else.
    """
    found = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>)\s*(\d*\.?\d+)", part.strip())
        if match is None or match[1] not in _NAMES:
            raise ConfigError(
                f"promote_if: write conditions as `psi<0.2 and agreement>0.9`, of {', '.join(_NAMES)}; found {part!r}."
            )
        found.append(Condition(match[1], match[2], float(match[3])))
    return list(found)


def judge(output: Place, run: Run, conditions: list[Condition]) -> tuple[dict[str, Any] | None, list[str]]:
    """Hold a run that is about to be published against the table that it would follow.

    Returns:
        What `compare` gave (None where nothing is published yet), and a sentence for each condition that does not hold.
    """
    table = ledger.published_runs(output)
    if not table:
        return None, []
    measured = compare_tables(table, ledger.table_after(output, run), most=0)
    broken = []
    for condition in conditions:
        value = measured.get(condition.name)
        if value is None:
            broken.append(f"{condition.name} cannot be told, as one of the runs has no features")
        elif not condition.holds(value):
            broken.append(f"{condition.name} is {value:.4f} and not {condition.operator} {condition.value:g}")
    return measured, broken
