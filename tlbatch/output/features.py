"""The features that a run has written -> vectors by name, and for each its place in that run's manifest.

A frozen base gives an image the same features for ever, so whoever has them needs neither the image nor the base. Features of
another base, input size or preprocessing have another digest in their column `base`, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import CountsError, OutputError
from tlbatch.output.documents import PublishedFile, ReportDocument, RunDocument
from tlbatch.output.run import OutputState, Run, read_output, read_report, read_sealed
from tlbatch.output.snapshot import SnapshotRun, current_runs
from tlbatch.output.table import FileRange, file_ranges
from tlbatch.schema import IMAGE, from_parquet, sha256
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

#: Files that are read at the same time; each may be 256 MiB.
_FILES_AT_ONCE = 2
#: What an object must have in common with another to be the same version of the same thing.
_SAME = ["uri", "key", "etag"]


@dataclass(frozen=True)
class FeatureRun:
    """A published run with features: where it lies, what it says, and its files.

    `superseded` are uris of which a newer run of the same table has something else to say.
    """

    run: Run
    report: ReportDocument
    superseded: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))

    @property
    def base(self) -> str:
        """The digest that the base of a bundle must have to be used with these features."""
        return str(self.run.facts["base"])

    @property
    def kind(self) -> tuple[str, str]:
        """What features must have in common to be used together: base and precision."""
        return features_kind(self.run)

    @property
    def snapshot_run(self) -> SnapshotRun:
        """The run as a part of its table."""
        return SnapshotRun(self.run, self.superseded)

    def ranges(self, *, predictions: bool = False) -> list[FileRange]:
        """Its files by range of manifest rows, in order; those with predictions only if they are wanted."""
        return file_ranges(self.report["files"], predictions=predictions)

    def require_base(self, digest: str, whose: str) -> None:
        """Raises OutputError if these features were made by another base than `whose`."""
        if digest != self.base:
            raise OutputError(
                f"The features of {self.run.location.url} are of another base, size or preprocessing than {whose}: "
                f"their base is {self.base}, its base is {digest}."
            )

    def vectors(self, rows: np.ndarray | None = None) -> Iterator[pa.Table]:
        """uri, key, etag and features (fixed-size lists) of every image, file after file.

        Args:
            rows: of the manifest, sorted; only the files that hold one of them are read.
        """
        ranges = self.ranges()
        if rows is not None:
            ranges = [one for one in ranges if np.searchsorted(rows, one.start) < np.searchsorted(rows, one.end)]
        names = [(name, facts) for one in ranges for name, facts in one.files.items() if _holds_features(name)]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for start in range(0, len(names), _FILES_AT_ONCE):
                yield from pool.map(
                    lambda named: read_checked(self.run.location, *named), names[start : start + _FILES_AT_ONCE]
                )


class FeatureMatch(NamedTuple):
    """Where the features of promised objects are.

    Attributes:
        source: the run that has them.
        target: (n,) int: for each row of its manifest the row of the promised one that is the same object, -1 where none is.
    """

    source: FeatureRun
    target: np.ndarray


@dataclass(frozen=True)
class FeatureTable:
    """The features of a table: those of its runs, the newest first."""

    runs: tuple[FeatureRun, ...]

    @property
    def newest(self) -> Run:
        """The run that says what they are features of."""
        return self.runs[0].run

    @cached_property
    def manifest(self) -> pa.Table:
        """The objects of all its runs, sorted by key."""
        return self._sorted[0]

    @property
    def fingerprint(self) -> str:
        """It stands for the images and their base."""
        return self.newest.fingerprint

    def matches(self) -> list[FeatureMatch]:
        """Where each row of the manifest is."""
        return [FeatureMatch(*one) for one in zip(self.runs, self._sorted[1], strict=True)]

    def require_base(self, digest: str, whose: str) -> None:
        """Raises OutputError where a bundle's base is not the one that these features are of."""
        self.runs[0].require_base(digest, whose)

    @cached_property
    def _sorted(self) -> tuple[pa.Table, list[np.ndarray]]:
        if len(self.runs) == 1:
            return self.newest.manifest, [np.arange(self.newest.manifest.num_rows)]
        current = [one.snapshot_run.is_current(one.run.manifest) for one in self.runs]
        parts = [one.run.manifest.filter(pa.array(mask)) for one, mask in zip(self.runs, current, strict=True)]
        whole = pa.concat_tables(parts)
        order = pc.sort_indices(whole["key"])
        places = np.empty(whole.num_rows, np.int64)
        places[order.to_numpy()] = np.arange(whole.num_rows)
        targets, start = [], 0
        for mask in current:
            target = np.full(len(mask), -1)
            target[mask] = places[start : start + int(mask.sum())]
            start += int(mask.sum())
            targets.append(target)
        return whole.take(order).combine_chunks(), targets


