"""Receipts of an active run, as they come back from the workers -> `progress.json`, rewritten every 2 seconds."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tlbatch import schema
from tlbatch.output.documents import Receipt
from tlbatch.output.receipts import ReceiptGroups, count_staged
from tlbatch.output.run import Run
from tlbatch.storage.retry import no_retries

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
#: The most points of a run's history. When it is full, every other point is dropped.
_HISTORY = 240

#: Called every 2 seconds with the numbers of `progress.json`.
Watcher = Callable[[Mapping[str, Any]], None]

#: Called with what a worker staged: of each part one receipt for each run of the pass, in their order.
Staged = Callable[[Sequence[Receipt]], None]


@contextlib.contextmanager
def heartbeat(runs: Sequence[Run], watch: Watcher | None) -> Iterator[Staged]:
    """Rewrite `progress.json` every 2 seconds while the block runs, and once more when it ends without an error.

    Args:
        runs: the runs of a pass. The progress is that of the first one; the receipts of each are copied into groups.
        watch: called with the numbers of the progress.

    Yields:
        What has to be called with the receipts that workers return.
    """
    stop = threading.Event()
    progress = _Progress(runs, watch)
    thread = threading.Thread(target=progress.beat_until, args=(stop,), name="tlbatch-heartbeat", daemon=True)
    thread.start()
    try:
        yield progress.staged
        progress.beat()
        progress.write_groups()
    except BaseException:
        with no_retries():
            stop.set()
            progress.write_groups()
            thread.join()
        raise
    finally:
        stop.set()
        thread.join()


class _Progress:
    """What is staged of the runs of a pass. Receipts come from one thread, and the numbers are written by another one."""

    def __init__(self, runs: Sequence[Run], watch: Watcher | None) -> None:
        self._run, self._watch = runs[0], watch
        self._groups = [ReceiptGroups(run) for run in runs]
        self._before = self._now = count_staged(self._run.staged.names())
        self._history = read_history(self._run)
        self._began = time.monotonic()

    def staged(self, receipts: Sequence[Receipt]) -> None:
        """Count what a worker staged: of each part one receipt for each run."""
        for receipt, group in zip(receipts, itertools.cycle(self._groups), strict=False):
            group.add(receipt)
        for receipt in receipts[:: len(self._groups)]:
            self._now = self._now.plus(receipt)

    def write_groups(self) -> None:
        """Write the receipts that are in no group yet."""
        for group in self._groups:
            group.write()

    def beat_until(self, stop: threading.Event) -> None:
        """Write the numbers every 2 seconds."""
        while not stop.wait(_HEARTBEAT_SECONDS):
            try:
                self.beat()
            except OSError as error:
                log.warning("%s could not be written; the next update tries again: %s", schema.PROGRESS, error)

    def beat(self) -> None:
        """Write the numbers once."""
        now, before = self._now, self._before
        seconds = time.monotonic() - self._began
        rate = (now.predicted + now.failed - before.predicted - before.failed) / seconds if seconds else 0.0
        counts = now.counts(int(self._run.facts["objects"]))
        left = counts["left"] * (now.predicted + now.failed) / now.objects if now.objects else 0
        numbers = {
            "run_id": self._run.run_id,
            **counts,
            "images_per_second": round(rate, 1),
            "seconds_left": round(left / rate) if rate else None,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        point = [round(time.time(), 1), now.predicted + now.failed]
        self._history = [*self._history[:: 2 if len(self._history) >= _HISTORY else 1], point]
        self._run.location.join(schema.PROGRESS).write(json.dumps({**numbers, "history": self._history}).encode())
        if self._watch is not None:
            self._watch(numbers)


def read_history(run: Run) -> list[list[float]]:
    """Points [seconds since the epoch, images done] of a run; empty if it has no readable `progress.json`."""
    try:
        return list(json.loads(run.location.join(schema.PROGRESS).read()).get("history", []))
    except (FileNotFoundError, ValueError):
        return []
