"""Receipts of staged parts -> what is done and what is left.

Everything is computed from the manifest and the receipts. Nothing else remembers progress, so nothing can disagree with them: a
group is a copy of receipts that saves requests, and counts for nothing once the receipts themselves are gone.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import CountsError, StoreUnavailableError
from tlbatch.output.documents import PartPlan, Receipt
from tlbatch.output.run import READS_AT_ONCE, Run
from tlbatch.schema import GROUP_SUFFIX, PART_SUFFIX, RECEIPT_SUFFIX, seal, unseal
from tlbatch.storage.temporary_rows import selected

log = logging.getLogger(__name__)

#: Receipts that one group holds.
RECEIPTS_PER_GROUP = 500


@dataclass(frozen=True)
class Receipts:
    """The receipts of a run, in the order of their first row; `broken` names those, and groups, that fail their seal."""

    bodies: tuple[Receipt, ...]
    broken: tuple[str, ...] = ()

    def owners(self, rows: int) -> np.ndarray:
        """(rows,) int: for each manifest row the number of the first part that holds it, or -1.

        A task that ran twice left two parts; all images of an object are taken from one of them.
        """
        owner = np.full(rows, -1, np.int32)
        for number, body in reversed(list(enumerate(self.bodies))):
            for start, end in body["rows"]:
                owner[start:end] = number
        return owner

    def images(self, rows: int) -> np.ndarray:
        """(rows,) int: how many images each object of the manifest holds; 0 if no part holds the object."""
        owner = self.owners(rows)
        images = (owner >= 0).astype(np.int32)
        for number, body in enumerate(self.bodies):
            for row, count in body["images"].items():
                if owner[int(row)] == number:
                    images[int(row)] = count
        return images

    def passed(self, rows: int) -> dict[str, int]:
        """What was skipped in the shards, by kind, the most common first."""
        owner, total = self.owners(rows), Counter[str]()
        for number, body in enumerate(self.bodies):
            for row, kinds in body.get("passed", {}).items():
                total.update(kinds if owner[int(row)] == number else {})
        return dict(total.most_common())

    def seconds(self) -> dict[str, float]:
        """Seconds in each stage, summed over all workers."""
        total: Counter[str] = Counter()
        for body in self.bodies:
            total.update(body["stage_seconds"])
        return {stage: round(value, 3) for stage, value in total.items()}


def receipt_name(receipt: Receipt) -> str:
    """The name of a receipt's object, with its counts, so that a listing of the folder shows the progress of a run."""
    rows = sum(end - start for start, end in receipt["rows"])
    part = receipt["part"].removesuffix(PART_SUFFIX)
    return f"{part}.n{rows}.p{receipt['predicted']}.f{receipt['failed']}{RECEIPT_SUFFIX}"


class ReceiptGroups:
    """Copies the receipts of a command into groups, so that a command that continues the run reads them in a few requests.

    Args:
        run: the run.
        size: receipts in a group.
    """

    def __init__(self, run: Run, size: int = RECEIPTS_PER_GROUP) -> None:
        self._staged, self._size = run.staged, size
        self._open: dict[str, Receipt] = {}

    def add(self, receipt: Receipt) -> None:
        """Add the receipt of a staged part; writes a group once it is full."""
        self._open[receipt_name(receipt)] = receipt
        if len(self._open) >= self._size:
            self.write()

    def write(self) -> None:
        """Write what is in no group yet. Without the group each receipt is read by itself, so a failure is only logged."""
        group, self._open = self._open, {}
        if group:
            try:
                self._staged.join(uuid.uuid4().hex + GROUP_SUFFIX).write(seal({"receipts": group}))
            except (OSError, StoreUnavailableError) as error:
                log.warning("a group of receipts could not be written; the run goes on without it: %s", error)


