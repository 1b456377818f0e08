"""The features that a run has written -> vectors by name, and for each its place in that run's manifest.

A frozen base gives an image the same features for ever, so whoever has them needs neither the image nor the base. Features of
another base, input size or preprocessing have another digest in their column `base`, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import ledger, schema
from tlbatch.errors import BooksError, OutputError
from tlbatch.ledger import Run, read_sealed
from tlbatch.schema import from_parquet, sha256
from tlbatch.shards import IMAGE
from tlbatch.storage import Place, resolve

#: Files that are read at the same time; each may be 256 MiB.
_FILES_AT_ONCE = 2


class Window(NamedTuple):
    """The files of the same rows of the manifest: name -> sha256, below the run's folder."""

    start: int
    end: int
    files: Mapping[str, str]


@dataclass(frozen=True)
class FeatureRun:
    """A published run with features: where it lies, what it says, and its files."""

    run: Run
    report: Mapping[str, Any]

    @property
    def base(self) -> str:
        """The digest that the base of a bundle must have to be used with these features."""
        return str(self.run.facts["base"])

    def windows(self) -> list[Window]:
        """Its files by the rows of the manifest they are of, in their order."""
        found: dict[tuple[int, int], dict[str, str]] = {}
        for name, facts in self.report["files"].items():
            if not name.startswith("predictions/"):
                found.setdefault((facts["objects"][0], facts["objects"][1]), {})[name] = facts["sha256"]
        return [Window(start, end, files) for (start, end), files in sorted(found.items())]

    def require_base(self, digest: str, whose: str) -> None:
        """Raises OutputError where a bundle's base is not the one that these features are of."""
        if digest != self.base:
            raise OutputError(
                f"The features of {self.run.place.url} are of another base, size or preprocessing than {whose}: their base is "
                f"{self.base}, its {digest}."
            )

    def vectors(self, rows: np.ndarray | None = None) -> Iterator[pa.Table]:
        """uri, key, etag and features (fixed-size lists) of every image, file after file.

        Args:
            rows: of the manifest, sorted; only the files that hold one of them are read.
        """
        windows = self.windows()
        if rows is not None:
            windows = [one for one in windows if np.searchsorted(rows, one.start) < np.searchsorted(rows, one.end)]
        names = [(name, digest) for window in windows for name, digest in window.files.items() if _holds_features(name)]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for start in range(0, len(names), _FILES_AT_ONCE):
                yield from pool.map(lambda named: read_checked(self.run.place, *named), names[start : start + _FILES_AT_ONCE])


def find_features(url: str, options: Mapping[str, Any] | None = None) -> FeatureRun:
    """The features of a run's folder, or of the newest run with features that an output has published.

    Raises:
        OutputError: there are none.
    """
    place = resolve(url, options)
    if place.join(schema.RUN).exists():
        candidates = [Run(place, read_sealed(place.join(schema.RUN)))]
    else:
        candidates = ledger.runs(place) if schema.RUNS in place.names() else []
    for run in reversed(candidates):
        kept_back = run.place.join(schema.KEPT_BACK).exists() and len(candidates) > 1
        if run.facts["spec"].get("features") and run.finished() and not kept_back:
            return FeatureRun(run, read_sealed(run.place.join(schema.REPORT)))
    raise OutputError(
        f"There are no features at {place.url}: `tlbatch extract`, or `classify --features`, writes them, and they are there "
        "once it has published."
    )


def _holds_features(name: str) -> bool:
    return name.startswith("features/")


def read_checked(run: Place, name: str, digest: str) -> pa.Table:
    """One published file of a run; raises BooksError where it is not the one that was published."""
    data = run.join(*name.split("/")).read()
    if sha256(data) != digest:
        raise BooksError(f"{run.url}/{name} differs from its recorded sha256; `tlbatch verify` says more.")
    return from_parquet(data)


def matrix(features: pa.ChunkedArray) -> np.ndarray:
    """(n, F) of a column of fixed-size lists, in the precision it was written in."""
    column = features.combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


class Found(NamedTuple):
    """What a run knows of some rows of its manifest: tables of images with features and of those that failed.

    `good` has the columns of the features table, `bad` those of errors; both also `row` and `index`, an image's place in the
    manifest and in its object, and `images`, how many images that object has.
    """

    good: pa.Table
    bad: pa.Table


