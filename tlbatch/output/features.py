"""Published features -> vectors by name, each with its position in the manifest of its run.

A frozen base always computes the same features for an image, so stored features replace both the image and the base. Features
of another base, input size or preprocessing have another digest in their column `base` and are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import IO, Any, NamedTuple, NoReturn, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch import schema
from tlbatch.errors import CountsError, OutputError
from tlbatch.output.documents import PublishedFile, ReportDocument, RunDocument
from tlbatch.output.ranges import numbered_pieces, pieces_of, read_in_ranges
from tlbatch.output.run import OutputState, Run, read_output, read_report, read_sealed
from tlbatch.output.snapshot import SnapshotRun, UriSet
from tlbatch.output.table import FileRange, current_runs, file_ranges
from tlbatch.schema import IMAGE, from_parquet, sha256
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve
from tlbatch.storage.temporary_rows import checked_copy, stored_table

#: Files that are fetched at the same time, each up to 256 MiB on the disk; rows, and bytes of a column, in memory at a time.
_FILES_AT_ONCE, _VECTORS_AT_ONCE, _BUFFER = 2, 4_096, 1 << 20
#: Two rows with equal values in these columns are the same version of the same object.
_IDENTITY = ["uri", "key", "etag"]


@dataclass(frozen=True)
class FeatureRun:
    """A published run with features, and its report.

    `superseded` holds the uris that newer runs of the same table have superseded.
    """

    run: Run
    report: ReportDocument
    superseded: UriSet = field(default_factory=UriSet)

    @property
    def base(self) -> str:
        """The digest of the base that made these features. Only a bundle with this base can use them."""
        return str(self.run.facts["base"])

    @property
    def kind(self) -> tuple[str, str]:
        """Base and precision. Only features of the same kind can be used together."""
        return features_kind(self.run)

    @property
    def snapshot_run(self) -> SnapshotRun:
        """The run as part of its table."""
        return SnapshotRun(self.run, self.superseded)

    def ranges(self, *, predictions: bool = False) -> list[FileRange]:
        """Its files by range of manifest rows, in order; files of predictions only on request."""
        return file_ranges(self.report["files"], predictions=predictions)

    def require_base(self, digest: str, whose: str) -> None:
        """Raises OutputError if the base that made these features is not the base of `whose`."""
        if digest != self.base:
            raise OutputError(
                f"The features of {self.run.location.url} were made with another base, input size or preprocessing than "
                f"{whose}: the features have base {self.base}, expected {digest}."
            )

    def vectors(self, rows: np.ndarray | None = None) -> Iterator[pa.Table]:
        """The columns of the features table of every image, some thousand rows at a time, and at least one table per file.

        Args:
            rows: sorted manifest rows; only files that hold at least one of them are read. None reads all files.

        Raises:
            CountsError: a file differs from its recorded digest.
        """
        ranges = self.ranges()
        if rows is not None:
            ranges = [one for one in ranges if np.searchsorted(rows, one.start) < np.searchsorted(rows, one.end)]
        names = [(name, facts) for one in ranges for name, facts in one.files.items() if _holds_features(name)]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for start in range(0, len(names), _FILES_AT_ONCE):
                with ExitStack() as opened:
                    copies = pool.map(lambda named: _copy(self.run, *named), names[start : start + _FILES_AT_ONCE])
                    for copy in [opened.enter_context(one) for one in copies]:
                        yield from _vectors(copy)


def _copy(run: Run, name: str, facts: PublishedFile) -> IO[bytes]:
    return checked_copy(run.location.join(*name.split("/")), facts["sha256"]) or _raise_damaged(run.location, name)


def _vectors(copy: IO[bytes]) -> Iterator[pa.Table]:
    file = pq.ParquetFile(copy, buffer_size=_BUFFER)
    if not file.metadata.num_rows:
        yield file.schema_arrow.empty_table()
    for batch in file.iter_batches(_VECTORS_AT_ONCE, use_threads=False):
        yield pa.Table.from_batches([batch])


class FeatureMatch(NamedTuple):
    """Which rows of a run's manifest have features for objects that are to be processed.

    Attributes:
        source: the run that has the features.
        target: (n,) int: for each manifest row of `source`, the row of the same object in the manifest to be processed, or -1
            if that manifest does not list the object.
    """

    source: FeatureRun
    target: np.ndarray


@dataclass(frozen=True)
class FeatureTable:
    """The features of a table, from all its runs, the newest first."""

    runs: tuple[FeatureRun, ...]

    @property
    def newest(self) -> Run:
        """The newest run. Its facts describe the features: base, size and precision."""
        return self.runs[0].run

    @cached_property
    def manifest(self) -> pa.Table:
        """The current objects of all its runs, sorted by key."""
        return self._sorted[0]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the newest run. It identifies the images and the base."""
        return self.newest.fingerprint

    def matches(self) -> list[FeatureMatch]:
        """For each run, the positions of its rows in `manifest`."""
        return [FeatureMatch(*one) for one in zip(self.runs, self._sorted[1], strict=True)]

    def errors(self) -> pa.Table:
        """Columns `uri`, `key` and `transient` of its images without features."""
        return pa.concat_tables(one.snapshot_run.current_rows(_errors_of(one)) for one in self.runs)

    def require_base(self, digest: str, whose: str) -> None:
        """Raises OutputError if the base that made these features is not the base of `whose`."""
        self.runs[0].require_base(digest, whose)

    @cached_property
    def _sorted(self) -> tuple[pa.Table, list[np.ndarray]]:
        if len(self.runs) == 1:
            return self.newest.manifest, [np.arange(self.newest.manifest.num_rows)]
        targets = [np.full(one.run.facts["objects"], -1) for one in self.runs]

        def in_order(ranges: Iterator[list[pa.Table]]) -> pa.Table:
            return stored_table(_sorted_by_key(ranges, targets), schema.MANIFEST_SCHEMA)

        return read_in_ranges(lambda: [_current_pieces(one) for one in self.runs], in_order, by="key"), targets


