"""Ray on this machine alone: on the loopback, and without the processes that a run does not need.

`ray.init` starts what a cluster's first machine has: beside what runs tasks a server for the dashboard, an autoscaler and a
reader of log files, each a Python that imports for a second, while the first image waits. It asks for its processes once a
second, too. Here it takes three seconds less to start and to end (2 cores, Ray 2.60). Ray has no setting for it, so while it
starts, three names in it stand for others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import node, ray_constants, utils

_SYSTEM = {
    # The object store is there milliseconds after Ray first asks for it; by default Ray asks again after a second.
    "raylet_client_connect_timeout_milliseconds": 20,
    "raylet_client_num_connect_attempts": 500,
    # Every process would count what it does for a dashboard.
    "enable_metrics_collection": False,
}
_POLL_SECONDS, _POLL_FOR_SECONDS = 0.02, 10.0


def start_local_ray(*, log_to_driver: bool = False, **options: Any) -> None:
    """`ray.init` on this machine, with the options given; its processes end with `ray.shutdown`, or with this one.

    Args:
        log_to_driver: whether what workers print is read from their log files and shown here.
        options: others of `ray.init`.
    """
    _keep_token_private()
    _Node.reads_logs = options["log_to_driver"] = log_to_driver
    with _as_small_as_can_be():
        ray.init(
            address="local", include_dashboard=False, _node_ip_address="127.0.0.1", _system_config=dict(_SYSTEM), **options
        )


class _Node(node.Node):  # type: ignore[misc] # Ray's are of no type
    """The processes of a Ray that is one machine and looked at by nobody."""

    reads_logs = False

    def __init__(self, ray_params: Any, **options: Any) -> None:
        ray_params.no_monitor = True
        ray_params.include_log_monitor = self.reads_logs
        super().__init__(ray_params, **options)

    def start_api_server(self, **_: Any) -> None:
        """Without a dashboard it does nothing but report usage, if that is on."""
        self._webui_url = ""

    def start_ray_processes(self) -> None:
        """Returns when they are there: Ray, which looks next, looks once a second. It also says so if they never are."""
        super().start_ray_processes()
        end = time.monotonic() + _POLL_FOR_SECONDS
        while time.monotonic() < end and not self.get_gcs_client().get_all_node_info(timeout=_POLL_FOR_SECONDS):
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _as_small_as_can_be() -> Iterator[None]:
    """While Ray starts: the processes above, and no look whether a dashboard's libraries are there, by importing them.

    And they listen on 127.0.0.1. An address given to `ray.init` does not do that: Ray replaces it by the machine's, and then
    listens on all of them, unless it takes itself for one that cannot be part of a cluster, as it does on Windows and macOS
    (`get_node_ip_address` in `ray/_private/services.py`).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error
    ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error = False, _Node, lambda: None
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, node.Node, utils.get_dashboard_dependency_error = before


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
