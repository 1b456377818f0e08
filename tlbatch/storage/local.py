"""A path on a local disk or a shared disk -> a storage location.

A file is written under a temporary name in the same folder, synced, and renamed. Readers see the old file or the new file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from tlbatch.errors import ChangedError
from tlbatch.storage.location import (
    BROKEN_LINK,
    EVERYTHING,
    NO_FILE,
    TEMPORARY_SUFFIX,
    UNREADABLE,
    Listed,
    ObjectInfo,
    Upload,
    WalkRules,
    in_batches,
)

#: Errors of a file that was removed after it was listed, and of a link to a missing file, through a file, or to itself.
_DANGLING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class LocalLocation:
    """A path on a local disk, or on a disk that all machines share."""

    path: Path

    @property
    def url(self) -> str:
        """The absolute path."""
        return str(self.path)

    def join(self, *names: str) -> LocalLocation:
        """The location `names` below this one."""
        return LocalLocation(self.path.joinpath(*names))

    def read(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The file or a part of it; with `etag`, time and size are compared after reading.

        The time of status change is not compared: hosts may each have a copy of the files at the same path.
        """
        with _opened(self.path) as file:
            file.seek(start)
            data = file.read() if end is None else file.read(end - start)
            if etag is not None and not f"{etag}-".startswith(f"{_content_version(os.fstat(file.fileno()))}-"):
                raise ChangedError(f"{self.path} was changed after it was listed")
        return data

    def info(self) -> ObjectInfo | None:
        """Size, version and modification time of this file."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return ObjectInfo(self.url, self.path.name, found.st_size, _version(found), found.st_mtime)

    def write(self, data: bytes | mmap.mmap) -> None:
        """Write a whole file: a temporary file in the same folder, then an atomic rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(self.path, data) as temporary:
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)

    def create(self, data: bytes) -> bool:
        """Write a whole file unless the path exists; creating a hard link is atomic."""
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
        with self._locked_if_equal(old) as equal:
            if equal:
                self.write(data)
            return equal

    def remove(self, old: bytes) -> bool:
        """Compare and remove while the folder is locked."""
        with self._locked_if_equal(old) as equal:
            if equal:
                self.path.unlink()
            return equal

    @contextmanager
    def _locked_if_equal(self, old: bytes) -> Iterator[bool]:
        """Whether this file's content equals `old`; the folder is locked against other `swap` and `remove` calls meanwhile."""
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

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted."""
        return [name for name in self.names() if self.path.joinpath(name).is_dir()]

    def walk(self, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
        """Every file below this folder; links are followed, and a loop of links is followed once."""
        closed = _Closed(rules.closed) if rules.closed else None
        if closed is not None and closed.holds(os.path.realpath(self.path)):
            closed = None  # the walk begins in there
        return in_batches(self._walk(self.path, "", (), rules, closed))

    def _walk(
        self, folder: Path, prefix: str, above: tuple[str, ...], rules: WalkRules, closed: _Closed | None
    ) -> Iterator[Listed]:
        real = os.path.realpath(folder)
        if closed is not None and closed.holds(real):
            return
        if real in above:
            rules.passed(prefix, BROKEN_LINK)
            return
        for name in _names_in(folder, prefix, rules):
            path = f"{folder}/{name}"
            try:
                found = os.stat(path)
            except PermissionError:  # in a folder whose names may be read and nothing else, or a link into a closed one
                yield prefix + name, None, None
                continue
            except OSError as error:
                if error.errno not in _DANGLING:
                    raise
                yield from _dead_link(path, prefix + name, rules)
                continue
            if stat.S_ISREG(found.st_mode):
                yield prefix + name, found.st_size, _version(found)
            elif not stat.S_ISDIR(found.st_mode):
                rules.passed(prefix + name, NO_FILE)
            elif not (rules.skips(f"{prefix}{name}/") or (closed is not None and closed.is_same(found))):
                yield from self._walk(Path(path), f"{prefix}{name}/", (*above, real), rules, closed)

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
        """No uploads: a file that is being written is part of `contents`."""
        yield from ()

    def abort(self, upload: Upload) -> None:
        """Do nothing: a local disk has no uploads."""

    def unlink(self) -> None:
        """Remove this file."""
        self.path.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove this file or tree."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether the path exists."""
        return self.path.exists()


class _Closed:
    """A folder that a walk does not enter: by its real path, as links lead to it, and by its inode, as mounts do."""

    def __init__(self, path: str) -> None:
        self._real = os.path.realpath(path)
        try:
            self._found: os.stat_result | None = os.stat(path)
        except OSError:
            self._found = None  # it does not exist yet

    def holds(self, real: str) -> bool:
        """Whether a real path is this folder or is below it."""
        return real == self._real or real.startswith(f"{self._real}/")

    def is_same(self, found: os.stat_result) -> bool:
        """Whether this is the folder."""
        return self._found is not None and os.path.samestat(self._found, found)


def _names_in(folder: Path, prefix: str, rules: WalkRules) -> list[str]:
    """The names in a folder of a walk, sorted; none if the folder is closed or gone, unless the walk begins with it."""
    try:
        # `listdir` keeps only the names of a folder; an entry of `scandir` with its stat result takes ten times the memory.
        return sorted(os.listdir(folder))
    except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
        if not prefix:
            raise
        if isinstance(error, PermissionError):
            rules.passed(prefix, UNREADABLE)
        return []


def _version(found: os.stat_result) -> str:
    """A substitute for an etag: modification time in nanoseconds, size, time of status change, and inode.

    The last two show a file that took the place of another of the same time and size. `schema.same_version` knows the etags of
    older tables, which lack them.
    """
    inode = 0 if _is_fuse(found.st_dev) else found.st_ino
    return f"{_content_version(found)}-{found.st_ctime_ns:x}-{inode:x}"


@functools.cache
def _is_fuse(device: int) -> bool:
    """Whether a file system is FUSE: many of them give a file another inode each time they are mounted."""
    place = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == place:
                return after.startswith("fuse")
    return False


def _content_version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _opened(path: Path) -> BinaryIO:
    """The open file; a link in a circle is a file that does not exist."""
    try:
        return path.open("rb")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileNotFoundError(errno.ENOENT, "a link in a circle", str(path)) from None


def _dead_link(path: str, key: str, rules: WalkRules) -> Iterator[Listed]:
    """A link that leads nowhere, as an object that will not be found; counted if it may have led to a folder.

    What the table has of it, or below it, may only be away.
    """
    try:
        link = os.lstat(path)
    except OSError:  # removed since its folder was listed
        return
    rules.away(key)
    if "." in os.path.basename(path):
        yield key, link.st_size, _version(link)
    else:
        rules.passed(key, BROKEN_LINK)


@contextmanager
def _temporary_sibling(path: Path, data: bytes | mmap.mmap) -> Iterator[str]:
    """Write `data` to a synced temporary file beside `path`; it is removed afterwards unless it was renamed."""
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
    """Sync a folder, so that a new name survives a power failure and reaches the disk before the names written after it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # read once, at import: reading it sets it for a moment, and other threads would create files with it
