"""The store's listing + the table -> the input of an incremental run. Only listing, manifests and errors are read.

An object is one of six things: new, changed, retry (it failed for a reason that may have passed), stale (another bundle
predicted it), deleted or unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import ErrorKind
from tlbatch.output.commit import RunInput
from tlbatch.output.run import OutputState, Run, read_report
from tlbatch.output.snapshot import SnapshotRun, snapshot
from tlbatch.output.table import read_run_table

#: What an object can be; of the first five, the first that applies counts.
KINDS = ("new", "changed", "retry", "stale", "unchanged", "deleted")
_NEW, _CHANGED, _RETRY, _STALE, _UNCHANGED = range(5)
_NAMES = ["uri", "key"]


class StalenessRule(NamedTuple):
    """When an image of the table is stale.

    Attributes:
        name: what is compared: `bundle`, or for features alone `base`.
        digest: of the bundle or base that is used from now on.
        predictions: whether the table is to have predictions; an image without one is always done.
        features_dtype: precision of the features that the table is to have, if any.
    """

    name: str
    digest: str
    predictions: bool = True
    features_dtype: str | None = None

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
    gone = _not_below(missing, listed.unreadable)
    # A list may name an object twice, under two keys: an object belongs to one run as a whole.
    partly_gone = pc.is_in(store["uri"], gone["uri"]).to_numpy()
    kinds = np.where(partly_gone & (kinds > _CHANGED), _CHANGED, kinds)
    todo = kinds < (_STALE if stale == "keep" and not any(map(rule.must_redo, runs)) else _UNCHANGED)
    todo |= pc.is_in(store["uri"], store["uri"].filter(pa.array(todo))).to_numpy()
    removed = gone.filter(pc.invert(pc.is_in(gone["uri"], store["uri"])))
    counts = dict(zip(KINDS, [*np.bincount(kinds, minlength=5).tolist(), removed.num_rows], strict=True))
    listed = replace(listed, left=_by_folder(removed["key"]))
    if todo.all() and gone.num_rows == missing.num_rows:  # nothing of the old table remains, so the new one stands alone
        return replace(listed, counts=counts)
    manifest = store.filter(pa.array(todo)).combine_chunks()
    return replace(listed, manifest=manifest, on=state.pointer, removed=removed.combine_chunks(), counts=counts)


def too_many_deleted(given: RunInput, most: float) -> str | None:
    """A sentence if more objects of the table have left the store than a share of it, and than 20; else None."""
    counts = given.counts or {}
    deleted = counts.get("deleted", 0)
    table = sum(counts.values()) - counts.get("new", 0)
    if deleted <= max(most * table, _FEW_DELETED):
        return None
    shown = [f"{folder or 'the top folder'} ({count:,})" for folder, count in list(given.left.items())[:_NAMED_FOLDERS]]
    more = " and others" if sum(given.left.values()) < deleted or len(given.left) > _NAMED_FOLDERS else ""
    return (
        f"{deleted:,} of the table's {table:,} objects are no longer in the store, more than max_deleted_ratio={most} allows: "
        f"in {', '.join(shown)}{more}. Nothing was published. If a part of the store is only away, run the same command again "
        "when it is back; if they are meant to leave the table, run it once with --allow-deletes."
    )


#: Objects that may always leave the table in one night; folders that are counted, and named in a sentence.
_FEW_DELETED, _FOLDERS, _NAMED_FOLDERS = 20, 20, 3


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
    if report["failed_transient"] or ErrorKind.ARCHIVED in report["failed_by_kind"]:
        errors = read_run_table(one.run.location, "errors", ["uri", "transient", "kind"])
        wanted = pc.or_kleene(errors["transient"], _found_archived(one.run, errors))
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


def _not_below(gone: pa.Table, folders: Sequence[str]) -> pa.Table:
    """The objects that are missing for another reason than that their folder could not be opened this time."""
    for folder in folders:
        gone = gone.filter(pc.invert(pc.starts_with(gone["key"], folder)))
    return gone


def _not_in(known: pa.Table, store: pa.Table) -> pa.Table:
    """Uri and key of the objects of the table that the store no longer has."""
    return known.select(_NAMES).join(store.select(_NAMES), _NAMES, join_type="left anti").sort_by("key")
