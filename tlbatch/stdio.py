"""What libraries write to the terminal while they start -> nowhere, unless they fail or somebody asked to see it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, TextIO

log = logging.getLogger(__name__)


class _Descriptor2:
    """File descriptor 2, put away while at least one block wants it so: libraries start side by side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._kept = -1
        self._said: IO[bytes] | None = None

    def put_away(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                sys.stderr.flush()
                self._kept = os.dup(2)
                self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by bring_back
                os.dup2(self._said.fileno(), 2)

    def bring_back(self, failed: bool) -> None:
        with self._lock:
            if failed and self._said is not None:
                self._said.seek(0)
                os.write(self._kept, self._said.read())
            self._blocks -= 1
            if self._blocks == 0 and self._said is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._said.close()


_descriptor_2 = _Descriptor2()
_results: list[TextIO] = []


@contextmanager
def native_stderr_captured() -> Iterator[None]:
    """Keep what the block writes to descriptor 2 from the terminal; an exception brings it back before it goes on.

    TensorFlow and Ray greet there before any setting of theirs reaches them. With tlbatch's own log on, all is shown.
    """
    if log.isEnabledFor(logging.INFO):
        yield
        return
    _descriptor_2.put_away()
    failed = True
    try:
        yield
        failed = False
    finally:
        _descriptor_2.bring_back(failed)


def separate_python_stderr() -> None:
    """Give Python's `sys.stderr` a descriptor of its own, so that what tlbatch says is never put away with the rest."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


def reserve_stdout() -> None:
    """Keep standard output for results: what libraries print (Ray reports lost workers there) goes nowhere from now on."""
    _results.append(os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8"))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - libraries hold on to it until the process ends


def results_stream() -> TextIO:
    """Where results are printed."""
    return _results[-1] if _results else sys.stdout


def import_quietly(name: str) -> ModuleType:
    """Import a module whose C++ half greets."""
    with native_stderr_captured():
        return importlib.import_module(name)
