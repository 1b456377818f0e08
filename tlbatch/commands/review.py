"""A published table -> the few pictures worth a person's look: a contact sheet, and a labels file to fill in.

The least certain ones teach a head most, what is new or changed since the run before may be something else, and a few by
chance show what nobody doubted. Near-duplicates appear once.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tlbatch.config import ReviewConfig
from tlbatch.errors import OutputError
from tlbatch.images.labels import read_all_labels
from tlbatch.output.features import FeatureTable, find_features, look_up, matrix
from tlbatch.output.run import read_output, read_table_runs
from tlbatch.output.table import read_predictions, read_table
from tlbatch.report.html import Thumbnail
from tlbatch.report.sheet import make_sheet
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

LABELS, SHEET = "labels.csv", "sheet.html"

#: Pixels of a picture's longer side.
_SIDE = 224
#: Shares of the budget for what is new or changed, and for chance; the least certain have the rest, and what these leave.
_CHANGED_SHARE, _CONTROL_SHARE = 0.2, 0.1
#: Of so many times what is wanted of each kind the features are compared.
_CANDIDATES = 5
_COLUMNS = ("uri", "key", "etag", "label", "score", "top_scores")


def review(config: ReviewConfig) -> dict[str, Any]:
    """Choose images to look at and write the contact sheet and the labels file.

    Args:
        config: the output, how many, what is labelled already, and where the two files go.

    Returns:
        `labels` and `sheet`, the two files; `images`, how many were chosen; `why`, how many for which reason;
        `near_duplicates` that were left out, None where there are no features to tell; `unreadable` pictures.

    Raises:
        OutputError: nothing is published, or a labels file is there in which somebody has written.
    """
    options = config.storage_options
    target = resolve(config.to, options)
    _require_unwritten(target.join(LABELS))
    table = read_predictions(config.output, _COLUMNS, storage_options=options)
    if config.labels:
        labelled = read_all_labels([resolve(url, options) for url in config.labels], many=True)
        table = table[~table[labelled.column].isin({name for name, _ in labelled.pairs})].reset_index(drop=True)
    source = _features(config.output, options)
    chosen, duplicates = _choose(config, table, source)
    shots = _shots(config, chosen)
    target.join(LABELS).write(_labels_file(chosen))
    known = sorted(table["label"].unique())
    target.join(SHEET).write(make_sheet(f"{len(chosen)} images to review", shots, known))
    return {
        "labels": target.join(LABELS).url,
        "sheet": target.join(SHEET).url,
        "images": len(chosen),
        "why": {str(why): int(count) for why, count in chosen["why"].value_counts().items()},
        "near_duplicates": duplicates,
        "unreadable": sum(shot.data is None for shot in shots),
    }


def _require_unwritten(location: Location) -> None:
    if not location.exists():
        return
    rows = list(csv.DictReader(io.StringIO(location.read().decode())))
    if any(row.get("label") for row in rows):
        raise OutputError(f"{location.url} has labels that somebody has filled in; choose another folder with --to.")


def _features(output: str, options: Mapping[str, Any]) -> FeatureTable | None:
    try:
        return find_features(output, options)
    except OutputError:
        return None


def _choose(config: ReviewConfig, table: pd.DataFrame, source: FeatureTable | None) -> tuple[pd.DataFrame, int | None]:
    """The rows to look at, each with `why`, and how many near-duplicates were passed over."""
    changed = _changed(config, table)
    random = np.random.default_rng(config.seed)
    shares = {"changed": int(_CHANGED_SHARE * config.budget), "control": int(_CONTROL_SHARE * config.budget)}
    orders = {
        "changed": random.permutation(np.flatnonzero(changed)),
        "control": random.permutation(len(table)),
        "uncertain": np.argsort(_margins(table), kind="stable"),
    }
    candidates = {why: order[: _CANDIDATES * shares.get(why, config.budget)] for why, order in orders.items()}
    vectors = _vectors(table, source, np.unique(np.concatenate(list(candidates.values())))) if source else {}
    picked = ReviewSelection(vectors, config.near_duplicate)
    for why, share in shares.items():
        picked.take(why, candidates[why], share)
    picked.take("uncertain", candidates["uncertain"], config.budget - len(picked.rows))
    rows = pd.DataFrame({"row": list(picked.rows), "why": list(picked.rows.values())})
    chosen = table.iloc[rows["row"]].assign(why=rows["why"].to_numpy())
    return chosen.sort_values("score", kind="stable"), picked.duplicates if source else None


class ReviewSelection:
    """Rows that were chosen, and why; a row that looks like one of them is passed over.

    Args:
        vectors: features by row, of unit length.
        near: from which cosine on two images are the same picture.
    """

    def __init__(self, vectors: Mapping[int, np.ndarray], near: float) -> None:
        self.rows: dict[int, str] = {}
        self.duplicates = 0
        self._vectors, self._near = vectors, near
        self._seen: list[np.ndarray] = []

    def take(self, why: str, order: Sequence[int] | np.ndarray, most: int) -> None:
        """Take up to `most` more rows in this order."""
        for row in map(int, order):
            if most <= 0:
                return
            if row in self.rows:
                continue
            vector = self._vectors.get(row)
            if vector is not None and self._seen and float((np.stack(self._seen) @ vector).max()) >= self._near:
                self.duplicates += 1
                continue
            if vector is not None:
                self._seen.append(vector)
            self.rows[row] = why
            most -= 1


def _margins(table: pd.DataFrame) -> np.ndarray:
    """How far the best label is ahead of the second best: the smaller, the less certain.

    Where the table does not tell the second best, how far the best score is from a toss-up.
    """
    if (table["top_scores"].str.len() < 2).any():
        return (table["score"] - 0.5).abs().to_numpy()
    return np.array([values[0] - values[1] for values in table["top_scores"]])


def _changed(config: ReviewConfig, table: pd.DataFrame) -> np.ndarray:
    """Which images are new, or another version, since the published run before; all False where there is none."""
    state = read_output(resolve(config.output, config.storage_options))
    before = state.previous(state.newest) if state.newest else None
    if before is None:
        return np.zeros(len(table), bool)
    old = read_table(state.table_after(before), "predictions", ["uri", "key", "etag"]).to_pandas()
    known = set(zip(old["uri"], old["key"], old["etag"], strict=True))
    return np.array([one not in known for one in zip(table["uri"], table["key"], table["etag"], strict=True)])


def _vectors(table: pd.DataFrame, source: FeatureTable, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Features of some rows: around their mean, because those of one store are all alike, and of unit length."""
    wanted = {(table["uri"].iloc[row], table["key"].iloc[row]): int(row) for row in rows}
    found = look_up(source, "key", pa.array([key for _, key in wanted], pa.string()))
    values = matrix(found["features"]).astype(np.float32)
    values -= values.mean(axis=0)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    names = zip(found["uri"].to_pylist(), found["key"].to_pylist(), strict=True)
    return {wanted[name]: vector for name, vector in zip(names, values, strict=True) if name in wanted}


def _shots(config: ReviewConfig, chosen: pd.DataFrame) -> list[Thumbnail]:
    """What the sheet shows of each chosen image."""
    runs = read_table_runs(resolve(config.output, config.storage_options))
    names = list(zip(chosen["uri"], chosen["key"], strict=True))
    small = load_thumbnails(runs, names, config.storage_options, side=_SIDE)
    rows = zip(names, *(chosen[name] for name in ("label", "score", "why")), strict=True)
    return [Thumbnail(name[1], label, score, why, small.get(name)) for name, label, score, why in rows]


def _labels_file(chosen: pd.DataFrame) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", "label", "suggested", "score", "why"])
    for row in chosen.itertuples():
        writer.writerow([row.key, "", row.label, f"{row.score:.4f}", row.why])
    return buffer.getvalue().encode()
