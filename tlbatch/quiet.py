"""What libraries' C++ halves write to file descriptor 2 while they start -> nowhere, unless they fail."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stderr_put_away() -> Iterator[None]:
    """Keep what the block writes to descriptor 2 from the terminal; an exception brings it back before it goes on.

    TensorFlow and Ray greet there before any setting of theirs reaches them.
    """
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
