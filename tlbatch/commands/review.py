"""A published table -> the images that a person should label: a labelling page, and a labels file to fill in.

Three kinds of images are chosen: the least certain ones, which improve a head most; images that are new or changed since the
previous run, which may differ from the training images; and random ones, which show errors with high scores. Of several
near-duplicates one is chosen.
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
from tlbatch.images.label_files import read_labels
from tlbatch.images.labels import WITHDRAWN
from tlbatch.output.features import FeatureTable, find_features, look_up, matrix
from tlbatch.output.rows import RowFiles
from tlbatch.output.run import Run, read_output
from tlbatch.output.table import require_published
from tlbatch.report.html import Thumbnail
from tlbatch.report.reviewed import ReviewedTable, read_reviewed
from tlbatch.report.sheet import make_labelling_page
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.schema import to_frame
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

LABELS, SHEET = "labels.csv", "sheet.html"

#: Pixels of the longer side of a thumbnail.
_SIDE = 224
#: Shares of the budget for new or changed images and for random ones. The least certain images get the rest.
_CHANGED_SHARE, _CONTROL_SHARE = 0.2, 0.1
#: Candidates per image to choose, for each kind; only the features of candidates are compared.
_CANDIDATES = 5
_SHOWN = ["uri", "key", "label", "score"]


def review(config: ReviewConfig) -> dict[str, Any]:
    """Choose images to label, and write the labelling page and the labels file.

    Args:
        config: the output, the number of images, the images that are labelled already, and the folder for the two files.

    Returns:
        `labels` and `sheet`, the URLs of the labels file and of the labelling page; `images`, the number of chosen images;
        `why`, their number per reason; `near_duplicates`, how many were left out, None without features; `unreadable`, how many
        of the chosen images cannot be read.

    Raises:
        OutputError: nothing is published, or the folder has a labels file with labels in it.
    """
    options = config.storage_options
    target = resolve(config.to, options)
    _require_not_filled_in(target.join(LABELS))
    state = read_output(resolve(config.output, options))
    runs = state.table or require_published(state.output)
    before = state.previous(state.newest) if state.newest else None
    labels = read_labels([resolve(url, options) for url in config.labels], many=True) if config.labels else None
    table = read_reviewed(runs, state.table_after(before) if before else [], labels)
    source = _features(config.output, options)
    chosen, duplicates = _choose(config, runs, table, source)
    thumbnails = _thumbnails(config, runs, chosen)
    target.join(LABELS).write(_labels_file(chosen))
    known = [*sorted(table.labels), WITHDRAWN]
    page = make_labelling_page(f"{len(chosen)} images to review", thumbnails, list(chosen["uri"]), known)
    target.join(SHEET).write(page)
    return {
        "labels": target.join(LABELS).url,
        "sheet": target.join(SHEET).url,
        "images": len(chosen),
        "why": {str(why): int(count) for why, count in chosen["why"].value_counts().items()},
        "near_duplicates": duplicates,
        "unreadable": sum(thumbnail.data is None for thumbnail in thumbnails),
    }


def _require_not_filled_in(location: Location) -> None:
    """Raise OutputError if a labels file contains labels."""
    if not location.exists():
        return
    rows = list(csv.DictReader(io.StringIO(location.read().decode())))
    if any(row.get("label") for row in rows):
        raise OutputError(f"{location.url} contains labels and would be overwritten; choose another folder with --to.")


def _features(output: str, options: Mapping[str, Any]) -> FeatureTable | None:
    try:
        return find_features(output, options)
    except OutputError:
        return None


def _choose(
    config: ReviewConfig, runs: Sequence[Run], table: ReviewedTable, source: FeatureTable | None
) -> tuple[pd.DataFrame, int | None]:
    """The chosen rows with a column `why`, and how many near-duplicates were left out (None without features)."""
    random = np.random.default_rng(config.seed)
    shares = {"changed": int(_CHANGED_SHARE * config.budget), "control": int(_CONTROL_SHARE * config.budget)}
    most = {why: _CANDIDATES * share for why, share in {**shares, "uncertain": config.budget}.items()}
    candidates = {
        "changed": random.permutation(np.flatnonzero(table.changed))[: most["changed"]].copy(),
        "control": random.permutation(len(table.changed))[: most["control"]].copy(),
        "uncertain": _smallest(table.margins, most["uncertain"]),
    }
    numbers = np.unique(np.concatenate(list(candidates.values())))
    rows = to_frame(RowFiles(runs, "predictions").take(table.rows[numbers], _SHOWN)).set_index(numbers)
    vectors = _vectors(rows, source) if source else {}
    picked = ReviewSelection(vectors, config.near_duplicate)
    for why, share in shares.items():
        picked.take(why, candidates[why], share)
    picked.take("uncertain", candidates["uncertain"], config.budget - len(picked.rows))
    chosen = rows.loc[list(picked.rows)].assign(why=list(picked.rows.values()))
    return chosen.sort_values("score", kind="stable"), picked.duplicates if source else None


def _smallest(values: np.ndarray, most: int) -> np.ndarray:
    """The places of the smallest values, in the order of a stable sort, without sorting the others."""
    if most >= len(values):
        return np.argsort(values, kind="stable")
    limit = np.partition(values, most)[most]
    below, equal = np.flatnonzero(values < limit), np.flatnonzero(values == limit)
    return np.concatenate([below[np.argsort(values[below], kind="stable")], equal])[:most].copy()


class ReviewSelection:
    """The chosen rows and the reason for each. A near-duplicate of a chosen row is not chosen.

    Args:
        vectors: features by row, scaled to unit length.
        near: cosine from which two images count as near-duplicates.
    """

    def __init__(self, vectors: Mapping[int, np.ndarray], near: float) -> None:
        self.rows: dict[int, str] = {}
        self.duplicates = 0
        self._vectors, self._near = vectors, near
        self._seen: list[np.ndarray] = []

    def take(self, why: str, order: Sequence[int] | np.ndarray, most: int) -> None:
        """Choose up to `most` further rows in this order."""
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


def _vectors(rows: pd.DataFrame, source: FeatureTable) -> dict[int, np.ndarray]:
    """Features by row, scaled to unit length. The mean is subtracted first, because all images of a store are similar."""
    wanted = dict(zip(zip(rows["uri"], rows["key"], strict=True), rows.index, strict=True))
    found = look_up(source, pa.array([], pa.string()), pa.array([key for _, key in wanted], pa.string()))
    values = matrix(found["features"]).astype(np.float32)
    values -= values.mean(axis=0)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    names = zip(found["uri"].to_pylist(), found["key"].to_pylist(), strict=True)
    return {int(wanted[name]): vector for name, vector in zip(names, values, strict=True) if name in wanted}


def _thumbnails(config: ReviewConfig, runs: Sequence[Run], chosen: pd.DataFrame) -> list[Thumbnail]:
    """The chosen images for the labelling page."""
    names = list(zip(chosen["uri"], chosen["key"], strict=True))
    pictures = load_thumbnails(runs, names, config.storage_options, side=_SIDE)
    rows = zip(names, *(chosen[name] for name in ("label", "score", "why")), strict=True)
    return [Thumbnail(name[1], label, score, why, pictures.get(name)) for name, label, score, why in rows]


def _labels_file(chosen: pd.DataFrame) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["uri", "key", "label", "suggested", "score", "why"])
    for row in chosen.itertuples():
        writer.writerow([row.uri, row.key, "", row.label, f"{row.score:.4f}", row.why])
    return buffer.getvalue().encode()
