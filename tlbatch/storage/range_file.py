"""A remote object -> a seekable file that is read in large ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tlbatch.storage.location import Location
from tlbatch.storage.retry import with_retries


class RangeFile(io.RawIOBase):
    """An object as a seekable file that is read in large pieces; if it is read forwards, the next piece is prefetched.

    Args:
        fetch: returns the bytes from a start to an end; its exceptions are not caught.
        size: size of the object in bytes.
        piece: bytes of a piece, if not 8 MiB.
    """

    _PIECE = 8 << 20

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, piece: int | None = None) -> None:
        self._piece_bytes = piece or self._PIECE
        self._fetch = fetch
        self._size = size
        self._position = 0
        self._start, self._piece = 0, b""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tlbatch-range")
        self._next: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position in bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, and return it."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes from the position; all remaining bytes if `size` is None or negative."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        taken = []
        while wanted:
            piece = self._range_at(self._position)[:wanted]
            if not piece:
                break  # the object is shorter than its listed size; the parser reports it as truncated
            taken.append(piece)
            self._position += len(piece)
            wanted -= len(piece)
        return b"".join(taken)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, and return the number of bytes read."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _range_at(self, position: int) -> memoryview:
        """The bytes from `position` to the end of the piece that contains it."""
        if not self._start <= position < self._start + len(self._piece):
            prefetched, self._next = self._next, None
            forwards = position in (0, self._start + len(self._piece))
            if prefetched is not None and prefetched[0] == position:
                self._start, self._piece = position, prefetched[1].result()
            else:
                self._start, self._piece = position, self._fetch(position, min(position + self._piece_bytes, self._size))
            end = position + len(self._piece)
            if forwards and self._piece and end < self._size:
                self._next = end, self._pool.submit(self._fetch, end, min(end + self._piece_bytes, self._size))
        return memoryview(self._piece)[position - self._start :]

    def close(self) -> None:
        """Stop the prefetch, and close the file."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def open_range_file(location: Location, size: int, piece: int | None = None) -> RangeFile:
    """An object of `size` bytes as a seekable file; transient errors are retried for each piece."""
    return RangeFile(lambda start, end: with_retries(lambda: location.fetch(start, range_end(start, end, size))), size, piece)


def range_end(start: int, end: int, size: int) -> int | None:
    """The end of a piece as `Location.fetch` takes it: None if it is the whole object, which every server can send."""
    return None if start == 0 and end == size else end
