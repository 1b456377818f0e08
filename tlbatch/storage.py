"""URLs -> places that hold objects: the only file that knows fsspec, and the only one that knows a local disk.

Objects are written whole or not at all. fsspec's `open(url, "wb")` publishes what it has when its block raises, so nothing
here streams into a final name: a local file is a temporary sibling and `os.replace`, a remote object is one `pipe_file`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import fsspec

from tlbatch.errors import ConfigError, StoreError

#: Words that mark a storage option as a secret. Such options would travel in every task's arguments.
SECRET_WORDS = ("key", "secret", "token", "password", "credential", "sas")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a store: its full address, its path below the place that listed it, and what tells its version."""

    uri: str
    key: str
    size: int
    etag: str


class Place(Protocol):
    """A folder or an object, local or remote; cheap to make, safe to pickle, without a credential in it."""

    @property
    def url(self) -> str:
        """Full address: an absolute path on a local disk, `protocol://…` elsewhere."""

    def join(self, *names: str) -> Place:
        """The place `names` below this one."""

    def read(self) -> bytes:
        """The whole object. Raises FileNotFoundError, PermissionError or another OSError."""

    def info(self) -> ObjectInfo | None:
        """Size and version of this object, its key being its name; None where there is no such object."""

    def write(self, data: bytes) -> None:
        """Put a whole object; readers see the old one or the new one."""

    def create(self, data: bytes) -> bool:
        """Put a whole object if there is none yet; False if there is."""

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Replace the object if it still holds `old` (None: if it does not exist); False if somebody was faster."""

    def names(self) -> list[str]:
        """Names directly below this folder, sorted; empty where the folder does not exist."""

    def walk(self) -> Iterator[ObjectInfo]:
        """Every object below this folder. Names that start with a dot are passed over."""

    def delete(self) -> None:
        """Remove this object, or this folder with all below it. What does not exist is removed already."""

    def exists(self) -> bool:
        """Whether there is an object here, or anything below."""


def resolve(url: str, options: Mapping[str, Any] | None = None) -> Place:
    """The place a URL or path names.

    Args:
        url: a local path, `file://…`, or any URL fsspec knows (`s3://bucket/prefix`).
        options: fsspec's `storage_options` (endpoint, region); never secrets, which come from the environment.

    Raises:
        ConfigError: a URL of an unknown protocol, or one with a password in it.
    """
    if "://" not in url:
        return LocalPlace(Path(os.path.abspath(os.path.expanduser(url))))
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalPlace(Path(os.path.abspath(url.removeprefix("file://"))))
    if parts.password or (parts.username and parts.scheme in ("s3", "s3a", "gs", "az")):
        raise ConfigError(f"The {parts.scheme}:// URL carries a credential; take it out and set it in the environment instead.")
    if parts.scheme not in fsspec.available_protocols():
        raise ConfigError(f"No storage speaks {parts.scheme}:// here ({url}); use a path, s3:// or another fsspec protocol.")
    try:
        fsspec.get_filesystem_class(parts.scheme)
    except ImportError as error:
        raise ConfigError(f"{parts.scheme}:// needs another package: {error}.") from None
    return RemotePlace(url.rstrip("/"), dict(options or {}))


@dataclass(frozen=True)
class LocalPlace:
    """A path on this machine, or on a disk all machines share."""

    path: Path

    @property
    def url(self) -> str:
        """The absolute path."""
        return str(self.path)

    def join(self, *names: str) -> LocalPlace:
        """The place `names` below this one."""
        return LocalPlace(self.path.joinpath(*names))

    def read(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()

    def info(self) -> ObjectInfo | None:
        """Size and version of this file."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _local_info(self.url, self.path.name, found) if stat.S_ISREG(found.st_mode) else None

    def write(self, data: bytes) -> None:
        """Put a whole file: a temporary sibling, then a rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(self.path, data) as temporary:
            os.replace(temporary, self.path)

    def create(self, data: bytes) -> bool:
        """Put a whole file unless there is one: a hard link is made or refused at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_sibling(self.path, data) as temporary:
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            return True

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare and replace while the folder is locked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            current = self.path.read_bytes() if self.path.exists() else None
            if current != old:
                return False
            self.write(data)
            return True
        finally:
            os.close(folder)

    def names(self) -> list[str]:
        """Names directly below this folder."""
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self) -> Iterator[ObjectInfo]:
        """Every file below this folder; links are followed, a loop of them once."""
        yield from self._walk(self.path, "", ())

    def _walk(self, folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[ObjectInfo]:
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir():
                yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))
            elif entry.is_file():
                yield _local_info(entry.path, prefix + entry.name, entry.stat())

    def delete(self) -> None:
        """Remove this file or tree."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether the path exists."""
        return self.path.exists()


