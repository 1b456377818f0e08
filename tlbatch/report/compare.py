"""Two runs -> their agreement, the images whose label changed, and the drift of scores, labels and features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import OutputError
from tlbatch.output.documents import ReportDocument
from tlbatch.output.features import FeatureRun, features_kind, matrix
from tlbatch.output.ranges import read_in_ranges
from tlbatch.output.run import Run, read_named_runs, read_report, read_table_runs, run_at
from tlbatch.output.snapshot import snapshot
from tlbatch.output.table import SOURCES, current_of, sources_of_table
from tlbatch.report.drift import index_of_shares, stability_index
from tlbatch.storage.resolve import resolve

#: Most images whose features are compared. They are taken from the first files of the table.
_MOST_VECTORS = 20_000
_COLUMNS = ["uri", "key", "label", "score"]
_MOST_CHANGED = 20
#: The columns of the most changed images, and their names in the result.
_CHANGED = {"key": "key", "uri": "uri", "label_a": "from", "label_b": "to", "score_a": "score_a", "score_b": "score_b"}


def compare(
    run_a: str, run_b: str, *, most: int = _MOST_CHANGED, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compare two runs.

    Args:
        run_a: a run's folder, or an output, whose newest published run is taken.
        run_b: the run or output to compare it with.
        most: maximum number of images in `most_changed`.
        storage_options: fsspec's options for both.

    Returns:
        `images`, the number of images in both runs; `only_a` and `only_b`; `agreement`, the share of images in both runs that
        have the same label; `moved`, how often one label became another; `most_changed`; `psi_scores`, `psi_labels` and, if
        both runs have features, `psi_features` (the mean over all features); `psi`, the largest of these indices. A population
        stability index above 0.1 indicates a small change, above 0.25 a large one (Siddiqi, "Credit Risk Scorecards", 2006).

    Raises:
        OutputError: nothing is published there, or a run has no predictions.
    """
    return compare_tables(_find(run_a, storage_options), _find(run_b, storage_options), most)


def _find(url: str, options: Mapping[str, Any] | None) -> list[Run]:
    """The runs that form a table, the oldest first."""
    named = run_at(url, options)
    if named is not None:
        output, run = named
        return [*read_named_runs(output, run.on), run]
    location = resolve(url, options)
    found = read_table_runs(location)
    if not found:
        raise OutputError(f"Nothing is published at {location.url}, and it is not the folder of a run.")
    return found


def compare_tables(
    table_a: Sequence[Run],
    table_b: Sequence[Run],
    most: int = _MOST_CHANGED,
    unwritten: Mapping[str, ReportDocument] | None = None,
) -> dict[str, Any]:
    """`compare` for two tables, each given as the runs that form it, the oldest first.

    `unwritten` holds, by run, the reports of complete runs that have no `report.json` yet.
    """
    split = SOURCES * len(table_a)

    def sources() -> list[Iterator[pa.Table]]:
        return [pieces for runs in (table_a, table_b) for pieces in sources_of_table(runs, "predictions", _COLUMNS)]

    def compare_ranges(ranges: Iterator[list[pa.Table]]) -> _Comparison:
        found = _Comparison(most)
        for rows in ranges:
            found.add(*(schema.to_frame(current_of(one)) for one in (rows[:split], rows[split:])))
        return found

    found = read_in_ranges(sources, compare_ranges)
    indices = found.indices()
    vectors = [_vectors(runs, unwritten or {}) for runs in (table_a, table_b)]
    if vectors[0] is not None and vectors[1] is not None and vectors[0].shape[1] == vectors[1].shape[1]:
        columns = range(vectors[0].shape[1])
        indices["psi_features"] = float(np.mean([stability_index(vectors[0][:, at], vectors[1][:, at]) for at in columns]))
    return {
        "run_a": table_a[-1].location.url,
        "run_b": table_b[-1].location.url,
        "images": found.images,
        "only_a": found.labels[0].total() - found.images,
        "only_b": found.labels[1].total() - found.images,
        "agreement": found.agreeing / found.images if found.images else 0.0,
        "moved": [{"from": old, "to": new, "images": count} for (old, new), count in found.moved.most_common()],
        "most_changed": found.most_changed.drop(columns="change").to_dict("records"),
        **indices,
        "psi": max(indices.values()),
    }


