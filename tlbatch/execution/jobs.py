"""A packed command as a job on a Ray cluster, through Ray's Jobs API: submit it, and follow its log.

Credentials do not travel: each node finds its own. The job continues after the submitting process has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlbatch.errors import ClusterError, InterruptedRunError, UnfinishedError, line_of
from tlbatch.execution.resources import send_token
from tlbatch.stdio import native_stderr_captured

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

#: Seconds between two requests for the state of a silent job, and seconds without an answer after which following stops.
_PAUSE, _PATIENCE = 2.0, 300.0

#: Prints a piece of a job's log.
Say = Callable[[str], None]


def run_job(address: str, words: Sequence[str], folder: Path, say: Say | None, *, trusted: bool = True) -> dict[str, Any]:
    """Submit a command with a folder of files, and follow it if `say` is given.

    Args:
        address: where the cluster takes jobs.
        words: the command.
        folder: its working directory.
        say: takes the job's log.
        trusted: whether the cluster gets the token that this user has, if there is one.

    Returns:
        `job`, its name; `address`; and, if it was followed, `status` and `exit_code`.

    Raises:
        ClusterError: the cluster has no such name, or refuses the job.
        UnfinishedError: it does not answer.
    """
    if trusted:
        send_token()
    with _cluster_errors(address):
        client = _client(address)
        with native_stderr_captured():  # the client's log lists what it uploads
            job = client.submit_job(entrypoint=shlex.join(words), runtime_env={"working_dir": str(folder)})
    result: dict[str, Any] = {"job": job, "address": address}
    return result if say is None else {**result, **_follow(client, job, say)}


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # they log every package and connection
    # Ray prefers these variables to the address it is given.
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ.update(hidden)


def _follow(client: JobSubmissionClient, job: str, say: Say) -> dict[str, Any]:
    """Print what the job logs until it ends, across lost connections; returns how it ended."""
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
            raise InterruptedRunError(f"Job {job} continues; `ray job stop {job}` stops it.") from None
        except (RuntimeError, OSError) as error:
            if time.monotonic() - last_answer > _PATIENCE:
                raise UnfinishedError(
                    f"The cluster does not answer: {error}. Job {job} may go on; follow it with `ray job logs -f {job}`."
                ) from None
        time.sleep(_PAUSE)


async def _tail(client: JobSubmissionClient, job: str, said: int, say: Say) -> int:
    """Ray sends the log from its beginning; what was printed before a connection was lost is skipped."""
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
    """The job's own exit code; a driver that was killed or stopped is to be run again."""
    if status == "SUCCEEDED":
        return 0
    return code if code is not None and code > 0 else UnfinishedError.exit_code


@contextlib.contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"The cluster at {address} did not take the job: {line_of(error)}. Put the token that the cluster was started "
            "with into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
        ) from None
    except (RuntimeError, ConnectionError, socket.gaierror, RayError) as error:
        kind = UnfinishedError if isinstance(error, ConnectionError) else ClusterError
        raise kind(f"The cluster at {address} did not take the job: {line_of(error)}.") from None
