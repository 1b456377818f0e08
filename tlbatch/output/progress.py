"""How far a run is: `progress.json`, rewritten every few seconds while the run is at work."""

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
#: Points of a run's history; when there are as many, every other one goes.
_HISTORY = 240

#: Called every few seconds with the numbers of `progress.json`.
Watcher = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def heartbeat(run: Run, watch: Watcher | None) -> Iterator[None]:
    """Rewrite `progress.json` every few seconds while the block runs, and once after it."""
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
                log.warning("progress could not be written: %s", error)

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
    """[seconds since the epoch, images done] while a run was at work; nothing where nobody kept it."""
    try:
        return list(json.loads(run.location.join(schema.PROGRESS).read()).get("history", []))
    except (FileNotFoundError, ValueError):
        return []
