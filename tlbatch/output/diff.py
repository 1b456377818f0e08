"""The store's listing + the table -> the input of an incremental run. Only listing, manifests and errors are read.

An object is one of six things: new, changed, retry (it failed for a reason that may have passed), stale (another bundle
predicted it), deleted or unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.config import Spec
from tlbatch.errors import TRANSIENT_KINDS, ErrorKind
from tlbatch.output.commit import RunInput
from tlbatch.output.ranges import numbered_pieces, pieces_of, read_in_ranges
from tlbatch.output.run import OutputState, Run, read_report
from tlbatch.output.snapshot import UriSet, current_in_range
from tlbatch.output.store_check import StoreCheck
from tlbatch.output.table import current_parts, read_part, read_run_table
from tlbatch.storage.temporary_rows import selected

log = logging.getLogger(__name__)

#: What an object can be; of the first five, the first that applies counts.
KINDS = ("new", "changed", "retry", "stale", "unchanged", "deleted")
_NEW, _CHANGED, _RETRY, _STALE, _UNCHANGED = range(5)
_NAMES = ["uri", "key"]
#: Kinds of failures that are no property of an image's bytes.
_PASSING = TRANSIENT_KINDS | {ErrorKind.NOT_FOUND}
#: Kinds that another version of a reader may not have.
_OF_READERS = frozenset({ErrorKind.UNSUPPORTED, ErrorKind.WORKER_LOST})


class StalenessRule(NamedTuple):
    """When an image of the table is stale.

    Attributes:
        name: what is compared: `bundle`, or for features alone `base`.
        digest: of the bundle or base that is used from now on.
        predictions: whether the table is to have predictions; an image without one is always done.
        features_dtype: precision of the features that the table is to have, if any.
        limits: what an image may have at most, by the name of the setting: what is too large for one limit may fit another.
        readers: versions of what reads images, by package.
    """

    name: str
    digest: str
    predictions: bool = True
    features_dtype: str | None = None
    limits: Mapping[str, int] = MappingProxyType({})
    readers: Mapping[str, str] = MappingProxyType({})

    def retried(self, run: Run) -> set[str]:
        """The kinds of a run's failures that another run may do better."""
        spec: Mapping[str, Any] = run.facts["spec"]
        versions = run.facts.get("versions", {})
        kinds = set(map(str, _PASSING))
        if any(most > spec.get(name, Spec.model_fields[name].default) for name, most in self.limits.items()):
            kinds.add(str(ErrorKind.TOO_LARGE))
        if any(versions.get(name) != version for name, version in self.readers.items()):
            kinds |= set(map(str, _OF_READERS))
        return kinds

    def accepts(self, run: Run) -> bool:
        """Whether the rows of a run are up to date."""
        spec = run.facts["spec"]
        lacks = self.features_dtype and self.features_dtype != (spec.get("features") and spec.get("features_dtype"))
        return cast("dict[str, object]", run.facts)[self.name] == self.digest and not lacks

    def must_redo(self, run: Run) -> bool:
        """Whether the rows of a run are done again even if stale rows are kept."""
        return self.predictions and not run.facts["spec"].get("predictions", True)


def diff_with_table(listed: RunInput, state: OutputState, rule: StalenessRule, stale: str) -> RunInput:
    """What has to be processed of a store, and what has to leave the table.

    Args:
        listed: the whole store.
        state: the output whose table is compared.
        rule: when an image of the table is stale.
        stale: keep, redo or rescore stale images; kept ones are counted and not processed.
    """
    store, runs = listed.manifest, state.table
    last = _STALE if stale == "keep" and not any(map(rule.must_redo, runs)) else _UNCHANGED
    away = {folder.removesuffix("/") for folder in listed.unreadable} | set(listed.away)
    marks = [_RunMarks.of(run, rule) for run in reversed(runs)]

    def compare(ranges: Iterator[list[pa.Table]]) -> _Difference:
        found = _Difference.of_nothing(store.num_rows)
        for objects, *of_runs in ranges:
            found.add(objects, _known(of_runs, marks), last, away, listed.check)
        return found

    found = read_in_ranges(lambda: [numbered_pieces(pieces_of(store)), *_pieces_of_runs(runs)], compare)
    removed = found.removed.sort_by("key")
    counts = dict(zip(KINDS, [*found.counts.tolist(), removed.num_rows], strict=True))
    listed = replace(listed, left=_by_folder(removed["key"]), rows=_rows(runs, found, removed["uri"]))
    if found.todo.all() and not found.stays:  # nothing of the old table remains, so the new one stands alone
        return replace(listed, counts=counts)
    manifest = selected(store, found.todo)
    return replace(listed, manifest=manifest, on=state.pointer, removed=removed.combine_chunks(), counts=counts)


