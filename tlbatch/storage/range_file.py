"""A remote object as a seekable file that is read in large ranges."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tlbatch.storage.location import Location
from tlbatch.storage.retry import with_retries

log = logging.getLogger(__name__)

T = TypeVar("T")


class RangeFile(io.RawIOBase):
    """An object as a file that can seek, read in large pieces; of a piece that is read forwards the next is on its way.

    Args:
        fetch: gives the bytes from a start to an end; what it raises goes through.
        size: of the object, in bytes.
    """

    _PIECE = 8 << 20

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0
        self._start, self._piece = 0, b""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tlbatch-range")
        self._next: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as asked for, or all that are left."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        taken = []
        while wanted:
            piece = self._range_at(self._position)[:wanted]
            if not piece:
                break  # shorter than it was listed with: whoever reads it finds its end torn
            taken.append(piece)
            self._position += len(piece)
            wanted -= len(piece)
        return b"".join(taken)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range_at(self, position: int) -> memoryview:
        """What is left of the piece that holds a place."""
        if not self._start <= position < self._start + len(self._piece):
            ahead, self._next = self._next, None
            forwards = position in (0, self._start + len(self._piece))
            if ahead is not None and ahead[0] == position:
                self._start, self._piece = position, ahead[1].result()
            else:
                self._start, self._piece = position, self._fetch(position, min(position + self._PIECE, self._size))
            end = position + len(self._piece)
            if forwards and self._piece and end < self._size:
                self._next = end, self._pool.submit(self._fetch, end, min(end + self._PIECE, self._size))
        return memoryview(self._piece)[position - self._start :]

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def open_range_file(location: Location, size: int) -> RangeFile:
    """An object of so many bytes as a file that can seek; a store that does not answer is waited for at every piece."""
    return RangeFile(lambda start, end: with_retries(lambda: location.fetch(start, end)), size)
