"""How a command ended -> a JSON post to an address of the user's. A message that cannot be sent changes nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tlbatch.errors import ConfigError, TlbatchError, UnfinishedError

log = logging.getLogger(__name__)

_SECONDS = 10.0
#: What of a report the message has.
_NAMES = ("run_id", "listed", "predicted", "failed", "seconds", "already_done", "counts", "failed_by_kind")

#: Takes the report of a command that went well, and its exit code.
Tell = Callable[[Mapping[str, Any], int], None]


@contextlib.contextmanager
def notifying(url: str | None, verb: str, output: str) -> Iterator[Tell]:
    """Post how the block ended: what it tells, or the error that leaves it.

    The message has `text`, a sentence (which Slack and its like show), `verb`, `output`, `host`, `exit_code`, and of a report
    the counts. One that is killed sends none.

    Args:
        url: where to; `${NAME}` in it is read from the environment here, so that it need not stand in a file.
        verb: what the command was.
        output: whose table.

    Raises:
        ConfigError: the address is none.
    """
    where = _address(url)
    told: dict[str, Any] = {}

    def tell(report: Mapping[str, Any], exit_code: int) -> None:
        told.update(_of(report), exit_code=exit_code)

    try:
        yield tell
    except (TlbatchError, OSError) as error:
        code = error.exit_code if isinstance(error, TlbatchError) else UnfinishedError.exit_code
        told.update(text=f"tlbatch {verb} of {output}: {error}", exit_code=code)
        raise
    except Exception as error:
        told.update(text=f"tlbatch {verb} of {output} failed: {type(error).__name__}", exit_code=TlbatchError.exit_code)
        raise
    except KeyboardInterrupt:
        told.update(text=f"tlbatch {verb} of {output} was interrupted.", exit_code=UnfinishedError.exit_code)
        raise
    finally:
        if where and told:
            _post(where, {"verb": verb, "output": output, "host": socket.gethostname(), **told})


def _address(url: str | None) -> str | None:
    if url is None:
        return None
    where = os.path.expandvars(url)
    if not where.startswith(("http://", "https://")) or "$" in where:
        raise ConfigError("notify: write an http(s) address; ${NAME} in it is read from the environment and must be set there.")
    return where


def _of(report: Mapping[str, Any]) -> dict[str, Any]:
    books = f"{report['listed']:,} listed, {report['predicted']:,} predicted, {report['failed']:,} failed"
    text = f"tlbatch: {report['output']}: {'nothing to do' if report.get('already_done') else books}."
    return {"text": text, **{name: report[name] for name in _NAMES if name in report}}


def _post(where: str, message: Mapping[str, Any]) -> None:
    body, headers = json.dumps(message).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(where, body, headers)  # noqa: S310 - http(s), checked
    try:
        urllib.request.urlopen(request, timeout=_SECONDS).close()  # noqa: S310 - http(s), checked  # noqa: S310 - http(s), checked
    except (OSError, ValueError) as error:
        log.warning("notify: the message could not be sent: %s", type(error).__name__)  # the address may be a secret