def with_left(listed: RunInput, state: OutputState) -> RunInput:
    """The input of a run that replaces the table, with what of the table it lacks, which is also logged.

    Looked for only where the store has fewer objects than the table: nothing else costs as much as its listing.
    """
    runs = state.table
    if listed.manifest.num_rows >= sum(read_report(run).get("objects", 0) for run in runs):
        return listed

    def lacking(ranges: Iterator[list[pa.Table]]) -> pa.Table:
        found = [schema.REMOVED_SCHEMA.empty_table()]
        for objects, *of_runs in ranges:
            known = pa.concat_tables(_current(of_runs)).select(_NAMES)
            found.append(known.filter(pc.invert(pc.is_in(known["uri"], objects["uri"]))))
        return pa.concat_tables(found)

    gone = read_in_ranges(lambda: [pieces_of(listed.manifest), *_pieces_of_runs(runs)], lacking)
    if gone.num_rows:
        left = _by_folder(gone["key"])
        log.warning("%d objects of the table are not in this listing, and leave the table: %s", gone.num_rows, _in_words(left))
        return replace(listed, left=left)
    return listed


def too_many_deleted(given: RunInput, most: float) -> str | None:
    """A sentence if more rows of the table would leave with their objects than a share of it, and than 20; else None."""
    leaving, rows = given.rows
    if leaving <= max(most * rows, _FEW_DELETED):
        return None
    deleted = (given.counts or {}).get("deleted", 0)
    alike = f"{deleted:,} of the table's {rows:,} objects"
    what = alike if leaving == deleted else f"{deleted:,} objects with {leaving:,} of the table's {rows:,} rows"
    return (
        f"{what} are no longer in the store, more than max_deleted_ratio={most} allows: "
        f"{_in_words(given.left)}. Nothing was published. If a part of the store is only away, run the same command again "
        "when it is back; if they are meant to leave the table, run it once with --allow-deletes."
    )


#: Rows that may always leave the table in one run; folders that are counted, and named in a sentence.
_FEW_DELETED, _FOLDERS, _NAMED_FOLDERS = 20, 20, 3


def _in_words(left: Mapping[str, int]) -> str:
    shown = [f"{folder or 'the top folder'} ({count:,})" for folder, count in list(left.items())[:_NAMED_FOLDERS]]
    return f"in {', '.join(shown)}{' and others' if len(left) > _NAMED_FOLDERS else ''}"


def _by_folder(keys: pa.ChunkedArray) -> dict[str, int]:
    """The largest folders of some keys, each with a slash at its end, and how many of the keys are in them."""
    folders = pc.replace_substring_regex(keys, "[^/]*$", "")
    counted = pc.value_counts(folders)
    found = dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0]))[:_FOLDERS])


