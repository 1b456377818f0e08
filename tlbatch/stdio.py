"""Standard streams: results on stdout, messages on stderr, and neither ends a command because nobody reads it.

Start-up messages of C++ libraries on stderr -> a temporary file; shown only if the start fails or the log level is INFO.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)


class _StderrCapture:
    """Redirects file descriptor 2 while at least one block is active; several threads may start libraries at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._original = -1
        self._captured: IO[bytes] | None = None

    def start(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                sys.stderr.flush()
                self._original = os.dup(2)
                self._captured = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
                os.dup2(self._captured.fileno(), 2)

    def stop(self, failed: bool) -> None:
        with self._lock:
            if failed and self._captured is not None:
                self._captured.seek(0)
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(self._original, self._captured.read())
            self._blocks -= 1
            if self._blocks == 0 and self._captured is not None:
                os.dup2(self._original, 2)
                os.close(self._original)
                self._captured.close()


_stderr_capture = _StderrCapture()
_results: list[TextIO] = []


@contextmanager
def native_stderr_captured() -> Iterator[None]:
    """Capture what the block writes to file descriptor 2; if the block raises, print it and re-raise.

    TensorFlow and Ray print start-up messages there before any of their settings takes effect. If tlbatch's log level is INFO
    or lower, nothing is captured.
    """
    if log.isEnabledFor(logging.INFO):
        yield
        return
    _stderr_capture.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        _stderr_capture.stop(failed)


class _Unfailing(io.FileIO):
    """What cannot be written, because nobody reads it or the disk is full, is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def separate_python_stderr() -> None:
    """Give Python's `sys.stderr` its own file descriptor, so that tlbatch's messages are never captured.

    A log that cannot be written does not end a run.
    """
    raw = io.BufferedWriter(_Unfailing(os.dup(2), "w"))
    sys.stderr = io.TextIOWrapper(raw, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


def open_closed_streams() -> None:
    """Lead standard streams that the caller has closed nowhere; else the next file that is opened becomes one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def reserve_stdout() -> None:
    """Reserve standard output for results, and discard what libraries print (Ray reports lost workers there)."""
    _results.append(os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8"))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - libraries keep it open until the process ends


def results_stream() -> TextIO:
    """The stream to which results are printed."""
    return _results[-1] if _results else sys.stdout


def import_quietly(name: str) -> ModuleType:
    """Import a module whose C++ libraries print start-up messages."""
    with native_stderr_captured():
        return importlib.import_module(name)
