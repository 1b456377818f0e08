"""Ray for the length of a block.

It is the cluster this process runs on or `address` names, else this machine's own: on the loopback, without a dashboard.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tlbatch.quiet import stderr_put_away

log = logging.getLogger(__name__)

_LOCAL = {
    "address": "local",
    "include_dashboard": False,
    "_node_ip_address": "127.0.0.1",
    # By default Ray ends a process that was idle for a second when there are more of them than CPUs. On two CPUs each write
    # task then started its own, which took a quarter of the actors' time.
    "_system_config": {"num_workers_soft_limit": 16},
}

#: Processes that import ahead, one for an actor and one for write tasks, and the tasks they do it in.
_WARM = 2
_warm: list[Any] = []

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
        yield _starts[-1] if _starts else _quiet_ray_data
        return
    where = _asked(address)

    def start() -> None:
        if not ray.is_initialized():
            _start(where)
            if not where:
                warm = ray.remote(num_cpus=0)(_import_ahead)
                _warm.extend(warm.remote() for _ in range(_WARM))
        _quiet_ray_data()

    _starts.append(start)
    try:
        yield start
    finally:
        _starts.remove(start)
        _warm.clear()
        ray.shutdown()


def ray_for_good() -> None:
    """Ray for the rest of this process, as `ray_session` starts it, where none runs yet."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        _start(_asked(None))
        _quiet_ray_data()


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

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if not where:
            _keep_token_private()
            stack.enter_context(_on_the_loopback())
        stack.enter_context(stderr_put_away())
        asked: dict[str, Any] = {"address": where} if where else _LOCAL
        ray.init(**asked, logging_level=logging.ERROR, log_to_driver=log.isEnabledFor(logging.INFO))
    with contextlib.suppress(ValueError):  # not in the main thread, which alone may
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process with a dump


def _keep_token_private() -> None:
    """Who has Ray's token may run code as this user, and Ray's own file of it may be read by all users of the machine."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    # Where there is no home, or none that can be written, Ray says what it makes of that.
    with contextlib.suppress(OSError, RuntimeError):
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # only its owner can read it
                file.write(secrets.token_hex(32))
                file.flush()
                with contextlib.suppress(FileExistsError):  # another command was faster
                    os.link(file.name, path)
        path.chmod(0o600)


@contextlib.contextmanager
def _on_the_loopback() -> Iterator[None]:
    """While Ray starts: its processes listen on 127.0.0.1. An address given to `ray.init` does not do that.

    Ray replaces 127.0.0.1 by the machine's address, and then listens on all of them, unless it takes itself for one that
    cannot be part of a cluster, as it does on Windows and macOS (`get_node_ip_address` in `ray/_private/services.py`).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _import_ahead() -> None:
    """In two of Ray's processes, while the driver still works: what an actor and a write task are going to import."""
    importlib.import_module("tlbatch.pipeline")
    importlib.import_module("openvino")


def _quiet_ray_data() -> None:
    """Ray's bars and its log of every operator are for Ray's developers; tlbatch has a line of its own."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An object's images stay in one block, however many: Ray would cut it at 192 MiB.
    context.target_max_block_size = None
    # What ends a run is raised as well, and said in one sentence.
    logging.getLogger("ray.data").setLevel(logging.INFO if log.isEnabledFor(logging.INFO) else logging.CRITICAL)