def features_kind(run: Run) -> tuple[str, str]:
    """What features must have in common to be used together: base and precision."""
    return str(run.facts["base"]), str(run.facts["spec"].get("features_dtype"))


def find_features(url: str, options: Mapping[str, Any] | None = None) -> FeatureTable:
    """The features of a run's folder, or of the table that an output has published.

    Of a table that was re-scored, or made again without features, they are those of an earlier run over the very same objects.

    Raises:
        OutputError: there are none, or some of a table's runs have none, or others than the newest.
    """
    location = resolve(url, options)
    if location.join(schema.RUN).exists():
        run = Run(location, cast("RunDocument", read_sealed(location.join(schema.RUN))))
        found = [FeatureRun(run, read_report(run))] if _has_features(run) else []
        return FeatureTable(tuple(found or _none(location)))
    state = read_output(location)
    sources = {one.run.run_id: one for one in runs_with_features(state)}
    table = state.table if sources else []
    if not table:
        _none(location)
    if not all(run.run_id in sources for run in table):
        table = _same_objects(state, table, list(sources.values()))
    current = current_runs(table)
    newest = next((sources[one.run.run_id] for one in current if one.run.run_id in sources), None) or _none(location)
    for name in (one.run.run_id for one in current):
        if name not in sources or sources[name].kind != newest.kind:
            raise OutputError(
                f"Run {name} is part of the table at {location.url} and does not have the features of the newest run; "
                "`classify --incremental --features` makes them."
            )
    return FeatureTable(tuple(replace(sources[one.run.run_id], superseded=one.superseded) for one in current))


def _same_objects(state: OutputState, table: list[Run], sources: Sequence[FeatureRun]) -> list[Run]:
    """The runs with features over the same objects as a table without; the table itself if some of its runs have them."""
    only = table[0]
    for one in sources if len(table) == 1 else ():
        rescored = one.run.fingerprint == only.facts["spec"].get("rescored")
        same = not one.run.on and one.run.facts["manifest_sha256"] == only.facts["manifest_sha256"]
        if rescored or same:
            return state.table_after(one.run)
    return table if any(one.run.run_id in {run.run_id for run in table} for one in sources) else _none(state.output)


def runs_with_features(state: OutputState) -> list[FeatureRun]:
    """The runs of an output that have published features, the newest first; runs that were not promoted are left out."""
    found = [run for run in reversed(state.runs) if _has_features(run) and not run.kept_back()]
    return [FeatureRun(run, read_report(run)) for run in found]


def _has_features(run: Run) -> bool:
    return bool(run.facts["spec"].get("features")) and run.finished()


def _none(location: Location) -> NoReturn:
    raise OutputError(
        f"There are no features at {location.url}. `tlbatch extract` or `classify --features` writes them; they can be used "
        "after the run is published."
    )


def match_stored_features(runs: Sequence[FeatureRun], rows: pa.Table) -> list[FeatureMatch]:
    """Which of some objects have features, in the very version that is promised.

    Args:
        runs: where to look, first come first served.
        rows: of a manifest, each with its number in a column `row`. An object without an etag is not known to be the same.
    """
    found = []
    left = rows.select(["row", *_SAME])
    for source in runs:
        own = source.run.manifest.select(_SAME)
        own = own.append_column("own", pa.array(np.arange(own.num_rows)))
        if source.report["failed_transient"]:
            errors = _errors_of(source)
            own = own.filter(pc.invert(pc.is_in(own["uri"], errors["uri"].filter(errors["transient"]))))
        own = own.group_by(_SAME).aggregate([("own", "min")])
        both = left.join(own, _SAME, join_type="inner")
        if not both.num_rows:
            continue
        target = np.full(source.run.manifest.num_rows, -1)
        target[both["own_min"].to_numpy()] = both["row"].to_numpy()
        taken = target[target >= 0]
        left = left.filter(pa.array(~np.isin(left["row"].to_numpy(), taken)))
        found.append(FeatureMatch(source, target))
    return found


def _errors_of(source: FeatureRun) -> pa.Table:
    """Uri and transient of what failed in a run."""
    names = [item for item in source.report["files"].items() if item[0].startswith("errors/")]
    return pa.concat_tables(read_checked(source.run.location, *named).select(["uri", "transient"]) for named in names)


