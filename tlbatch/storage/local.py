"""A path on this machine's disk, or on a disk that all machines share, as a storage location.

A file is written as a temporary sibling, synced, and renamed: readers see the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from tlbatch.errors import ChangedError
from tlbatch.storage.location import TEMPORARY_SUFFIX, ObjectInfo, Upload, in_batches

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What the system says of a file that is gone since it was listed, and of a link to nothing, through a file, or to itself.
_DANGLING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class LocalLocation:
    """A path on this machine, or on a disk all machines share."""

    path: Path

    @property
    def url(self) -> str:
        """The absolute path."""
        return str(self.path)

    def join(self, *names: str) -> LocalLocation:
        """The place `names` below this one."""
        return LocalLocation(self.path.joinpath(*names))

    def read(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The file or a part of it; it is the same version before and after."""
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read() if end is None else file.read(end - start)
            if etag is not None and _version(os.fstat(file.fileno())) != etag:
                raise ChangedError(f"{self.path} was changed after it was listed")
        return data

    def info(self) -> ObjectInfo | None:
        """Size, version and time of this file."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return ObjectInfo(self.url, self.path.name, found.st_size, _version(found), found.st_mtime)

    def write(self, data: bytes) -> None:
        """Put a whole file: a temporary sibling, then a rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(self.path, data) as temporary:
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)

    def create(self, data: bytes) -> bool:
        """Put a whole file unless there is one: a hard link is made or refused at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(self.path, data) as temporary:
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            _sync_folder(self.path.parent)
            return True

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare and replace while the folder is locked."""
        if old is None:
            return self.create(data)
        with self._held_by(old) as holds:
            if holds:
                self.write(data)
            return holds

    def remove(self, old: bytes) -> bool:
        """Compare and remove while the folder is locked."""
        with self._held_by(old) as holds:
            if holds:
                self.path.unlink()
            return holds

    @contextmanager
    def _held_by(self, old: bytes) -> Iterator[bool]:
        """Whether this file holds `old`. It stays so while the block runs: the folder is locked for all who ask like this."""
        try:
            folder = os.open(self.path.parent, os.O_RDONLY)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield self.path.exists() and self.path.read_bytes() == old
        finally:
            os.close(folder)

    def names(self) -> list[str]:
        """Names directly below this folder."""
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self) -> Iterator[pa.RecordBatch]:
        """Every file below this folder; links are followed, a loop of them once."""
        return in_batches(self._walk(self.path, "", ()))

    def _walk(self, folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
        real = os.path.realpath(folder)
        if real in above:
            return
        # Only names are held of a whole folder: an entry of `scandir` with what it found out is ten times as large.
        for name in sorted(os.listdir(folder)):
            if name[0] == ".":
                continue
            path = f"{folder}/{name}"
            try:
                found = os.stat(path)
            except OSError as error:
                if error.errno in _DANGLING:
                    continue
                raise
            if stat.S_ISDIR(found.st_mode):
                yield from self._walk(Path(path), f"{prefix}{name}/", (*above, real))
            elif stat.S_ISREG(found.st_mode):
                yield prefix + name, found.st_size, _version(found)

    def contents(self) -> Iterator[ObjectInfo]:
        """Every file below this folder; links are not followed."""
        for folder, _, names in os.walk(self.path):
            for name in sorted(names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat(follow_symlinks=False)
                    key = path.relative_to(self.path).as_posix()
                    yield ObjectInfo(str(path), key, found.st_size, _version(found), found.st_mtime)

    def uploads(self) -> Iterator[Upload]:
        """None: a file that is being written is one of `contents`."""
        yield from ()

    def abort(self, upload: Upload) -> None:
        """There is none."""

    def delete(self) -> None:
        """Remove this file or tree."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether the path exists."""
        return self.path.exists()


def _version(found: os.stat_result) -> str:
    """A file has no etag: its time of change in nanoseconds with its size stands for one."""
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


@contextmanager
def _temporary_sibling(path: Path, data: bytes) -> Iterator[str]:
    """A synced file beside `path` that holds `data`, gone afterwards unless it was renamed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Keep a new name through a loss of power: data first, receipt after, on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # read once: asking for it changes it for a moment, which threads would see