def read_window(run: Place, window: Window, rows: pa.Table) -> Found:
    """The images of a window, each with its place.

    Args:
        run: the run's folder.
        window: which files.
        rows: of the manifest, all that the window is of: row, uri, key and format.

    Raises:
        BooksError: a file is damaged, or holds an image that the manifest does not promise.
    """
    tables = {name: read_checked(run, name, digest) for name, digest in window.files.items()}
    good = pa.concat_tables([table for name, table in tables.items() if _holds_features(name)])
    bad = pa.concat_tables(
        [table for name, table in tables.items() if not _holds_features(name)] or [schema.ERRORS.empty_table()]
    )
    placed = _places([good, bad], rows)
    images = np.bincount(placed["row"] - window.start, minlength=window.end - window.start)
    if len(images) != window.end - window.start or not images.all():
        raise BooksError(f"The tables of {run.url} and its manifest do not fit together; `tlbatch verify` says more.")
    placed["images"] = images[placed["row"] - window.start]
    first, second = placed.iloc[: len(good)], placed.iloc[len(good) :]
    return Found(_beside(good, first), _beside(bad, second))


def _beside(table: pa.Table, places: pd.DataFrame) -> pa.Table:
    for name, kind in (("row", pa.int64()), ("index", pa.int32()), (schema.IMAGES, pa.int32())):
        table = table.append_column(name, pa.array(places[name].to_numpy(), kind))
    return table


def _places(tables: Sequence[pa.Table], rows: pa.Table) -> pd.DataFrame:
    """Row and index of each image of the tables, one table after the other.

    A loose image is found by uri and key, an image of a shard by the shard's uri. Where one object is listed twice, its
    images stand twice in the tables as well, in the manifest's order.
    """
    seen = pa.concat_tables([table.select(["uri", "key"]) for table in tables]).to_pandas()
    listed = rows.select(["row", "uri", "key", "format"]).to_pandas()
    in_shard = seen["uri"].isin(listed.loc[listed["format"] != IMAGE, "uri"])
    seen["name"] = seen["key"].where(~in_shard, "")
    listed["name"] = listed["key"].where(listed["format"] == IMAGE, "")
    copies = listed.groupby(["uri", "name"])["row"].transform("size")
    listed["copy"] = listed.groupby(["uri", "name"]).cumcount()
    counts = seen.groupby(["uri", "name"])["key"].transform("size")
    known = listed.assign(copies=copies).drop_duplicates(["uri", "name"])[["uri", "name", "copies"]]
    seen["copies"] = seen.merge(known, on=["uri", "name"], how="left")["copies"].fillna(1).to_numpy(np.int64)
    seen["copy"] = seen.groupby(["uri", "name"]).cumcount() * seen["copies"] // counts
    found = seen.merge(listed[["uri", "name", "copy", "row"]], on=["uri", "name", "copy"], how="left", sort=False)
    if found["row"].isna().any():
        key = found.loc[found["row"].isna(), "key"].iloc[0]
        raise BooksError(f"{key} has features and is not in the manifest of its run; `tlbatch verify` says more.")
    placed = pd.DataFrame({"row": found["row"].to_numpy(np.int64)})
    placed["index"] = placed.groupby("row").cumcount().to_numpy(np.int32)
    return placed


def window_of(windows: Sequence[Window], row: int) -> Window:
    """The window that holds a row of the manifest."""
    return next(window for window in windows if window.start <= row < window.end)


def look_up(source: FeatureRun, column: str, names: pa.Array) -> pa.Table:
    """key, uri and features of the images with these names, in the manifest's order; no image is read.

    Only files are read that can hold one of them: what is in a shard is not known from the manifest.
    """
    manifest = source.run.manifest
    wanted = pc.or_(pc.is_in(manifest[column], names), pc.not_equal(manifest["format"], IMAGE))
    rows = np.flatnonzero(wanted.to_numpy())
    tables = source.vectors(rows if len(rows) else np.array([0]))
    return pa.concat_tables(table.filter(pc.is_in(table[column], names)).select(["uri", "key", "features"]) for table in tables)