class _Comparison:
    """What was found so far of two tables, whose rows come by ranges of uris; of all images only the scores are kept.

    Args:
        most: how many images `most_changed` has.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self.labels: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.images = self.agreeing = 0
        self.moved: Counter[tuple[str, str]] = Counter()
        self.most_changed = pd.DataFrame(columns=[*_CHANGED.values(), "change"])

    def add(self, first: pd.DataFrame, second: pd.DataFrame) -> None:
        """Compare the rows of a range."""
        for frame, scores, labels in zip((first, second), self._scores, self.labels, strict=True):
            scores.append(frame["score"].to_numpy())
            labels.update(frame["label"])
        both = _side_by_side(first, second)
        same = both["label_a"] == both["label_b"]
        self.images += len(both)
        self.agreeing += int(same.sum())
        self.moved.update(zip(both["label_a"][~same], both["label_b"][~same], strict=True))
        changed = [one for one in (self.most_changed, _most_changed(both, same, self._most)) if len(one)]
        if changed:
            self.most_changed = pd.concat(changed).nlargest(self._most, "change")

    def indices(self) -> dict[str, float]:
        """Population stability indices of scores and labels."""
        first, second = map(_joined, self._scores)
        names = sorted(self.labels[0] | self.labels[1])
        shares = [np.array([labels[name] / max(1, labels.total()) for name in names]) for labels in self.labels]
        return {"psi_scores": stability_index(first, second), "psi_labels": index_of_shares(*shares)}


def _joined(scores: list[np.ndarray]) -> np.ndarray:
    """The scores of all ranges, which are taken out of the list: both together would be the largest that a comparison holds."""
    whole = np.concatenate([np.array([], np.float32), *scores])
    scores.clear()
    return whole


def _side_by_side(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """The images of both runs. Rows of one run with the same name are matched in their order."""
    names = ["uri", "key", "copy"]
    numbered = [frame.assign(copy=frame.groupby(["uri", "key"]).cumcount()) for frame in (first, second)]
    return numbered[0].merge(numbered[1], on=names, suffixes=("_a", "_b"))


def _most_changed(both: pd.DataFrame, same: pd.Series, most: int) -> pd.DataFrame:
    """The most changed images: first changed labels, by the sum of both scores, then changed scores, by their difference."""
    moved = (both["score_a"] - both["score_b"]).abs()
    change = moved.where(same, 1 + both["score_a"] + both["score_b"])
    chosen = both.assign(change=change).nlargest(most, "change")
    return chosen[chosen["change"] > 0][[*_CHANGED, "change"]].rename(columns=_CHANGED)


def _vectors(runs: Sequence[Run], unwritten: Mapping[str, ReportDocument]) -> np.ndarray | None:
    """(n, F) features of a table's images, the newest runs first; None if a run has no features or features of another kind."""
    if not all(run.facts["spec"].get("features") for run in runs):
        return None
    if not all(run.run_id in unwritten or run.location.join(schema.REPORT).exists() for run in runs):
        return None
    if len({features_kind(run) for run in runs}) > 1:
        return None
    tables: list[pa.Table] = []
    for one in snapshot(runs):
        for table in FeatureRun(one.run, unwritten.get(one.run.run_id) or read_report(one.run)).vectors():
            tables.append(one.current_rows(table).slice(0, _MOST_VECTORS))
            if sum(table.num_rows for table in tables) >= _MOST_VECTORS:
                return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]
    return matrix(pa.concat_tables(tables)["features"])[:_MOST_VECTORS]
