"""An output folder -> the files in it that no command will use again; `gc` lists them and removes them on request.

Files of the table and of the run that the next command continues are never touched. Runs that were published earlier also stay,
unless `keep` limits their number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tlbatch import schema
from tlbatch.output.lease import Lease, require_free
from tlbatch.output.run import READS_AT_ONCE, read_output, require_runs
from tlbatch.schema import PART_SUFFIX, RECEIPT_SUFFIX
from tlbatch.storage.location import Location, is_leftover

#: Why something is not needed; the `why` of a leftover.
_CUT_SHORT = "interrupted write"
_NEVER_BEGAN = "run that never began"
_GIVEN_UP = "unfinished run followed by a later run"
_PUBLISHED = "staged files of a published run"
_NO_RECEIPT = "part without a receipt"
_REPLACED = "run that is no longer part of the table"
_UPLOAD = "unfinished upload"


@dataclass
class Leftover:
    """Something that is not needed.

    Attributes:
        path: below the output.
        why: the reason it is not needed.
        objects: how many objects it has.
        bytes: their total size; 0 for an unfinished upload, whose size is unknown.
        hours: since the newest of them was written.
    """

    path: str
    why: str
    objects: int = 0
    bytes: int = 0
    hours: float = float("inf")

    def add(self, size: int, hours: float) -> None:
        """Count one object."""
        self.objects += 1
        self.bytes += size
        self.hours = min(self.hours, hours)


def gc(
    output: str,
    *,
    older_than: float = 24.0,
    keep: int | None = None,
    remove: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Find what dead runs left behind, and remove it on request.

    Args:
        output: the output folder or URL.
        older_than: minimum age in hours; another process may still use newer files.
        keep: how many runs that are no longer part of the table to keep for rollback, the newest first; None keeps all of them.
            Features that only a removed run has are removed with it.
        remove: whether to remove it. The lease is held meanwhile, so no run can be active.
        storage_options: fsspec options for the output.

    Returns:
        `output`; `leftovers`, each with path, why, objects, bytes and hours; `bytes`, their total; and `removed`, whether
        they were removed.

    Raises:
        OutputError: there is no output.
        LeaseHeldError: a run is active there.
    """
    location = require_runs(output, storage_options)
    require_free(location)
    with Lease(location, "gc") if remove else contextlib.nullcontext():
        now = time.time()
        found = [one for one in _leftovers(location, now, keep) if one.hours >= older_than]
        uploads = [one for one in location.uploads() if _hours(now, one.began) >= older_than]
        if remove:
            with ThreadPoolExecutor(READS_AT_ONCE) as pool:
                list(pool.map(lambda one: location.join(*one.path.split("/")).delete(), found))
                list(pool.map(location.abort, uploads))
    found += [Leftover(one.key, _UPLOAD, 1, 0, _hours(now, one.began)) for one in uploads]
    return {
        "output": location.url,
        "removed": remove,
        "bytes": sum(one.bytes for one in found),
        "leftovers": [asdict(one) for one in found],
    }


def _leftovers(output: Location, now: float, keep: int | None) -> Iterable[Leftover]:
    contents = list(output.contents())
    reasons = _Reasons(output, {info.key for info in contents}, keep)
    found: dict[str, Leftover] = {}
    for info in contents:
        reason = reasons.of(info.key)
        if reason is not None:
            path, why = reason
            found.setdefault(path, Leftover(path, why)).add(info.size, _hours(now, info.written))
    return found.values()


def _hours(now: float, then: float) -> float:
    return round((now - then) / 3600, 1)


class _Reasons:
    """Why an object of an output is not needed, from its name and from the other objects of the output."""

    def __init__(self, output: Location, names: set[str], keep: int | None) -> None:
        state = read_output(output)
        runs, latest = state.runs, {entry["run_id"] for entry in state.pointer}
        published = {run.run_id for run in runs if run.run_id in latest or run.finished()}
        self._state = {run.run_id: _PUBLISHED if run.run_id in published else _GIVEN_UP for run in runs}
        if keep is not None:
            kept_back = {name.split("/")[1] for name in names if name.endswith(f"/{schema.KEPT_BACK}")}
            replaced = [run for run in runs if run.run_id in published - latest - kept_back]
            kept = replaced[len(replaced) - keep :] if keep < len(replaced) else replaced
            needed = latest | {run.run_id for run in kept} | {entry["run_id"] for run in kept for entry in run.on}
            self._state.update({run.run_id: _REPLACED for run in replaced if run.run_id not in needed})
        current = runs[-1].run_id if runs else None
        if current is not None and current not in published:
            has_manifest = f"{schema.RUNS}/{current}/{schema.MANIFEST}" in names
            self._state[current] = _NO_RECEIPT if has_manifest else _NEVER_BEGAN
        # The name of a receipt begins with the name of its part.
        self._receipted = {name.rsplit(".", 4)[0] for name in names if name.endswith(RECEIPT_SUFFIX)}

    def of(self, key: str) -> tuple[str, str] | None:
        """The path to remove because of this object, and why; None if the object is needed."""
        if is_leftover(key):
            return key, _CUT_SHORT
        folder, _, rest = key.partition("/")
        run_id, _, name = rest.partition("/")
        if folder != schema.RUNS or not name:
            return None
        run = f"{folder}/{run_id}"
        state = self._state.get(run_id, _NEVER_BEGAN)
        if state in (_NEVER_BEGAN, _GIVEN_UP, _REPLACED):
            return run, state
        if not name.startswith(schema.STAGED + "/"):
            return None
        if state == _PUBLISHED:
            return f"{run}/{schema.STAGED}", state
        is_part = name.endswith(PART_SUFFIX) and name.count("/") == 1
        return (key, _NO_RECEIPT) if is_part and key.removesuffix(PART_SUFFIX) not in self._receipted else None
