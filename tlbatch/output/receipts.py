"""Receipts of staged parts -> what is done and what is left.

Everything is computed from the manifest and the receipts. Nothing else remembers progress, so nothing can disagree with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import CountsError
from tlbatch.output.documents import PartPlan, Receipt
from tlbatch.output.run import READS_AT_ONCE, Run
from tlbatch.schema import RECEIPT_SUFFIX, seal, unseal


@dataclass(frozen=True)
class Receipts:
    """The receipts of a run, in the order of their first row; `broken` names those that do not match their seal."""

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


def read_receipts(run: Run) -> Receipts:
    """All receipts of a run. A receipt that does not match its seal counts as missing: its rows are done again."""
    names = run.staged.names()
    existing = set(names)
    wanted = [name for name in names if name.endswith(RECEIPT_SUFFIX)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        bodies = list(pool.map(lambda name: unseal(run.staged.join(name).read()), wanted))
    good = [cast("Receipt", body) for body in bodies if body is not None and body["part"] in existing]
    broken = tuple(name for name, body in zip(wanted, bodies, strict=True) if body is None)
    return Receipts(tuple(sorted(good, key=lambda body: (body["rows"][0][0], body["part"]))), broken)


def numbered(manifest: pa.Table) -> pa.Table:
    """A manifest with a column `row`, each object's position in it."""
    return manifest.append_column("row", pa.array(np.arange(manifest.num_rows), pa.int64()))


def missing_rows(run: Run, receipts: Receipts) -> pa.Table:
    """The manifest rows that no receipt holds yet, each with its number in a column `row`."""
    rows = numbered(run.manifest)
    images = receipts.images(rows.num_rows)
    return rows.filter(pa.array(images == 0)) if images.any() else rows


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