def _holds_predictions(name: str) -> bool:
    return name.startswith("predictions/")


def _holds_features(name: str) -> bool:
    return name.startswith("features/")


def read_checked(run: Location, name: str, facts: PublishedFile) -> pa.Table:
    """One published file of a run; raises CountsError if it differs from the file that was published."""
    data = run.join(*name.split("/")).read()
    if sha256(data) != facts["sha256"]:
        raise CountsError(f"{run.url}/{name} differs from its recorded sha256; run `tlbatch verify` for details.")
    return from_parquet(data)


def matrix(features: pa.ChunkedArray) -> np.ndarray:
    """(n, F) of a column of fixed-size lists, in the precision it was written in."""
    column = features.combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


class StoredOutcomes(NamedTuple):
    """What a run knows of some rows of its manifest: tables of images with features and of those that failed.

    `good` has the columns of the features table, `bad` those of errors; both also `row` and `index`, an image's place in the
    manifest and in its object, and `images`, how many images that object has.
    """

    good: pa.Table
    bad: pa.Table


def read_range(run: Location, files: FileRange, rows: pa.Table) -> StoredOutcomes:
    """The images of a range, each with its position.

    Args:
        run: the run's folder.
        files: which files.
        rows: all manifest rows of the range: row, uri, key and format.

    Raises:
        CountsError: a file is damaged, or holds an image that is not in the manifest.
    """
    tables = {name: read_checked(run, name, facts) for name, facts in files.files.items()}
    good, bad = _good(tables), tables.get(f"errors/{_part(files)}", schema.ERRORS.empty_table())
    placed = _positions([good, bad], rows)
    images = np.bincount(placed["row"] - files.start, minlength=files.end - files.start)
    if len(images) != files.end - files.start or not images.all():
        raise CountsError(f"The tables of {run.url} do not match its manifest; run `tlbatch verify` for details.")
    placed["images"] = images[placed["row"] - files.start]
    first, second = placed.iloc[: len(good)], placed.iloc[len(good) :]
    return StoredOutcomes(_beside(good, first), _beside(bad, second))


def _part(files: FileRange) -> str:
    return next(iter(files.files)).rsplit("/", 1)[-1]


def _good(tables: Mapping[str, pa.Table]) -> pa.Table:
    """The images that did not fail: their predictions, their features or, as both have the same rows, both."""
    features, predictions = (
        next((table for name, table in tables.items() if holds(name)), None) for holds in (_holds_features, _holds_predictions)
    )
    if predictions is None or features is None:
        return features if predictions is None else predictions
    return predictions.append_column("features", features["features"])


def _beside(table: pa.Table, places: pd.DataFrame) -> pa.Table:
    for name, kind in (("row", pa.int64()), ("index", pa.int32()), (schema.IMAGES, pa.int32())):
        table = table.append_column(name, pa.array(places[name].to_numpy(), kind))
    return table


def _positions(tables: Sequence[pa.Table], rows: pa.Table) -> pd.DataFrame:
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
        raise CountsError(f"{key} has features and is not in the manifest of its run; `tlbatch verify` says more.")
    placed = pd.DataFrame({"row": found["row"].to_numpy(np.int64)})
    placed["index"] = placed.groupby("row").cumcount().to_numpy(np.int32)
    return placed


def range_of_row(ranges: Sequence[FileRange], row: int) -> FileRange:
    """The range that holds a manifest row."""
    return next(one for one in ranges if one.start <= row < one.end)


def look_up(source: FeatureTable, column: str, names: pa.Array) -> pa.Table:
    """key, uri and features of the images with these names, run by run in the manifest's order; no image is read.

    Only files are read that can hold one of them: what is in a shard is not known from the manifest.
    """
    return pa.concat_tables(_look_up(one, column, names) for one in source.runs)


def _look_up(source: FeatureRun, column: str, names: pa.Array) -> pa.Table:
    manifest = source.run.manifest
    wanted = pc.or_(pc.is_in(manifest[column], names), pc.not_equal(manifest["format"], IMAGE))
    rows = np.flatnonzero(wanted.to_numpy())
    tables = list(source.vectors(rows if len(rows) else np.array([0])))
    found = pa.concat_tables(
        table.filter(pc.is_in(table[column], names)).select(["uri", "key", "features"]) for table in tables
    )
    return source.snapshot_run.current_rows(found)