@dataclass
class _Difference:
    """What was found so far.

    Attributes:
        todo: (n,) bool: which objects of the store are processed.
        counts: (5,) int: how many objects are of each kind.
        removed: uri and key of the objects that leave the table.
        objects: how many objects the table has.
        loose: whether all of them are single images.
        stays: whether objects stay that cannot be looked at this time.
    """

    todo: np.ndarray
    counts: np.ndarray
    removed: pa.Table
    objects: int = 0
    loose: bool = True
    stays: bool = False

    @classmethod
    def of_nothing(cls, rows: int) -> _Difference:
        """Before the first range of a store with so many rows."""
        return cls(np.zeros(rows, bool), np.zeros(_UNCHANGED + 1, np.int64), schema.REMOVED_SCHEMA.empty_table())

    def add(self, store: pa.Table, known: pa.Table, last: int, away: Collection[str], check: StoreCheck | None = None) -> None:
        """Compare a range of uris.

        Args:
            store: its objects in the store, each with its number in a column `row`.
            known: its objects in the table, as `_known` gives them.
            last: the first kind that is not processed.
            away: folders and objects that cannot be looked at.
            check: asks the store about objects that differ; None: the listing is what the store says.
        """
        found = _matched_by_uri(store, known) or _matched_by_name(store, known)
        kinds = _kinds(store, known.take(found.rows), check)
        missing = known.select(_NAMES).filter(found.missing)
        gone = _without_away(missing, away)
        if check is not None and gone.num_rows:
            gone = check.gone(gone)
        if gone.num_rows:
            # A list may name an object twice, under two keys: an object belongs to one run as a whole.
            kinds = np.where(pc.is_in(store["uri"], gone["uri"]).to_numpy() & (kinds > _CHANGED), _CHANGED, kinds)
            leaving = gone.filter(pc.invert(pc.is_in(gone["uri"], store["uri"])))
            self.removed = pa.concat_tables([self.removed, leaving])
        todo = kinds < last
        if todo.any():
            todo |= pc.is_in(store["uri"], store["uri"].filter(pa.array(todo))).to_numpy()
        self.todo[store["row"].to_numpy()] = todo
        self.counts += np.bincount(kinds, minlength=len(self.counts))
        self.objects += found.objects
        self.loose = self.loose and pc.all(pc.is_in(known["format"], pa.array([schema.IMAGE])), min_count=0).as_py()
        self.stays = self.stays or gone.num_rows < missing.num_rows


class _Match(NamedTuple):
    """How objects of a store and of a table belong together.

    Attributes:
        rows: (n,) int: for each object of the store its row of the table, or null.
        missing: (m,) bool: the rows of the table whose objects the store does not have, each object once.
        objects: how many objects the table has.
    """

    rows: pa.ChunkedArray
    missing: pa.ChunkedArray
    objects: int


def _matched_by_uri(store: pa.Table, known: pa.Table) -> _Match | None:
    """Compare the uris alone, which takes half the time; None if a uri stands for several objects, or for another key."""
    uris, known_uris = store["uri"], known["uri"]
    if not pc.all(pc.less(uris.slice(0, max(0, len(uris) - 1)), uris.slice(1)), min_count=0).as_py():
        return None
    rows, present = pc.index_in(uris, known_uris), pc.is_in(known_uris, uris)
    missing = pc.invert(present)
    absent = known_uris.filter(missing)
    if len(known_uris) - len(absent) != len(rows) - rows.null_count or pc.count_distinct(absent).as_py() != len(absent):
        return None
    other = pc.not_equal(store["key"], known["key"].take(rows))
    return None if pc.any(other, min_count=0).as_py() else _Match(rows, missing, known.num_rows)


def _matched_by_name(store: pa.Table, known: pa.Table) -> _Match:
    """Compare uris and keys: a list of addresses may name an object twice, under one key or several."""
    names, known_names = (pc.binary_join_element_wise(table["uri"], table["key"], "\0") for table in (store, known))
    first = pc.equal(pc.index_in(known_names, known_names), pa.array(np.arange(known.num_rows), pa.int32()))
    missing = pc.and_(first, pc.invert(pc.is_in(known_names, names)))
    return _Match(pc.index_in(names, known_names), missing, pc.sum(first).as_py() or 0)


class _RunMarks(NamedTuple):
    """What a diff has to know of a run besides its manifest.

    Attributes:
        stale: whether its rows are out of date.
        retry: uris of objects that failed for a reason that may have passed.
        archived: uris of objects that were found in an archive.
    """

    stale: bool
    retry: UriSet = UriSet()
    archived: UriSet = UriSet()

    @classmethod
    def of(cls, run: Run, rule: StalenessRule) -> _RunMarks:
        stale = rule.must_redo(run) or not rule.accepts(run)
        report, kinds = read_report(run), rule.retried(run)
        if not report["failed_transient"] and not {*kinds, ErrorKind.ARCHIVED} & set(report["failed_by_kind"]):
            return cls(stale)
        errors = read_run_table(run.location, "errors", ["uri", "transient", "kind"])
        passing = pc.or_kleene(errors["transient"], pc.is_in(errors["kind"], pa.array(sorted(kinds), pa.string())))
        retry, archived = (errors["uri"].filter(mask) for mask in (passing, pc.equal(errors["kind"], ErrorKind.ARCHIVED)))
        return cls(stale, UriSet([retry]), UriSet([archived]))

    def marked(self, objects: pa.Table) -> pa.Table:
        """Rows of the run's manifest with columns `stale` and `retry`.

        An archive that no listing shows is asked again: only another request tells when its objects are restored.
        """
        shown = pc.equal(objects["format"], schema.ARCHIVED).to_numpy()
        retry = self.retry.holds(objects["uri"]) | (self.archived.holds(objects["uri"]) & ~shown)
        objects = objects.append_column("stale", pa.array(np.full(objects.num_rows, self.stale)))
        return objects.append_column("retry", pa.array(retry))


