"""The outcome of a command -> a JSON POST to the user's URL.

A message that cannot be sent is logged and changes nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import textwrap
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from tlbatch import signals
from tlbatch.errors import ConfigError, TlbatchError, UnfinishedError

log = logging.getLogger(__name__)

_SECONDS = 10.0
_MOST_OF_DISCORD = 2_000
#: Fields of a report that the message contains.
_NAMES = ("run_id", "listed", "predicted", "failed", "seconds", "already_done", "counts", "failed_by_kind", "left")

#: Takes the report of a command that did not raise an error, and its exit code.
Tell = Callable[[Mapping[str, Any], int], None]


@contextlib.contextmanager
def notifying(url: str | None, verb: str, output: str) -> Iterator[Tell]:
    """Post the outcome of the block: the report that it passes on, or the error that it raises.

    The message has `text` (a sentence; Slack and Discord get it alone, as they take it), `verb`, `output` (of a training
    the bundle), `host`, `exit_code` and, if there is a report, its counts. A killed process sends no message. Configure
    your monitoring to alert when the message is missing.

    Args:
        url: where to post; None posts nothing. `${NAME}` is read from the environment, so that a secret need not be in a file.
        verb: what the command did, such as classifying.
        output: the output of the command.

    Yields:
        A function that takes the report of the command and its exit code.

    Raises:
        ConfigError: the URL does not start with http:// or https://, or names a variable that is not set.
    """
    address = _address(url)
    interrupted = {"text": f"tlbatch {verb} of {output} was interrupted.", "exit_code": UnfinishedError.exit_code}
    message: dict[str, Any] = {"verb": verb, "output": output, "host": socket.gethostname(), **interrupted}
    if address:
        signals.before_a_forced_end(lambda: _post(address, message))

    def tell(report: Mapping[str, Any], exit_code: int) -> None:
        signals.finished()
        message.update(_fields(report), exit_code=exit_code)

    try:
        yield tell
    except (TlbatchError, OSError) as error:
        code = error.exit_code if isinstance(error, TlbatchError) else UnfinishedError.exit_code
        message.update(text=f"tlbatch {verb} of {output}: {error}", exit_code=code)
        raise
    except Exception as error:
        message.update(text=f"tlbatch {verb} of {output} failed: {type(error).__name__}", exit_code=TlbatchError.exit_code)
        raise
    finally:
        signals.finished()
        if address:
            _post(address, message)


def _address(url: str | None) -> str | None:
    if url is None:
        return None
    address = os.path.expandvars(url)
    if not address.startswith(("http://", "https://")) or "$" in address:
        raise ConfigError("notify: write an http(s) URL; a variable ${NAME} in it must be set in the environment.")
    return address


def _fields(report: Mapping[str, Any]) -> dict[str, Any]:
    if "listed" not in report:  # a training
        images = report["images"]["train"]
        text = f"tlbatch: {report['bundle']}: trained on {images:,} images, accuracy {report['accuracy']:.1%}."
        return {"text": text, **{name: report[name] for name in ("images", "accuracy", "failed", "seconds")}}
    counts = f"{report['listed']:,} listed, {report['predicted']:,} predicted, {report['failed']:,} failed"
    text = f"tlbatch: {report['output']}: {'nothing to do' if report.get('already_done') else counts}."
    return {"text": text, **{name: report[name] for name in _NAMES if name in report}}


def form_of(address: str, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as who gets it takes it: Slack and Discord refuse or misread what they do not know, others get all of it.

    Sources: "Sending messages using incoming webhooks" and "Formatting text" at docs.slack.dev, "Execute Webhook" at
    docs.discord.com.
    """
    host, text = urlsplit(address).hostname or "", str(message["text"])
    if host == "hooks.slack.com":
        return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    if host in ("discord.com", "discordapp.com"):
        return {"content": textwrap.shorten(text, _MOST_OF_DISCORD, placeholder=" …"), "allowed_mentions": {"parse": []}}
    return message


def _post(address: str, message: Mapping[str, Any]) -> None:
    body, headers = json.dumps(form_of(address, message)).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers)  # noqa: S310 - http(s), checked
    try:
        urllib.request.urlopen(request, timeout=_SECONDS).close()  # noqa: S310 - http(s), checked
    except (OSError, ValueError) as error:
        log.warning("notify: the message could not be sent: %s", type(error).__name__)  # the URL may contain a secret
