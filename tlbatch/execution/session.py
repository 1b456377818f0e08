"""Ray for the length of a block: an existing cluster, or one on this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tlbatch import signals
from tlbatch.errors import TlbatchError, UnfinishedError, line_of
from tlbatch.execution.ray_errors import connection_error, require_address, require_answer
from tlbatch.execution.resources import cluster_address, configure_ray_data
from tlbatch.stdio import native_stderr_captured

log = logging.getLogger(__name__)

#: The function that starts the open session of this process; empty if no session is open.
_starts: list[Callable[[], None]] = []


@contextlib.contextmanager
def ray_session(address: str | None = None) -> Iterator[Callable[[], None]]:
    """Ray for the length of a block. The block gets a function, whose first call starts Ray.

    A session, or a Ray, that already runs in this process is used and left running. Ray starts and ends in the calling thread:
    when another thread ended it, the whole process ended without a message in half of the runs.

    Args:
        address: the cluster, as in `ray.init`. The default is `RAY_ADDRESS`, which Ray Jobs sets, or this machine (`local`).

    Raises:
        ClusterError: the address is none, or what is there refuses this process.
        UnfinishedError: nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    import ray

    if _starts or ray.is_initialized():
        yield _starts[-1] if _starts else configure_ray_data
        return
    where = require_address(cluster_address(address))

    def start() -> None:
        if not ray.is_initialized():
            _start(where)
        configure_ray_data()

    _starts.append(start)
    try:
        yield start
    finally:
        _starts.remove(start)
        if not signals.came():  # else the command ends at once, see `cli/main.py`, and Ray's processes with it
            with signals.held_back():
                _end(where)


def _end(where: str) -> None:
    import ray

    from tlbatch.execution.local_ray import end_local_ray

    if where:
        ray.shutdown()
    else:
        end_local_ray()


def start_ray_for_process() -> None:
    """Start Ray for the rest of this process, like `ray_session`, unless it already runs."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        _start(require_address(cluster_address(None)))
        configure_ray_data()


def _cluster_error(where: str, options: dict[str, Any]) -> TlbatchError | None:
    import ray

    return connection_error(where, lambda: ray.init(address=where, **options))


def _local_start_error(options: dict[str, Any]) -> UnfinishedError | None:
    """Start Ray on this machine; returns why that failed, so that the caller can drop what Ray printed meanwhile."""
    from tlbatch.execution.local_ray import start_local_ray

    try:
        start_local_ray(**options)
    except TlbatchError:
        raise
    except Exception as error:  # Ray raises plain `Exception` if its processes do not come up
        return UnfinishedError(
            f"Ray did not start on this machine: {line_of(error)}. Its logs are in RAY_TMPDIR, or else /tmp/ray, below "
            "session_latest/logs; run the same command again when the cause is gone."
        )
    return None


def _start(where: str) -> None:
    if where:
        require_answer(where)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log.isEnabledFor(logging.INFO)}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Half a start cannot be ended: processes of Ray would stay, or its threads would end this process with a dump.
    with signals.held_back(), native_stderr_captured():
        refused = _cluster_error(where, options) if where else _local_start_error(options)
    with contextlib.suppress(ValueError):  # only the main thread may set a handler
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process with a stack dump
    if refused is not None:
        raise refused
