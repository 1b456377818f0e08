"""What libraries write to the terminal while they start -> nowhere, unless they fail or somebody asked to see it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

log = logging.getLogger(__name__)


@contextmanager
def stderr_put_away() -> Iterator[None]:
    """Keep what the block writes to descriptor 2 from the terminal; an exception brings it back before it goes on.

    TensorFlow and Ray greet there before any setting of theirs reaches them. With tlbatch's own log on, all is shown.
    """
    if log.isEnabledFor(logging.INFO):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def import_quietly(name: str) -> ModuleType:
    """Import a module whose C++ half greets."""
    with stderr_put_away():
        return importlib.import_module(name)
