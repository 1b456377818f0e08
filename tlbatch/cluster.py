"""A command that ran here -> the same command as a job on a Ray cluster, through Ray's Jobs API.

Its configuration is checked here and travels as a file; credentials do not travel: each node finds its own. The job goes on
when whoever submitted it has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel

import tlbatch
from tlbatch.config import SubmitConfig
from tlbatch.errors import ClusterError, InterruptedRunError, UnfinishedError
from tlbatch.quiet import stderr_put_away

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

#: What the job finds its configuration in.
JOB_FILE = "job.yaml"
#: Seconds between two looks at a job that says nothing, and for which a cluster may not answer while it is followed.
_PAUSE, _PATIENCE = 2.0, 300.0

#: Prints a piece of a job's log.
Say = Callable[[str], None]


def submit(config: SubmitConfig, verb: str, settings: BaseModel, flags: Sequence[str], say: Say) -> dict[str, Any]:
    """Run a verb as a job on a cluster.

    Args:
        config: which cluster, and how.
        verb: such as classify.
        settings: its configuration, already checked.
        flags: further words for it: --json, --verbose.
        say: takes the job's log while it is followed.

    Returns:
        `job`, its name; `address`; and, where it was followed, `status` and `exit_code`.

    Raises:
        ClusterError: the cluster cannot be reached, does not know who is asking, or lets in everybody.
    """
    if not config.insecure_cluster:
        require_locked(config.address)
    with _as_clusters_error(config.address), tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder), settings, installed=config.installed)
        client = _client(config.address)
        # The client's log tells what it uploads.
        words = ["python", "-m", "tlbatch", verb, "--config", JOB_FILE, *flags]
        with stderr_put_away():
            job = client.submit_job(entrypoint=shlex.join(words), runtime_env={"working_dir": folder})
    result: dict[str, Any] = {"job": job, "address": config.address}
    return {**result, **_follow(client, job, say)} if config.follow else result


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
        raise ClusterError(f"The cluster at {address} cannot be reached: {getattr(error, 'reason', error)}.") from None
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


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # they tell of every package and connection
    # Ray lets these win over what it is given.
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ.update(hidden)


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


def _follow(client: JobSubmissionClient, job: str, say: Say) -> dict[str, Any]:
    """Say what the job logs until it ends, over any number of lost connections; how it ended."""
    said = 0
    last_answer = time.monotonic()
    while True:
        try:
            said = asyncio.run(_tail(client, job, said, say))
            info = client.get_job_info(job)
            last_answer = time.monotonic()
            if info.status.is_terminal():
                said = _rest(client, job, said, say)
                return {"status": str(info.status), "exit_code": _exit_code(str(info.status), info.driver_exit_code)}
        except KeyboardInterrupt:
            raise InterruptedRunError(f"Job {job} goes on; `ray job stop {job}` stops it.") from None
        except (RuntimeError, OSError) as error:
            if time.monotonic() - last_answer > _PATIENCE:
                raise ClusterError(f"Job {job} is followed no longer, the cluster does not answer: {error}") from None
        time.sleep(_PAUSE)


async def _tail(client: JobSubmissionClient, job: str, said: int, say: Say) -> int:
    """Ray sends the log from its beginning; what was said before a connection was lost is passed over."""
    seen = 0
    async for piece in client.tail_job_logs(job):
        seen += len(piece)
        if seen > said:
            say(piece[-(seen - said) :])
            said = seen
    return said


def _rest(client: JobSubmissionClient, job: str, said: int, say: Say) -> int:
    logs = client.get_job_logs(job)
    if len(logs) > said:
        say(logs[said:])
    return len(logs)


def _exit_code(status: str, code: int | None) -> int:
    """The job's own; a driver that was killed, or stopped, is one to run again."""
    if status == "SUCCEEDED":
        return 0
    return code if code is not None and code > 0 else UnfinishedError.exit_code


@contextlib.contextmanager
def _as_clusters_error(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, ConnectionError, socket.gaierror, RayError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(f"The cluster at {address} did not take the job: {first}") from None
