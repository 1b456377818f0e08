"""Ray for the length of a block, started while the block's first steps still read, list and load.

It is the cluster this process runs on or `address` names, else this machine's own: on the loopback, without a dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tlbatch.quiet import stderr_put_away

log = logging.getLogger(__name__)

_LOCAL = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}

#: Ray's processes die with the thread that started them, so this one starts and ends them all, one after the other.
_thread = ThreadPoolExecutor(1, thread_name_prefix="tlbatch-ray")
#: What waits for the session that is open in this process, if one is.
_waits: list[Callable[[], None]] = []
#: The end of the last session, which nobody waited for.
_ending: list[Future[None]] = []


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[Callable[[], None]]:
    """Start Ray beside the block; what the block is given waits until Ray is there.

    A session, or a Ray, that runs in this process already is used and left running. After the block Ray ends beside what
    comes next.

    Args:
        address: the cluster, as `ray.init` takes it; by default `RAY_ADDRESS`, which Ray Jobs sets, or this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    import ray

    while _ending:
        _ending.pop().result()
    if _waits or ray.is_initialized():
        yield _waits[-1] if _waits else _quiet_ray_data
        return
    where = address or os.environ.get("RAY_ADDRESS")
    started = _thread.submit(_start, {"address": where} if where else _LOCAL)
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def wait() -> None:
        started.result()
        with contextlib.suppress(ValueError):  # not in the main thread, which alone may
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process with a dump
        _quiet_ray_data()

    _waits.append(wait)
    try:
        yield wait
    finally:
        _waits.remove(wait)
        _ending.append(_thread.submit(ray.shutdown))


def _start(where: dict[str, Any]) -> None:
    import ray
    import ray.data

    with stderr_put_away():
        ray.init(**where, logging_level=logging.ERROR, log_to_driver=log.isEnabledFor(logging.INFO))


def _quiet_ray_data() -> None:
    """Ray's bars and its log of every operator are for Ray's developers; tlbatch has a line of its own."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What ends a run is raised as well, and said in one sentence.
    logging.getLogger("ray.data").setLevel(logging.INFO if log.isEnabledFor(logging.INFO) else logging.CRITICAL)
