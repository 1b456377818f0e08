"""Ray for the length of a block: an existing cluster, or one on this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tlbatch.execution.resources import cluster_address, configure_ray_data
from tlbatch.stdio import native_stderr_captured

log = logging.getLogger(__name__)

#: What starts the session that is open in this process, if one is.
_starts: list[Callable[[], None]] = []


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[Callable[[], None]]:
    """Ray for the length of a block, started when the block first calls what it is given.

    A session, or a Ray, that runs in this process already is used and left running. Ray starts and ends in the thread that
    asks: ended from a thread beside the work, it took the whole process with it, without a word, in half of the runs.

    Args:
        address: the cluster, as `ray.init` takes it; by default `RAY_ADDRESS`, which Ray Jobs sets, or this machine (`local`).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    import ray

    if _starts or ray.is_initialized():
        yield _starts[-1] if _starts else configure_ray_data
        return
    where = cluster_address(address)

    def start() -> None:
        if not ray.is_initialized():
            _start(where)
        configure_ray_data()

    _starts.append(start)
    try:
        yield start
    finally:
        _starts.remove(start)
        ray.shutdown()


def start_ray_for_process() -> None:
    """Ray for the rest of this process, as `ray_session` starts it, where none runs yet."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        _start(cluster_address(None))
        configure_ray_data()


def _start(where: str) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log.isEnabledFor(logging.INFO)}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with native_stderr_captured():
        if where:
            ray.init(address=where, **options)
        else:
            from tlbatch.execution.local_ray import start_local_ray

            start_local_ray(**options)
    with contextlib.suppress(ValueError):  # not in the main thread, which alone may
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process with a dump
