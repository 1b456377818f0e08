"""A command that ran here -> the same command as a job on a Ray cluster.

Its configuration is checked here and travels as a file, with this tlbatch unless the cluster has it installed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel

import tlbatch
from tlbatch.config import SubmitConfig
from tlbatch.errors import ClusterError, UnfinishedError
from tlbatch.execution.jobs import Say, run_job

#: The file in which the job finds its configuration.
JOB_FILE = "job.yaml"


def submit(config: SubmitConfig, verb: str, settings: BaseModel, flags: Sequence[str], say: Say) -> dict[str, Any]:
    """Run a verb as a job on a cluster.

    Args:
        config: which cluster, and how.
        verb: such as classify.
        settings: its configuration, already checked.
        flags: further words for it: --json, --verbose.
        say: takes the job's log while it is followed.

    Returns:
        `job`, its name; `address`; and, if it was followed, `status` and `exit_code`.

    Raises:
        ClusterError: the cluster has no such name, refuses the caller, or accepts jobs from everybody.
        UnfinishedError: it does not answer.
    """
    if not config.insecure_cluster:
        require_locked(config.address)
    words = ["python", "-m", "tlbatch", verb, "--config", JOB_FILE, *flags]
    with tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder), settings, installed=config.installed)
        follow = say if config.follow else None
        return run_job(config.address, words, Path(folder), follow, trusted=not config.insecure_cluster)


def require_locked(address: str) -> None:
    """Raises ClusterError where a cluster off this machine takes jobs from anybody."""
    host = urlsplit(address).hostname or ""
    if _is_this_machine(host):
        return
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=20).close()  # noqa: S310 - http(s), checked
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise ClusterError(f"The cluster at {address} answers with {error.code} {error.reason}.") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        kind = ClusterError if isinstance(reason, socket.gaierror) else UnfinishedError
        raise kind(f"The cluster at {address} cannot be reached: {reason}.") from None
    raise ClusterError(
        f"The cluster at {address} takes jobs from anybody who reaches it. Start it with RAY_AUTH_MODE=token, or say "
        "--insecure-cluster if nobody else does."
    )


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _pack(folder: Path, settings: BaseModel, *, installed: bool) -> None:
    """The job's folder: its configuration and, unless the cluster has it installed, this tlbatch."""
    given = settings.model_dump(mode="json", exclude_unset=True)
    (folder / JOB_FILE).write_text(yaml.safe_dump(given, sort_keys=False))
    if installed:
        return
    package = Path(tlbatch.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / "tlbatch.dist-info"  # by it the job knows which version it runs
    about.mkdir()
    (about / "METADATA").write_text(distribution("tlbatch").read_text("METADATA") or "")
