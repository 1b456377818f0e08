"""Ray for the length of a block.

It is the cluster this process runs on or `address` names, else this machine's own: on the loopback, without a dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tlbatch.quiet import stderr_put_away

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
        yield _starts[-1] if _starts else _settle_ray_data
        return
    where = _asked(address)

    def start() -> None:
        if not ray.is_initialized():
            _start(where)
        _settle_ray_data()

    _starts.append(start)
    try:
        yield start
    finally:
        _starts.remove(start)
        ray.shutdown()


def ray_for_good() -> None:
    """Ray for the rest of this process, as `ray_session` starts it, where none runs yet."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        _start(_asked(None))
        _settle_ray_data()


def _asked(address: str | None) -> str:
    """Which cluster is asked for; empty where a Ray of this machine's own is."""
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    return "" if where == "local" else where


def gpus_that_work(start: Callable[[], None], address: str | None, probe: Callable[[], int]) -> bool:
    """Whether the cluster, or this machine, has GPUs that a worker can use.

    Args:
        start: what `ray_session` gave; a Ray on this machine is only started where there is a GPU.
        address: the cluster.
        probe: runs on one of the GPUs and says how many it sees.
    """
    import ray
    from ray._private.accelerators import get_accelerator_manager_for_resource

    here = not (ray.is_initialized() or _asked(address))
    if here and not get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators():
        return False
    start()
    if not ray.cluster_resources().get("GPU"):
        return False
    if ray.get(ray.remote(num_gpus=1, num_cpus=0)(probe).remote()):
        return True
    log.warning("there are GPUs, but TensorFlow does not see them there; install tlbatch[gpu]. The CPUs do the work.")
    return False


def _start(where: str) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log.isEnabledFor(logging.INFO)}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with stderr_put_away():
        if where:
            ray.init(address=where, **options)
        else:
            from tlbatch.localray import start_local_ray

            start_local_ray(**options)
    with contextlib.suppress(ValueError):  # not in the main thread, which alone may
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process with a dump


def _settle_ray_data() -> None:
    """What Ray Data says and how it goes about its work, where its defaults are not for tlbatch."""
    import ray.data
    from ray.data._internal.execution import streaming_executor_state

    # A task that ends wakes Ray Data's loop at once. When none does it looks at everything anew, ten times a second by default,
    # which took about two hundredths of two CPUs away from the model.
    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = 0.5
    context = ray.data.DataContext.get_current()
    # Its bars and its log of every operator are for Ray's developers; tlbatch has a line of its own.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An object's images stay in one block, however many: Ray would cut it at 192 MiB.
    context.target_max_block_size = None
    # What ends a run is raised as well, and said in one sentence.
    logging.getLogger("ray.data").setLevel(logging.INFO if log.isEnabledFor(logging.INFO) else logging.CRITICAL)
