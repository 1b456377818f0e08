"""Ray on this machine only: on the loopback interface, and without the processes that a run does not need.

`ray.init` starts everything that the head of a cluster needs. Besides the processes that run tasks, these are a server for the
dashboard, an autoscaler and a reader of log files. Each is a Python process that imports for a second while the first image
waits. `ray.init` also polls for its processes only once a second. Without all this, Ray takes three seconds less to start and
to end (2 cores, Ray 2.60). Ray has no setting for it, so three of its private names are replaced while it starts. If a private
name is missing, a plain `ray.init` starts everything.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from tlbatch.errors import ConfigError

log = logging.getLogger(__name__)

_SYSTEM = {
    # The object store exists milliseconds after Ray first asks for it; by default Ray asks again after a second.
    "raylet_client_connect_timeout_milliseconds": 20,
    "raylet_client_num_connect_attempts": 500,
    # Otherwise every process counts its work for a dashboard.
    "enable_metrics_collection": False,
}
_POLL_SECONDS, _POLL_FOR_SECONDS = 0.02, 10.0


def start_local_ray(*, log_to_driver: bool = False, **options: Any) -> None:
    """`ray.init` on this machine. Its processes end with `ray.shutdown`, or with this process.

    Args:
        log_to_driver: whether the output of workers is read from their log files and printed here.
        options: other options of `ray.init`.
    """
    _keep_token_private()
    options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    options["log_to_driver"] = log_to_driver
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_reduced_ray(log_to_driver))
            options["_system_config"] = dict(_SYSTEM)
        except (ImportError, AttributeError, TypeError) as error:
            _warn_once(str(error))
        ray.init(**options)


def end_local_ray() -> None:
    """`ray.shutdown`, and the end of every worker on this machine: one that hangs would hold a CPU and its memory for hours.

    Seen of Ray 2.60: a worker that had lost its machine's raylet did not come out of its own handler of fatal signals.
    """
    import psutil  # part of Ray

    workers: list[psutil.Process] = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            workers += process.children(recursive=True) if process.name() == "raylet" else []
    ray.shutdown()
    for worker in workers:
        with contextlib.suppress(psutil.Error):  # most have ended
            worker.kill()


@functools.cache
def _warn_once(missing: str) -> None:
    log.warning(
        "Ray %s is not the version that tlbatch was tested with (%s): it starts more slowly and listens on all network "
        "interfaces, not only on 127.0.0.1. Install the Ray version that tlbatch requires.",
        ray.__version__,
        missing,
    )


@contextlib.contextmanager
def _reduced_ray(reads_logs: bool) -> Iterator[None]:
    """While Ray starts: start fewer processes, those without a dashboard's parts, and listen only on 127.0.0.1.

    An address given to `ray.init` is not enough: Ray replaces 127.0.0.1 with the address of the machine and then listens on all
    interfaces, unless it assumes that it cannot be part of a cluster, as on Windows and macOS (`get_node_ip_address` in
    `ray/_private/services.py`).

    Raises:
        ImportError, AttributeError, TypeError: a private name of Ray is missing or is of another kind. Nothing was replaced.
    """
    from ray._private import node, ray_constants, utils

    before = ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error
    reduced = _reduced_node(node.Node, reads_logs)
    ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error = False, reduced, _no_dashboard
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error = before


def _no_dashboard() -> ImportError:
    """What Ray finds where its dashboard's libraries are not installed: its agent then has no server and reports nothing."""
    return ImportError("no dashboard")


def _reduced_node(node: Any, reads_logs: bool) -> Any:
    """Ray's class `Node`, which starts the processes of a machine, for a cluster of one machine without a dashboard."""

    class ReducedNode(node):  # type: ignore[misc] # Ray has no types
        def __init__(self, ray_params: Any, *arguments: Any, **options: Any) -> None:
            ray_params.no_monitor = True
            ray_params.include_log_monitor = reads_logs
            super().__init__(ray_params, *arguments, **options)

        def start_api_server(self, *_: Any, **__: Any) -> None:
            """Start no server: without a dashboard it only reports usage, if that is enabled."""
            self._webui_url = ""

        def start_ray_processes(self) -> None:
            """Return as soon as the processes run. Ray checks next, once a second, and raises if they never run."""
            super().start_ray_processes()
            end = time.monotonic() + _POLL_FOR_SECONDS
            with contextlib.suppress(AttributeError, TypeError):  # the wait saves time, and Ray waits as well
                while time.monotonic() < end and not self.get_gcs_client().get_all_node_info(timeout=_POLL_FOR_SECONDS):
                    time.sleep(_POLL_SECONDS)

    return ReducedNode


def _keep_token_private() -> None:
    """Create Ray's token file so that only its owner can read it; without a home folder, a token for this process alone.

    A user with the token can run code as this user, and a token file that Ray creates is readable by all users of the machine.

    Raises:
        ConfigError: the user names a file of a token that cannot be read.
    """
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given is not None:
        _require_token(Path(given))
        return
    try:
        token = Path.home() / ".ray" / "auth_token"
        _create_token(token)
        token.read_bytes()
    except (OSError, RuntimeError):  # no home folder, as for a user of a container whom no list of users knows
        # Ray's processes inherit the variable, and only this user can read their environment.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _require_token(path: Path) -> None:
    try:
        found = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {path}: {error.strerror}. Name a file with a token, or unset it.") from None
    if not found:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {path}, which is empty. Name a file with a token, or unset it.")


def _create_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # only its owner can read it
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another command was faster
                os.link(file.name, path)
    with contextlib.suppress(PermissionError):  # it is somebody else's, for instance mounted
        path.chmod(0o600)
