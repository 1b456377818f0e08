"""The address of a cluster, and exceptions of Ray -> errors of tlbatch, in one sentence."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator

from tlbatch import errors
from tlbatch.errors import ClusterError, InterruptedRunError, StoreUnavailableError, TlbatchError, UnfinishedError, line_of

#: Seconds for which a cluster may not answer: its head may be starting. Ray then waits half a minute for an answer of its own.
_PATIENCE = 20.0
#: What a client of HTTP/2, and so of gRPC, sends first; the first frame of the server's answer has the type SETTINGS.
_GREETING, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), 4
#: How many seconds Ray tries to reach a cluster once something listens there; each attempt lasts up to half a minute.
_ATTEMPTS = "RAY_gcs_server_port_wait_time_s"
_EXAMPLE = "the address of the cluster's head, such as 10.0.0.5:6379, or `local` for this machine"
_NO_HEAD = "what listens there is not the head of a Ray cluster"
_HINT = "If the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."


def require_address(where: str) -> str:
    """An address of a cluster, or nothing, unchanged.

    Raises:
        ClusterError: Ray cannot use it.
    """
    if where.startswith(("http://", "https://")):
        raise ClusterError(
            f"address or RAY_ADDRESS is {where}, where a cluster takes jobs. Write {_EXAMPLE}; or send this command as a job: "
            f"tlbatch submit --address {where} ..."
        )
    if where and where != "auto" and _host_and_port(where) is None:
        raise ClusterError(f"address or RAY_ADDRESS is {where!r}. Write {_EXAMPLE}.")
    return where


def require_answer(where: str) -> None:
    """Wait until something answers at the address of a cluster; Ray itself would wait for many minutes.

    Raises:
        ClusterError: there is no such host, or it is not Ray that answers.
        UnfinishedError: nothing answers.
    """
    found = _host_and_port(where)
    if found is None:
        return
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            answer = _first_answer(found)
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise ClusterError(f"address or RAY_ADDRESS is {where}: there is no such host ({error.strerror}).") from None
            if time.monotonic() > end:
                raise UnfinishedError(
                    f"The cluster at {where} (address or RAY_ADDRESS) does not answer: {error.strerror or error}. Start it, or "
                    "correct the address, and run the same command again."
                ) from None
            time.sleep(1)
        else:
            if answer[3] != _SETTINGS:
                raise ClusterError(f"address or RAY_ADDRESS is {where}: {_NO_HEAD}. Write {_EXAMPLE}.")
            return


def _first_answer(found: tuple[str, int]) -> bytes:
    """The head of the first frame that a server of gRPC sends."""
    with socket.create_connection(found, timeout=_PATIENCE / 2) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return bytes((0, 0, 0, _SETTINGS))  # it cannot be asked in plain text
        connection.sendall(_GREETING)
        answer = b""
        while len(answer) <= 3:
            more = connection.recv(9)
            if not more:
                raise ConnectionResetError("it closes the connection")
            answer += more
        return answer


def connection_error(where: str, connect: Callable[[], object]) -> ClusterError | UnfinishedError | None:
    """Connect to a cluster in one attempt; returns why that failed, so that the caller can drop what Ray printed meanwhile."""
    given = os.environ.get(_ATTEMPTS)
    os.environ[_ATTEMPTS] = given or "1"
    try:
        with warnings.catch_warnings(action="ignore"):
            connect()
    except Exception as error:  # Ray raises errors of many kinds, some of them plain `Exception`
        if where == "auto" and isinstance(error, ConnectionError):
            return UnfinishedError(
                "address or RAY_ADDRESS is auto, and no cluster runs on this machine. Start it, or leave the address out, and "
                "run the same command again."
            )
        return ClusterError(f"The cluster at {where} (address or RAY_ADDRESS) cannot be used: {_reason(error)} {_HINT}")
    finally:
        if given is None:
            del os.environ[_ATTEMPTS]
    return None


def _reason(error: BaseException) -> str:
    """The first line of what Ray says. "Failed to connect" says nothing: there is something else, or it refuses us."""
    line = line_of(error)
    if isinstance(error, ConnectionError) or line.endswith("(most recent call last):"):
        return f"{_NO_HEAD}, or does not let this process in."
    return f"{line}."


def _host_and_port(where: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+):(\d{1,5})/?", where)
    if match is None or not 0 < int(match[2]) < 65536:
        return None
    return match[1].strip("[]"), int(match[2])


@contextlib.contextmanager
def errors_say_how_to_continue(run_id: str) -> Iterator[None]:
    """Turn Ctrl-C, and a store that fails while the block runs, into errors that say how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Run {run_id} was interrupted; run the same command again to continue it.") from None
    except OSError as error:
        raise _stopped(run_id, errors.error_text(error)) from error


@contextlib.contextmanager
def ray_errors_as_sentences(run_id: str) -> Iterator[None]:
    """Turn exceptions of Ray while the block runs into errors of tlbatch."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise _in_one_sentence(error, run_id) from error


def _in_one_sentence(error: Exception, run_id: str) -> TlbatchError:
    """The reason why a worker failed, which Ray gives as text. If the text contains an error of tlbatch, that error."""
    named = re.findall(r"tlbatch\.errors\.(\w+): (.+)", str(error))
    if named:
        kind, sentence = named[-1]
        if kind == StoreUnavailableError.__name__:
            return _stopped(run_id, sentence)
        found: TlbatchError = getattr(errors, kind)(sentence)
        return found
    return TlbatchError(
        f"Ray ended run {run_id}: {line_of(error, -1)}. Nothing is published. Run the same command again to continue, "
        "with --verbose for details."
    )


def _stopped(run_id: str, why: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Run {run_id} stopped: {why}. Nothing more is published. Solve the problem, then run the same command again."
    )
