"""Images that kill or hang their worker -> rows with kind `worker_lost`, while the rest of the run continues.

Ray restarts a dead worker and gives it the same block, without limit. So a restarted worker processes its first blocks in
isolation mode: image by image, with a mark in the store for the image that it works on. An image that two workers marked before
they died is not tried a third time. A watchdog ends a worker that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import pyarrow as pa

from tlbatch.errors import ErrorKind, Failure
from tlbatch.storage.location import Location

#: Deaths of a worker alone with an image after which the image is not tried again. One death may be the machine's fault.
MAX_DEATHS = 2

#: Blocks that a restarted worker processes in isolation mode: those it had when it died, and some more.
_ISOLATED_BLOCKS = 8


class Quarantine:
    """The marks of a run: one file for each time that a worker is, or was when it died, alone with an image."""

    def __init__(self, location: Location) -> None:
        self._location = location

    def failure_of(self, row: int, index: int) -> Failure | None:
        """The failure of an image that `MAX_DEATHS` workers were alone with when they died; None if it may be tried."""
        marks = [name for name in self._location.names() if name.startswith(_mark_prefix(row, index))]
        if len(marks) < MAX_DEATHS:
            return None
        stage = Counter(self._location.join(name).read().decode() for name in marks).most_common(1)[0][0]
        message = f"{len(marks)} workers died or hung while they processed this image alone"
        return Failure(stage, ErrorKind.WORKER_LOST, message, len(marks))

    @contextlib.contextmanager
    def isolated(self, row: int, index: int, stage: str) -> Iterator[None]:
        """Mark the image while the block runs. An exception removes the mark, because it is not a death."""
        mark = self._location.join(_mark_prefix(row, index) + uuid.uuid4().hex[:12])
        mark.write(stage.encode())
        try:
            yield
        finally:
            mark.unlink()


def _mark_prefix(row: int, index: int) -> str:
    """The beginning of the names of an image's marks: its row in the manifest and its index in the shard."""
    return f"{row:012d}-{index:08d}."


class Watchdog:
    """Ends the process if a step takes too long, even if the step never releases Python's lock.

    A thread restarts a timer of `faulthandler`, which needs no lock, as long as no running step is older than `limit` seconds.
    A step that hangs in C with the lock stops the thread. A step that hangs without the lock makes the thread stop
    restarting the timer. In both cases the timer expires, and the process exits after all tracebacks were written to its log.
    """

    def __init__(self, limit: float, period: float = 5.0) -> None:
        self._limit = limit
        self._period = period
        self._started: dict[int, float] = {}
        self._numbers = itertools.count()
        threading.Thread(target=self._restart_timer, name="tlbatch-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block as one step."""
        number = next(self._numbers)
        self._started[number] = time.monotonic()
        try:
            yield
        finally:
            del self._started[number]

    def _restart_timer(self) -> None:
        while True:
            oldest = min(self._started.copy().values(), default=time.monotonic())
            if time.monotonic() - oldest < self._limit:
                faulthandler.dump_traceback_later(3 * self._period, exit=True)
            time.sleep(self._period)


class IsolationMode:
    """Decides whether a worker processes a block image by image: after a restart, because one of the first images killed it."""

    def __init__(self, *, after_a_death: bool) -> None:
        self._blocks_left = _ISOLATED_BLOCKS if after_a_death else 0
        self._lock = threading.Lock()

    def run(self, *, isolated: Callable[[], pa.Table], normal: Callable[[], pa.Table]) -> pa.Table:
        """Process one block: with `isolated` in isolation mode, in one thread at a time, otherwise with `normal`."""
        with self._lock:
            if self._blocks_left:
                self._blocks_left -= 1
                return isolated()
        return normal()
