"""A storage request -> its answer, with retries: which errors are transient, and how long they are retried.

Network errors are retried for up to 60 s and are never recorded as bad images.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from tlbatch.errors import ChangedError, RefusedError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long a request is retried while its error is transient.
RETRY_SECONDS = 60.0


def with_retries(call: Callable[[], T]) -> T:
    """Call until the store answers, for at most `RETRY_SECONDS`; a permanent error is raised at once.

    Each wait is random, between 0 and a limit that doubles with each attempt ("full jitter"), so that many clients do not
    retry at the same moment.
    """
    retrying = Retrying(
        stop=stop_any(stop_after_delay(RETRY_SECONDS), stop_when_event_set(_give_up)),
        sleep=sleep_using_event(_give_up),
        wait=wait_random_exponential(multiplier=0.1, max=8),
        retry=retry_if_exception(is_transient),
        before_sleep=_log_wait,
        reraise=True,
    )
    return retrying(call)


_give_up = threading.Event()


@contextmanager
def no_retries() -> Iterator[None]:
    """Make one attempt per request in this process while the block runs, for cleaning up after a store error or Ctrl-C."""
    _give_up.set()
    try:
        yield
    finally:
        _give_up.clear()


def _log_wait(state: RetryCallState) -> None:
    level = logging.WARNING if (state.seconds_since_start or 0) > _WARN_AFTER_SECONDS else logging.INFO
    if state.outcome is not None:
        log.log(level, "retrying a storage request: %s", state.outcome.exception())


_WARN_AFTER_SECONDS = 5.0


_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    ChangedError,
    RefusedError,
)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: an OSError that does not belong to the permanent kinds."""
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT)
