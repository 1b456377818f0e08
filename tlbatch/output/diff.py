"""The store's listing + the table -> the input of an incremental run. Only listing, manifests and errors are read.

An object is one of six things: new, changed, retry (it failed for a reason that may have passed), stale (another bundle
predicted it), deleted or unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.config import Spec
from tlbatch.errors import TRANSIENT_KINDS, ErrorKind
from tlbatch.output.commit import RunInput
from tlbatch.output.run import OutputState, Run, read_report
from tlbatch.output.snapshot import SnapshotRun, snapshot
from tlbatch.output.table import current_parts, read_part, read_run_table

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
    known = _known(runs, rule)
    kinds = _kinds(store, known)
    missing = _not_in(known, store)
    gone = _without_away(missing, {folder.removesuffix("/") for folder in listed.unreadable} | set(listed.away))
    # A list may name an object twice, under two keys: an object belongs to one run as a whole.
    partly_gone = pc.is_in(store["uri"], gone["uri"]).to_numpy()
    kinds = np.where(partly_gone & (kinds > _CHANGED), _CHANGED, kinds)
    todo = kinds < (_STALE if stale == "keep" and not any(map(rule.must_redo, runs)) else _UNCHANGED)
    todo |= pc.is_in(store["uri"], store["uri"].filter(pa.array(todo))).to_numpy()
    removed = gone.filter(pc.invert(pc.is_in(gone["uri"], store["uri"])))
    counts = dict(zip(KINDS, [*np.bincount(kinds, minlength=5).tolist(), removed.num_rows], strict=True))
    listed = replace(listed, left=_by_folder(removed["key"]), rows=_rows(runs, known, removed["uri"]))
    if todo.all() and gone.num_rows == missing.num_rows:  # nothing of the old table remains, so the new one stands alone
        return replace(listed, counts=counts)
    manifest = store.filter(pa.array(todo)).combine_chunks()
    return replace(listed, manifest=manifest, on=state.pointer, removed=removed.combine_chunks(), counts=counts)


def with_left(listed: RunInput, state: OutputState) -> RunInput:
    """The input of a run that replaces the table, with what of the table it lacks, which is also logged.

    Looked for only where the store has fewer objects than the table: nothing else costs as much as its listing.
    """
    runs = state.table
    if listed.manifest.num_rows >= sum(read_report(run).get("objects", 0) for run in runs):
        return listed
    known = pa.concat_tables(one.current_rows(one.run.manifest).select(_NAMES) for one in snapshot(runs))
    gone = known.filter(pc.invert(pc.is_in(known["uri"], listed.manifest["uri"])))
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


def _known(runs: list[Run], rule: StalenessRule) -> pa.Table:
    """The objects of a table, each once: its manifest row, whether it is stale, and whether to retry it."""
    parts = [_objects_of(one, rule) for one in snapshot(runs)] if runs else [_marked(schema.MANIFEST_SCHEMA.empty_table())]
    known = pa.concat_tables(parts)
    return known.group_by(_NAMES, use_threads=False).aggregate([(name, "first") for name in known.column_names[2:]])


def _objects_of(one: SnapshotRun, rule: StalenessRule) -> pa.Table:
    retry = pa.array([], pa.string())
    report = read_report(one.run)
    kinds = rule.retried(one.run)
    if report["failed_transient"] or {*kinds, ErrorKind.ARCHIVED} & set(report["failed_by_kind"]):
        errors = read_run_table(one.run.location, "errors", ["uri", "transient", "kind"])
        better = pc.is_in(errors["kind"], pa.array(sorted(kinds), pa.string()))
        wanted = pc.or_kleene(pc.or_kleene(errors["transient"], better), _found_archived(one.run, errors))
        retry = errors["uri"].filter(wanted).combine_chunks()
    stale = rule.must_redo(one.run) or not rule.accepts(one.run)
    return _marked(one.current_rows(one.run.manifest), stale, retry)


def _found_archived(run: Run, errors: pa.Table) -> pa.ChunkedArray:
    """Which errors are of objects in an archive that no listing shows: only another request tells when they are restored."""
    listed = run.manifest["uri"].filter(pc.equal(run.manifest["format"], schema.ARCHIVED))
    return pc.and_(pc.equal(errors["kind"], ErrorKind.ARCHIVED), pc.invert(pc.is_in(errors["uri"], listed)))


def _marked(objects: pa.Table, stale: bool = False, retry: pa.Array | None = None) -> pa.Table:
    objects = objects.append_column("stale", pa.array(np.full(objects.num_rows, stale)))
    return objects.append_column("retry", pc.is_in(objects["uri"], pa.array([], pa.string()) if retry is None else retry))


def _kinds(store: pa.Table, known: pa.Table) -> np.ndarray:
    """(n,) int: for each object of the store its number among `KINDS`."""
    numbered = store.append_column("row", pa.array(np.arange(store.num_rows)))
    beside = numbered.join(known.append_column("known", pa.array(np.ones(known.num_rows, bool))), _NAMES).sort_by("row")
    changed = _true(pc.not_equal(beside["size"], beside["size_first"]))
    changed |= _true(pc.invert(schema.same_version(beside["etag_first"], beside["etag"])))
    # What was read before it went into the archive keeps its rows; what was restored is of its own format again.
    in_archive = _true(pc.equal(beside["format"], schema.ARCHIVED))
    changed |= _true(pc.not_equal(beside["format"], beside["format_first"])) & ~in_archive
    kinds = np.full(store.num_rows, _UNCHANGED)
    kinds[_true(beside["stale_first"])] = _STALE
    kinds[_true(beside["retry_first"])] = _RETRY
    kinds[changed] = _CHANGED
    kinds[~_true(beside["known"])] = _NEW
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


def _rows(runs: Sequence[Run], known: pa.Table, leaving: pa.ChunkedArray) -> tuple[int, int]:
    """How many rows of the table leave with some objects, and how many it has. A loose image is a row, a shard has many."""
    if not len(leaving) or pc.all(pc.is_in(known["format_first"], pa.array([schema.IMAGE]))).as_py():
        return len(leaving), known.num_rows
    left = total = 0
    for folder in ("predictions" if any(run.facts["spec"].get("predictions", True) for run in runs) else "features", "errors"):
        for part, superseded in current_parts(runs, folder):
            uris = read_part(part, superseded, ["uri"])["uri"]
            left, total = left + (pc.sum(pc.is_in(uris, leaving)).as_py() or 0), total + len(uris)
    return left, total


def _not_in(known: pa.Table, store: pa.Table) -> pa.Table:
    """Uri and key of the objects of the table that the store no longer has."""
    return known.select(_NAMES).join(store.select(_NAMES), _NAMES, join_type="left anti").sort_by("key")