def _pieces_of_runs(runs: Sequence[Run]) -> list[Iterator[pa.Table]]:
    """Of each run, the newest first, the objects that it lists and those that it removes."""
    return [pieces for run in reversed(runs) for pieces in (run.manifest_pieces(), pieces_of(run.removed))]


def _known(of_runs: Sequence[pa.Table], marks: Sequence[_RunMarks]) -> pa.Table:
    """The objects of a table in a range of uris: their manifest rows with columns `stale` and `retry`.

    Args:
        of_runs: their rows in the order of `_pieces_of_runs`.
        marks: of each run, the newest first.
    """
    nothing = _RunMarks(stale=False).marked(schema.MANIFEST_SCHEMA.empty_table())
    return pa.concat_tables([nothing, *(mark.marked(rows) for mark, rows in zip(marks, _current(of_runs), strict=True))])


def _current(of_runs: Sequence[pa.Table]) -> list[pa.Table]:
    """Of each run, the newest first, its manifest rows in a range of uris that belong to the table; of `_known`'s rows."""
    listed, removed = of_runs[::2], of_runs[1::2]
    return current_in_range(listed, listed, removed)


def _kinds(store: pa.Table, known: pa.Table, check: StoreCheck | None) -> np.ndarray:
    """(n,) int: for each object of the store its number among `KINDS`; `known` has beside it its row of the table, or nulls."""
    changed = _true(pc.not_equal(store["size"], known["size"]))
    changed |= _true(pc.invert(schema.same_version(known["etag"], store["etag"])))
    if check is not None and changed.any():  # the table may have a newer version than what was read in place of a listing
        changed[changed] = ~check.current(known.filter(pa.array(changed)))
    # What was read before it went into the archive keeps its rows; what was restored is of its own format again.
    in_archive = _true(pc.equal(store["format"], schema.ARCHIVED))
    changed |= _true(pc.not_equal(store["format"], known["format"])) & ~in_archive
    kinds = np.full(store.num_rows, _UNCHANGED)
    kinds[_true(known["stale"])] = _STALE
    kinds[_true(known["retry"])] = _RETRY
    kinds[changed] = _CHANGED
    kinds[_true(pc.is_null(known["uri"]))] = _NEW
    return kinds


def _true(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool; null counts as False: a list of addresses may give neither size nor etag."""
    found: np.ndarray = pc.fill_null(column, False).to_numpy()
    return found


def _without_away(missing: pa.Table, away: Collection[str]) -> pa.Table:
    """The objects that are missing for another reason than that they, or a folder above them, cannot be looked at this time."""
    if not away:
        return missing

    def is_away(key: str) -> bool:
        return key in away or any(key[:place] in away for place, letter in enumerate(key) if letter == "/")

    return missing.filter(pa.array([not is_away(key) for key in missing["key"].to_pylist()], pa.bool_()))


def _rows(runs: Sequence[Run], found: _Difference, leaving: pa.ChunkedArray) -> tuple[int, int]:
    """How many rows of the table leave with some objects, and how many it has. A loose image is a row, a shard has many."""
    if not len(leaving) or found.loose:
        return len(leaving), found.objects
    left = total = 0
    for folder in ("predictions" if any(run.facts["spec"].get("predictions", True) for run in runs) else "features", "errors"):
        for part, superseded in current_parts(runs, folder):
            uris = read_part(part, superseded, ["uri"])["uri"]
            left, total = left + (pc.sum(pc.is_in(uris, leaving)).as_py() or 0), total + len(uris)
    return left, total