def _current_pieces(source: FeatureRun) -> Iterator[pa.Table]:
    """The manifest rows of a run that belong to the table, each with its number in a column `row`."""
    return map(source.snapshot_run.current_rows, numbered_pieces(source.run.manifest_pieces()))


def _sorted_by_key(ranges: Iterator[list[pa.Table]], targets: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """The rows of several runs in one order; `targets` gets the place of each row of each run."""
    start = 0
    for tables in ranges:
        whole = pa.concat_tables(tables)
        order = pc.sort_indices(whole["key"])
        places = np.empty(whole.num_rows, np.int64)
        places[order.to_numpy()] = np.arange(start, start + whole.num_rows)
        ends = np.cumsum([table.num_rows for table in tables])[:-1]
        for target, table, own in zip(targets, tables, np.split(places, ends), strict=True):
            target[table["row"].to_numpy()] = own
        yield whole.drop_columns(["row"]).take(order)
        start += whole.num_rows


def features_kind(run: Run) -> tuple[str, str]:
    """Base and precision of a run's features. Only features of the same kind can be used together."""
    return str(run.facts["base"]), str(run.facts["spec"].get("features_dtype"))


def find_features(url: str, options: Mapping[str, Any] | None = None) -> FeatureTable:
    """The features of a run's folder, or of the published table of an output.

    If the table was re-scored, or made again without features, they come from an earlier run over exactly the same objects.

    Raises:
        OutputError: there are no features, or a run of the table has none, or has features of another kind than the newest run.
    """
    location = resolve(url, options)
    if location.join(schema.RUN).exists():
        run = Run(location, cast("RunDocument", read_sealed(location.join(schema.RUN))))
        found = [FeatureRun(run, read_report(run))] if _has_features(run) else []
        return FeatureTable(tuple(found or _raise_no_features(location)))
    state = read_output(location)
    sources = {one.run.run_id: one for one in runs_with_features(state)}
    table = state.table if sources else []
    if not table:
        _raise_no_features(location)
    if not all(run.run_id in sources for run in table):
        table = _same_objects(state, table, list(sources.values()))
    current = current_runs(table)
    newest = next((sources[one.run.run_id] for one in current if one.run.run_id in sources), None)
    newest = newest or _raise_no_features(location)
    for name in (one.run.run_id for one in current):
        if name not in sources or sources[name].kind != newest.kind:
            raise OutputError(
                f"Run {name} is part of the table at {location.url} and does not have features of the same kind as the newest "
                "run. Run `classify --incremental --features` to compute them."
            )
    return FeatureTable(tuple(replace(sources[one.run.run_id], superseded=one.superseded) for one in current))


def _same_objects(state: OutputState, table: list[Run], sources: Sequence[FeatureRun]) -> list[Run]:
    """The runs with features of the same objects as a table without; the table itself if some of its runs have features."""
    first = table[0]
    for one in sources if len(table) == 1 else ():
        rescored = one.run.fingerprint == first.facts["spec"].get("rescored")
        same = not one.run.on and one.run.facts["manifest_sha256"] == first.facts["manifest_sha256"]
        if rescored or same:
            return state.table_after(one.run)
    in_table = {run.run_id for run in table}
    return table if any(one.run.run_id in in_table for one in sources) else _raise_no_features(state.output)


def runs_with_features(state: OutputState) -> list[FeatureRun]:
    """The runs of an output with published features, the newest first, without runs that were not promoted."""
    found = [run for run in reversed(state.runs) if _has_features(run) and not run.kept_back()]
    return [FeatureRun(run, read_report(run)) for run in found]


def _has_features(run: Run) -> bool:
    return bool(run.facts["spec"].get("features")) and run.finished()


def _raise_no_features(location: Location) -> NoReturn:
    raise OutputError(
        f"There are no features at {location.url}. Run `tlbatch extract` or `classify --features` to write them. Features can "
        "be used once their run is published."
    )


def match_stored_features(runs: Sequence[FeatureRun], rows: pa.Table) -> list[FeatureMatch]:
    """Find stored features for objects that are to be processed, of exactly the listed version.

    Args:
        runs: the runs to search. The first run that has features of an object is used.
        rows: of a manifest, each with its number in a column `row`. An object without an etag is never matched, because its
            version is unknown.

    Returns:
        One match for each run that has features of some of the objects.
    """
    wanted = rows.select(["row", *_IDENTITY])
    failed = [_failed_for_now(source) for source in runs]

    def match(ranges: Iterator[list[pa.Table]]) -> dict[int, np.ndarray]:
        targets: dict[int, np.ndarray] = {}
        for left, *stored in ranges:
            for number, table in enumerate(stored):
                found = _same_versions(left, table, failed[number])
                if found.num_rows:
                    if number not in targets:
                        targets[number] = np.full(runs[number].run.facts["objects"], -1)
                    places = found["row_stored"].to_numpy()
                    targets[number][places] = found["row"].to_numpy()
                    taken = pa.array(targets[number][places])
                    left = left.filter(pc.invert(pc.is_in(left["row"], taken)))  # noqa: PLW2901 - what no newer run has
        return targets

    def sources() -> list[Iterator[pa.Table]]:
        return [pieces_of(wanted), *(numbered_pieces(source.run.manifest_pieces(_IDENTITY)) for source in runs)]

    targets = read_in_ranges(sources, match)
    return [FeatureMatch(runs[number], targets[number]) for number in sorted(targets)]


def _failed_for_now(source: FeatureRun) -> UriSet:
    """The objects of a run with images that failed for a reason that may have passed."""
    if not source.report["failed_transient"]:
        return UriSet()
    errors = _errors_of(source)
    return UriSet([errors["uri"].filter(errors["transient"])])


def _same_versions(left: pa.Table, stored: pa.Table, failed: UriSet) -> pa.Table:
    """The rows of two tables in which both have the same version of an object, side by side in `row` and `row_stored`."""
    stored = stored.filter(pc.is_in(stored["uri"], left["uri"]))
    stored = stored.filter(pa.array(~failed.holds(stored["uri"])))
    first = stored.group_by(_IDENTITY, use_threads=False).aggregate([("row", "min")]).rename_columns({"row_min": "row"})
    both = left.join(first, ["uri", "key"], join_type="inner", right_suffix="_stored", use_threads=False)
    return both.filter(pc.fill_null(schema.same_version(both["etag_stored"], both["etag"]), False))


def _errors_of(source: FeatureRun) -> pa.Table:
    """Columns `uri`, `key` and `transient` of the images that failed in a run."""
    names = [item for item in source.report["files"].items() if item[0].startswith("errors/")]
    found = [read_checked(source.run.location, *named).select(["uri", "key", "transient"]) for named in names]
    return pa.concat_tables([*found, schema.ERRORS.empty_table().select(["uri", "key", "transient"])])


def _holds_predictions(name: str) -> bool:
    return name.startswith("predictions/")


def _holds_features(name: str) -> bool:
    return name.startswith("features/")


def read_checked(run: Location, name: str, facts: PublishedFile) -> pa.Table:
    """Read a published file of a run; raises CountsError if its digest differs from the recorded one."""
    data = run.join(*name.split("/")).read()
    return from_parquet(data) if sha256(data) == facts["sha256"] else _raise_damaged(run, name)


def _raise_damaged(run: Location, name: str) -> NoReturn:
    raise CountsError(f"{run.url}/{name} differs from its recorded sha256. Run `tlbatch verify` for details.")


def matrix(features: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as an array of shape (n, F), in its stored precision."""
    column = features.combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


class StoredOutcomes(NamedTuple):
    """The stored outcome of some manifest rows: one table of images that succeeded, and one of images that failed.

    `good` has the columns of the stored predictions and features, `bad` those of the errors table. Both also have `row`, the
    image's manifest row, `index`, its position in the object, and `images`, the number of images in the object.
    """

    good: pa.Table
    bad: pa.Table


def read_range(run: Location, files: FileRange, rows: pa.Table) -> StoredOutcomes:
    """Read the images of a range of manifest rows, each with its position.

    Args:
        run: the run's folder.
        files: the range and its files.
        rows: all manifest rows of the range: row, uri, key and format.

    Raises:
        CountsError: a file is damaged, or its images do not match the manifest.
    """
    tables = {name: read_checked(run, name, facts) for name, facts in files.files.items()}
    good, bad = _good(tables), tables.get(f"errors/{_part(files)}", schema.ERRORS.empty_table())
    positions = _positions([good, bad], rows)
    images = np.bincount(positions["row"] - files.start, minlength=files.end - files.start)
    if len(images) != files.end - files.start or not images.all():
        raise CountsError(f"The tables of {run.url} do not match its manifest. Run `tlbatch verify` for details.")
    positions["images"] = images[positions["row"] - files.start]
    first, second = positions.iloc[: len(good)], positions.iloc[len(good) :]
    return StoredOutcomes(_with_positions(good, first), _with_positions(bad, second))


def _part(files: FileRange) -> str:
    return next(iter(files.files)).rsplit("/", 1)[-1]


def _good(tables: Mapping[str, pa.Table]) -> pa.Table:
    """The images that did not fail: their predictions, their features, or both side by side. Both have the same rows."""
    features, predictions = (
        next((table for name, table in tables.items() if holds(name)), None) for holds in (_holds_features, _holds_predictions)
    )
    if predictions is None or features is None:
        return features if predictions is None else predictions
    return predictions.append_column("features", features["features"])


def _with_positions(table: pa.Table, positions: pd.DataFrame) -> pa.Table:
    for name, kind in (("row", pa.int64()), (schema.INDEX, pa.int32()), (schema.IMAGES, pa.int32())):
        column = pa.array(positions[name].to_numpy(), kind)
        place = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, column) if place is None else table.set_column(place, name, column)
    return table


def _positions(tables: Sequence[pa.Table], rows: pa.Table) -> pd.DataFrame:
    """Row and index of each image of the tables, one table after the other.

    A loose image is found by uri and key, an image of a shard by the uri of the shard. If the manifest lists an object twice,
    its images are also in the tables twice, in the order of the manifest.

    Args:
        tables: the good images, and those that failed.
        rows: all manifest rows of the range.
    """
    seen = schema.to_frame(pa.concat_tables([table.select(["uri", "key"]) for table in tables]))
    seen["place"] = np.concatenate([_stored_places(table) for table in tables])
    listed = schema.to_frame(rows.select(["row", "uri", "key", "format"]))
    in_shard = seen["uri"].isin(listed.loc[listed["format"] != IMAGE, "uri"])
    seen["name"] = seen["key"].where(~in_shard, "")
    listed["name"] = listed["key"].where(listed["format"] == IMAGE, "")
    copies = listed.groupby(["uri", "name"])["row"].transform("size")
    listed["copy"] = listed.groupby(["uri", "name"]).cumcount()
    counts = seen.groupby(["uri", "name"])["key"].transform("size")
    known = listed.assign(copies=copies).drop_duplicates(["uri", "name"])[["uri", "name", "copies"]]
    seen["copies"] = seen.merge(known, on=["uri", "name"], how="left")["copies"].fillna(1).to_numpy(np.int64)
    in_order = seen.groupby(["uri", "name"]).cumcount() * seen["copies"] // counts
    seen["copy"] = seen.groupby(["uri", "name", "place"]).cumcount().where(seen["place"] >= 0, in_order)
    found = seen.merge(listed[["uri", "name", "copy", "row"]], on=["uri", "name", "copy"], how="left", sort=False)
    if found["row"].isna().any():
        key = found.loc[found["row"].isna(), "key"].iloc[0]
        raise CountsError(f"{key} has features but is not in the manifest of its run. Run `tlbatch verify` for details.")
    positions = pd.DataFrame({"row": found["row"].to_numpy(np.int64), schema.INDEX: seen["place"].to_numpy()})
    unknown = positions[schema.INDEX] < 0
    if unknown.any():
        positions.loc[unknown, schema.INDEX] = _places_by_order(positions["row"], len(tables[0]))[unknown]
    return positions


def _stored_places(table: pa.Table) -> np.ndarray:
    """(n,) int: the place of each image in its shard, -1 where it is not stored."""
    if schema.INDEX not in table.column_names:
        return np.full(len(table), -1)
    places: np.ndarray = pc.fill_null(table[schema.INDEX], -1).to_numpy().astype(np.int64)
    return places


def _places_by_order(rows: pd.Series[int], good: int) -> pd.Series[int]:
    """The place of each image by the order of the tables, for tables that do not store it.

    Both tables have the order of the shard, but if a shard has images in both, it is not known how they alternate.

    Args:
        rows: the manifest row of each image: first of the good ones, then of those that failed.
        good: how many are good.
    """
    failed = pd.Series(np.arange(len(rows)) >= good)
    mixed = failed.groupby(rows).transform("nunique") > 1
    return rows.groupby(rows).cumcount() + np.where(mixed, schema.UNKNOWN_INDEX, 0)


def range_of_row(ranges: Sequence[FileRange], row: int) -> FileRange:
    """The range that contains a manifest row."""
    return next(one for one in ranges if one.start <= row < one.end)


def look_up(source: FeatureTable, uris: pa.Array, keys: pa.Array) -> pa.Table:
    """uri, key and features of the images with these addresses or keys, run by run in the order of the manifest.

    Files that cannot contain any of the names are not read. The manifest does not list the images of a shard, so files that
    cover shards are always read.

    Args:
        source: the features of a table.
        uris: addresses to look up.
        keys: keys to look up.
    """
    return pa.concat_tables(_look_up(one, uris, keys) for one in source.runs)


def _look_up(source: FeatureRun, uris: pa.Array, keys: pa.Array) -> pa.Table:
    named, listed = UriSet([pa.chunked_array([uris])]), UriSet([pa.chunked_array([keys])])

    def wanted(table: pa.Table) -> pa.Array:
        return pa.array(named.holds(table["uri"]) | listed.holds(table["key"]))

    manifest = pa.concat_tables(
        piece.filter(pc.or_(wanted(piece), pc.not_equal(piece["format"], IMAGE)))
        for piece in numbered_pieces(source.run.manifest_pieces(["uri", "key", "format"]))
    )
    rows = manifest["row"].to_numpy()
    vectors = source.vectors(rows if len(rows) else np.array([0]))
    found = pa.concat_tables(table.filter(wanted(table)).select(["uri", "key", "features"]) for table in vectors)
    return source.snapshot_run.current_rows(found)
