"""Retries of storage requests: which errors are transient, and how long they are retried."""

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

#: How long a store that does not answer is waited for.
RETRY_SECONDS = 60.0


def with_retries(call: Callable[[], T]) -> T:
    """Call until the store answers, for at most `PATIENCE_SECONDS`; what another attempt would not mend is raised at once.

    Waits are drawn between nothing and twice the last one's limit ("full jitter"), so that many do not come back as one.
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
    """One attempt at everything while the block runs, in this process: to clean up after a store that failed, or Ctrl-C."""
    _give_up.set()
    try:
        yield
    finally:
        _give_up.clear()


def _log_wait(state: RetryCallState) -> None:
    level = logging.WARNING if (state.seconds_since_start or 0) > _QUIET_SECONDS else logging.INFO
    if state.outcome is not None:
        log.log(level, "waiting for the store: %s", state.outcome.exception())


_QUIET_SECONDS = 5.0


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
    """Whether what a store answered may be gone with the next attempt."""
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT)