def read_receipts(run: Run, *, each: bool = False) -> Receipts:
    """All receipts of a run. A receipt that does not match its seal counts as missing: its rows are done again.

    Args:
        run: the run.
        each: read every receipt itself, whether a group has it or not.
    """
    names = run.staged.names()
    existing = set(names)
    wanted, groups = ([name for name in names if name.endswith(suffix)] for suffix in (RECEIPT_SUFFIX, GROUP_SUFFIX))
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:

        def read(name: str) -> dict[str, Any] | None:
            return unseal(run.staged.join(name).read())

        def read_group(name: str) -> dict[str, Any] | None:
            with contextlib.suppress(OSError):
                return read(name)
            return None

        found: dict[str, Any] = dict(zip(groups, pool.map(read_group, groups), strict=True))
        for name in [] if each else groups:
            found |= (found[name] or {}).get("receipts", {})
        alone = [name for name in wanted if name not in found]
        found |= zip(alone, pool.map(read, alone), strict=True)
    good = [cast("Receipt", found[name]) for name in wanted if found[name] is not None and found[name]["part"] in existing]
    broken = tuple(name for name in (*wanted, *groups) if found[name] is None)
    return Receipts(tuple(sorted(good, key=lambda body: (body["rows"][0][0], body["part"]))), broken)


def numbered(manifest: pa.Table) -> pa.Table:
    """A manifest with a column `row`, each object's position in it."""
    return manifest.append_column("row", pa.array(np.arange(manifest.num_rows), pa.int64()))


def missing_rows(run: Run, receipts: Receipts) -> pa.Table:
    """The manifest rows that no receipt holds yet, each with its number in a column `row`."""
    rows = numbered(run.manifest)
    return selected(rows, receipts.owners(rows.num_rows) < 0)


def freeze_part_plan(run: Run, receipts: Receipts) -> Receipts:
    """Fix, once and for all, the parts from which a run is published; returns their receipts.

    The first process to put the plan decides. A process that publishes the run later, after a crash or beside a process that
    slept past its lease, writes the same files from the same parts, whatever else was staged in the meantime. A plan that names
    parts which no longer exist is replaced.

    Raises:
        CountsError: an object of the manifest is in no part.
    """
    missing = np.flatnonzero(receipts.owners(run.manifest.num_rows) < 0)
    if len(missing):
        raise CountsError(f"{run.manifest['key'][int(missing[0])]} was listed and is in no part; nothing is published.")
    location = run.staged.join(schema.PLAN)
    wanted: PartPlan = {"parts": [body["part"] for body in receipts.bodies]}
    plan = seal(wanted)
    if location.create(plan):
        return receipts
    current = location.read()
    planned = set((unseal(current) or {"parts": [""]})["parts"])
    kept = Receipts(tuple(body for body in receipts.bodies if body["part"] in planned))
    if len(kept.bodies) == len(planned):
        return kept
    if not location.swap(plan, current):
        raise CountsError(f"Another process is publishing run {run.run_id}; nothing is published.")
    return receipts


class StagedCounts(NamedTuple):
    """How far a run is: objects of the manifest that are done, and the images that were found in them."""

    objects: int
    predicted: int
    failed: int

    def plus(self, receipt: Receipt) -> StagedCounts:
        """The counts with those of one more receipt."""
        done = sum(end - start for start, end in receipt["rows"])
        return StagedCounts(self.objects + done, self.predicted + receipt["predicted"], self.failed + receipt["failed"])

    def counts(self, objects: int) -> dict[str, int]:
        """Counts of images. There are at least as many as objects: a shard's images are known once the shard is read."""
        left = max(0, objects - self.objects)
        return {
            "listed": self.predicted + self.failed + left,
            "predicted": self.predicted,
            "failed": self.failed,
            "left": left,
        }


def count_staged(names: Iterable[str]) -> StagedCounts:
    """Counts from the names of receipts alone. A part that was staged twice counts twice until the run is published."""
    counts = [
        [int(part[1:]) for part in name.removesuffix(RECEIPT_SUFFIX).rsplit(".", 3)[1:]]
        for name in names
        if name.endswith(RECEIPT_SUFFIX)
    ]
    return StagedCounts(*(sum(column) for column in zip(*counts, strict=True))) if counts else StagedCounts(0, 0, 0)
