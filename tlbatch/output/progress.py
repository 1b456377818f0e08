"""Receipts of an active run -> `progress.json`, rewritten every 2 seconds."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tlbatch import schema
from tlbatch.output.receipts import count_staged
from tlbatch.output.run import Run
from tlbatch.storage.retry import no_retries

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 2.0
#: The most points of a run's history. When it is full, every other point is dropped.
_HISTORY = 240

#: Called every 2 seconds with the numbers of `progress.json`.
Watcher = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def heartbeat(run: Run, watch: Watcher | None) -> Iterator[None]:
    """Rewrite `progress.json` every 2 seconds while the block runs, and once more when it ends without an error."""
    stop = threading.Event()
    began = time.monotonic()
    objects = int(run.facts["objects"])
    before = count_staged(run.staged.names())
    history = read_history(run)

    def beat() -> None:
        nonlocal history
        now = count_staged(run.staged.names())
        seconds = time.monotonic() - began
        rate = (now.predicted + now.failed - before.predicted - before.failed) / seconds if seconds else 0.0
        counts = now.counts(objects)
        left = counts["left"] * (now.predicted + now.failed) / now.objects if now.objects else 0
        numbers = {
            "run_id": run.run_id,
            **counts,
            "images_per_second": round(rate, 1),
            "seconds_left": round(left / rate) if rate else None,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        history = [*history[:: 2 if len(history) >= _HISTORY else 1], [round(time.time(), 1), now.predicted + now.failed]]
        run.location.join(schema.PROGRESS).write(json.dumps({**numbers, "history": history}).encode())
        if watch is not None:
            watch(numbers)

    def loop() -> None:
        while not stop.wait(_HEARTBEAT_SECONDS):
            try:
                beat()
            except OSError as error:
                log.warning("%s could not be written; the next update tries again: %s", schema.PROGRESS, error)

    thread = threading.Thread(target=loop, name="tlbatch-heartbeat", daemon=True)
    thread.start()
    try:
        yield
        beat()
    except BaseException:
        with no_retries():
            stop.set()
            thread.join()
        raise
    finally:
        stop.set()
        thread.join()


def read_history(run: Run) -> list[list[float]]:
    """Points [seconds since the epoch, images done] of a run; empty if it has no readable `progress.json`."""
    try:
        return list(json.loads(run.location.join(schema.PROGRESS).read()).get("history", []))
    except (FileNotFoundError, ValueError):
        return []