def _local_info(uri: str, key: str, found: os.stat_result) -> ObjectInfo:
    # A file has no etag: its time of change in nanoseconds with its size stands for one.
    return ObjectInfo(uri, key, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")


@contextmanager
def _temporary_sibling(path: Path, data: bytes) -> Iterator[str]:
    """A synced file beside `path` that holds `data`, gone afterwards unless it was renamed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # read once: asking for it changes it for a moment, which threads would see


@dataclass(frozen=True)
class RemotePlace:
    """A URL of any protocol fsspec knows. S3 puts conditionally; other protocols check first, so one writer at a time."""

    url: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def _protocol(self) -> str:
        return self.url.split("://", 1)[0]

    @cached_property
    def _fs(self) -> Any:
        return fsspec.filesystem(self._protocol, **{"use_listings_cache": False, **self.options})

    @cached_property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.url))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def join(self, *names: str) -> RemotePlace:
        """The place `names` below this one."""
        return RemotePlace("/".join((self.url.rstrip("/"), *names)), self.options)

    def read(self) -> bytes:
        """The whole object."""
        return cast("bytes", self._fs.cat_file(self._path))

    def info(self) -> ObjectInfo | None:
        """Size and version of this object."""
        try:
            found = self._fs.info(self._path)
        except FileNotFoundError:
            return None
        name = self.url.rsplit("/", 1)[-1]
        return _remote_info(self.url, name, found) if found["type"] == "file" else None

    def write(self, data: bytes) -> None:
        """Put a whole object in one request."""
        self._make_parent()
        self._fs.pipe_file(self._path, data)

    def create(self, data: bytes) -> bool:
        """Put a whole object unless there is one."""
        if self._protocol not in ("s3", "s3a"):
            if self._fs.exists(self._path):
                return False
            self.write(data)
            return True
        return self._put_if({"IfNoneMatch": "*"}, data)

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare, and replace on the condition that nobody else has since."""
        if old is None:
            return self.create(data)
        found = self.info()
        if found is None or self.read() != old:
            return False
        if self._protocol not in ("s3", "s3a"):
            self.write(data)
            return True
        return self._put_if({"IfMatch": f'"{found.etag}"'}, data)

    def _put_if(self, condition: dict[str, str], data: bytes) -> bool:
        """One conditional PUT; False when the condition does not hold (412) or another such PUT is under way (409)."""
        bucket, key, _ = self._fs.split_path(self._path)
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            cause = error.__cause__ or error
            code = getattr(cause, "response", {}).get("Error", {}).get("Code", "")
            if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def _make_parent(self) -> None:
        # Only protocols with real folders (sftp, memory) need them; for S3 this would ask for a bucket.
        if self._protocol not in ("s3", "s3a", "gs", "gcs", "az", "abfs"):
            self._fs.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)

    def names(self) -> list[str]:
        """Names directly below this folder."""
        try:
            found = self._fs.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})

    def walk(self) -> Iterator[ObjectInfo]:
        """Every object below this folder."""
        root = self._path.rstrip("/") + "/"
        for path, found in self._fs.find(self._path, detail=True).items():
            if not path.startswith(root):
                continue
            key = path[len(root) :]
            if not any(part.startswith(".") for part in key.split("/")):
                yield _remote_info(f"{self.url}/{key}", key, found)

    def delete(self) -> None:
        """Remove this object or all below it."""
        if self._fs.exists(self._path):
            self._fs.rm(self._path, recursive=True)

    def exists(self) -> bool:
        """Whether there is an object here, or anything below."""
        return bool(self._fs.exists(self._path))


def _remote_info(uri: str, key: str, found: Mapping[str, Any]) -> ObjectInfo:
    version = found.get("ETag") or found.get("etag") or found.get("mtime") or found.get("created") or found.get("LastModified")
    return ObjectInfo(uri, key, int(found.get("size") or 0), str(version or "").strip('"'))


def require_folder(place: Place) -> None:
    """Raises StoreError where there is nothing at `place`, with the one sentence a person needs."""
    try:
        found = place.exists()
    except PermissionError as error:
        raise StoreError(f"The store {place.url} may not be read: {error}.") from None
    if not found:
        raise StoreError(f"The store {place.url} does not exist.")


def local_copy(place: Place, names: Mapping[str, str], cache: Path) -> Path:
    """A folder on this machine that holds the files `names` (name -> sha256) of `place`.

    A local place is used where it lies. A remote one is downloaded once a machine into `cache`, whose name its caller
    chose from the contents: a second worker finds it finished or makes its own and loses the rename.
    """
    if isinstance(place, LocalPlace):
        return place.path
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".download-") as temporary:
        for name in names:
            target = Path(temporary, "files", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(place.join(*name.split("/")).read())
        try:
            Path(temporary, "files").rename(cache)
        except OSError:
            if not cache.is_dir():
                raise
    return cache
