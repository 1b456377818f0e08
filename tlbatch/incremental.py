"""What the store holds now + what the table says -> what a night has to do. Nothing is read but listing, manifests and errors.

An object is one of six things: new, changed, retry (it failed for a reason that may have passed), stale (another bundle
predicted it), deleted or unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch import commit, schema
from tlbatch.commit import Promise
from tlbatch.ledger import Published, Run
from tlbatch.overlay import Layer, layers
from tlbatch.report.table import read_run_table

#: What an object can be; of the first five, the first that fits counts.
KINDS = ("new", "changed", "retry", "stale", "unchanged", "deleted")
_NEW, _CHANGED, _RETRY, _STALE, _UNCHANGED = range(5)
_NAMES = ["uri", "key"]


class Origin(NamedTuple):
    """What makes an image of a table stale if it is not the same.

    Attributes:
        name: `bundle`, or of features alone `base`.
        digest: of the one that is used from now on.
        predictions: whether there are to be predictions; an image without is always done.
        features_dtype: precision of the features there are to be, if any.
    """

    name: str
    digest: str
    predictions: bool = True
    features_dtype: str | None = None

    def is_of(self, run: Run) -> bool:
        """Whether what a run says of its images may stay."""
        spec = run.facts["spec"]
        lacks = self.features_dtype and self.features_dtype != (spec.get("features") and spec.get("features_dtype"))
        return run.facts[self.name] == self.digest and not lacks

    def must_redo(self, run: Run) -> bool:
        """Whether it cannot stay even where stale images are kept."""
        return self.predictions and not run.facts["spec"].get("predictions", True)


def increment(listed: Promise, published: Published, runs: Sequence[Run], origin: Origin, stale: str) -> Promise:
    """What of a store has to be done, and what is to go from the table.

    Args:
        listed: the whole store.
        published: the table, as `latest.json` has it.
        runs: the same runs, read.
        origin: the bundle that predicts from now on.
        stale: keep, redo or rescore what is of another one; what is kept is counted and not done.
    """
    store = listed.manifest
    known = _known(list(layers(runs)), origin)
    kinds = _kinds(store, known)
    gone = _not_in(known, store)
    # A list may name an object twice, under two keys: an object is one run's as a whole.
    partly_gone = pc.is_in(store["uri"], gone["uri"]).to_numpy()
    kinds = np.where(partly_gone & (kinds > _CHANGED), _CHANGED, kinds)
    todo = kinds < (_STALE if stale == "keep" and not any(map(origin.must_redo, runs)) else _UNCHANGED)
    todo |= pc.is_in(store["uri"], store["uri"].filter(pa.array(todo))).to_numpy()
    removed = gone.filter(pc.invert(pc.is_in(gone["uri"], store["uri"])))
    counts = dict(zip(KINDS, [*np.bincount(kinds, minlength=5).tolist(), removed.num_rows], strict=True))
    if todo.all():  # nothing of the old table is left, so this one needs nothing of it
        return replace(listed, counts=counts)
    manifest = store.filter(pa.array(todo)).combine_chunks()
    return replace(listed, manifest=manifest, on=published, removed=removed.combine_chunks(), counts=counts)


def _known(table: Sequence[Layer], origin: Origin) -> pa.Table:
    """The objects of a table, each once: what its manifest says, whether they are stale, and whether to try them again."""
    known = pa.concat_tables(_of_run(layer, origin) for layer in table) if table else _of_run(None, origin)
    return known.group_by(_NAMES, use_threads=False).aggregate([(name, "first") for name in known.column_names[2:]])


def _of_run(layer: Layer | None, origin: Origin) -> pa.Table:
    own, stale, again = schema.MANIFEST_SCHEMA.empty_table(), False, pa.array([], pa.string())
    if layer is not None:
        own = layer.visible(layer.run.manifest)
        stale = origin.must_redo(layer.run) or not origin.is_of(layer.run)
        if commit.read_report(layer.run)["failed_transient"]:
            errors = read_run_table(layer.run.place, "errors", ["uri", "transient"])
            again = errors["uri"].filter(errors["transient"]).combine_chunks()
    own = own.append_column("stale", pa.array(np.full(own.num_rows, stale)))
    return own.append_column("retry", pc.is_in(own["uri"], again))


def _kinds(store: pa.Table, known: pa.Table) -> np.ndarray:
    """(n,) int: for each object of the store which of the `KINDS` it is."""
    numbered = store.append_column("row", pa.array(np.arange(store.num_rows)))
    beside = numbered.join(known.append_column("known", pa.array(np.ones(known.num_rows, bool))), _NAMES).sort_by("row")
    changed = np.zeros(store.num_rows, bool)
    for name in ("size", "etag", "format"):
        changed |= _sure(pc.not_equal(beside[name], beside[f"{name}_first"]))
    kinds = np.full(store.num_rows, _UNCHANGED)
    kinds[_sure(beside["stale_first"])] = _STALE
    kinds[_sure(beside["retry_first"])] = _RETRY
    kinds[changed] = _CHANGED
    kinds[~_sure(beside["known"])] = _NEW
    return kinds


def _sure(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool; what is not known is not so: a list of addresses may tell neither size nor etag."""
    found: np.ndarray = pc.fill_null(column, False).to_numpy()
    return found


def _not_in(known: pa.Table, store: pa.Table) -> pa.Table:
    """Uri and key of the objects of the table that the store has no more."""
    return known.select(_NAMES).join(store.select(_NAMES), _NAMES, join_type="left anti").sort_by("key")
