"""URLs -> places that hold objects: the only file that knows fsspec, and the only one that knows a local disk.

Objects are written whole or not at all. fsspec's `open(url, "wb")` publishes what it has when its block raises, so nothing
here streams into a final name: a local file is a temporary sibling and `os.replace`, a remote object is one `pipe_file`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from botocore.exceptions import ClientError
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

from tlbatch import s3
from tlbatch.errors import ChangedError, ConfigError, CredentialsError, RefusedError, StoreError, ThrottledError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What a listing knows of each object: its key below the listed folder, and what tells its version.
LISTED = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
_OBJECTS_PER_BATCH = 8_192
#: What the system says of a file that is gone since it was listed, and of a link to nothing, through a file, or to itself.
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

#: Words that mark a storage option as a secret. Such options would travel in every task's arguments.
SECRET_WORDS = ("key", "secret", "token", "password", "credential", "sas")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a store: its full address, its path below the place that listed it, and what tells its version.

    `written` is when, in seconds since the epoch by the store's clock; 0 where it does not say.
    """

    uri: str
    key: str
    size: int
    etag: str
    written: float = 0.0


class Upload(NamedTuple):
    """An object in parts that was begun and never became one; who keeps it is paid for it. `began` as `ObjectInfo.written`."""

    key: str
    began: float
    number: str


class Place(Protocol):
    """A folder or an object, local or remote; cheap to make, safe to pickle, without a credential in it."""

    @property
    def url(self) -> str:
        """Full address: an absolute path on a local disk, `protocol://…` elsewhere."""

    def join(self, *names: str) -> Place:
        """The place `names` below this one."""

    def read(self) -> bytes:
        """The whole object, waiting for a store that has a bad minute. Raises an OSError."""

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object, or its bytes from `start` to `end`, in one attempt.

        Raises:
            ChangedError: it is not the version `etag`, where the store can tell.
            OSError: what else went wrong; `passes` says whether trying again makes sense.
        """

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

    def walk(self) -> Iterator[pa.RecordBatch]:
        """Every object below this folder, as `LISTED`. Names that begin with a dot are passed over, except `.` and `..`.

        A name that is no text (a local disk may have them) is null.
        """

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder whatever its name, those of writes that were cut short among them."""

    def uploads(self) -> Iterator[Upload]:
        """Uploads in parts that were begun below this folder and are not ended."""

    def abort(self, upload: Upload) -> None:
        """Give up an upload that `uploads` named."""

    def delete(self) -> None:
        """Remove this object, or this folder with all below it. What does not exist is removed already."""

    def remove(self, old: bytes) -> bool:
        """Remove this object if it still holds `old`; False if it does not."""

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
        return _in_batches(self._walk(self.path, "", ()))

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
                if error.errno in _LEADS_NOWHERE:
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


def _in_batches(found: Iterable[tuple[str, int, str]]) -> Iterator[pa.RecordBatch]:
    """(key, size, etag) of many objects, in columns: a tenth of the memory."""
    rows = iter(found)
    while chunk := list(itertools.islice(rows, _OBJECTS_PER_BATCH)):
        yield to_batch(chunk)


def to_batch(rows: Sequence[tuple[str, int, str]]) -> pa.RecordBatch:
    """(key, size, etag) of some objects as `LISTED`."""
    keys, sizes, etags = zip(*rows, strict=True)
    try:
        text = pa.array(keys, pa.string())
    except UnicodeEncodeError:
        text = pa.array([key if _is_text(key) else None for key in keys], pa.string())
    return pa.RecordBatch.from_arrays([text, pa.array(sizes, pa.int64()), pa.array(etags, pa.string())], schema=LISTED)


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


_TEMPORARY, _PROBE = ".tmp", ".probe-"


def is_leftover(key: str) -> bool:
    """Whether an object is one that only a write which was cut short leaves behind."""
    name = key.rsplit("/", 1)[-1]
    return (name.startswith(".") and name.endswith(_TEMPORARY)) or _PROBE in name


@contextmanager
def _temporary_sibling(path: Path, data: bytes) -> Iterator[str]:
    """A synced file beside `path` that holds `data`, gone afterwards unless it was renamed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
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


@dataclass(frozen=True)
class RemotePlace:
    """A URL of any protocol fsspec knows. S3 puts conditionally; what does not is checked first, so one writer at a time.

    Every method but `fetch` waits up to `PATIENCE_SECONDS` for a store that does not answer. What libraries raise comes out
    as an OSError.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def _protocol(self) -> str:
        return self.url.split("://", 1)[0]

    @property
    def _is_s3(self) -> bool:
        return self._protocol in ("s3", "s3a")

    @cached_property
    def _fs(self) -> Any:
        own = _s3_defaults(self.options) if self._is_s3 else {}
        return fsspec.filesystem(self._protocol, **{"use_listings_cache": False, **own, **self.options})

    @cached_property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.url))

    @property
    def _bucket_and_key(self) -> tuple[str, str]:
        bucket, _, key = self._path.partition("/")
        return bucket, key

    @property
    def _folder_key(self) -> str:
        """What the keys below this place begin with."""
        _, key = self._bucket_and_key
        return key.rstrip("/") + "/" if key else ""

    def _fast(self, key: str) -> s3.Bucket | None:
        """The quick way to this place's objects, where there is one."""
        if not (self._is_s3 and s3.serves(self.options) and s3.can_name(key)):
            return None
        return s3.bucket(self._fs, self._bucket_and_key[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def join(self, *names: str) -> RemotePlace:
        """The place `names` below this one."""
        below = RemotePlace("/".join((self.url.rstrip("/"), *names)), self.options)
        if "_fs" in self.__dict__:
            below.__dict__["_fs"] = self._fs  # finding it takes longer than reading a small object
        return below

    def read(self) -> bytes:
        """The whole object."""
        return patiently(self.fetch)

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object or a part of it. Only S3 can say that it is another version."""
        with _as_oserror(self.url):
            _, key = self._bucket_and_key
            fast = self._fast(key)
            if fast is not None:
                return fast.get(key, start, end, etag)
            if self._is_s3 and etag:
                return self._get_s3(start, end, etag)
            return cast("bytes", self._fs.cat_file(self._path, start=start or None, end=end))

    def _get_s3(self, start: int, end: int | None, etag: str) -> bytes:
        bucket, key = self._bucket_and_key
        part = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, IfMatch=f'"{etag}"', **part)
        return cast("bytes", fsspec.asyn.sync(self._fs.loop, answer["Body"].read))

    def info(self) -> ObjectInfo | None:
        """Size and version of this object."""
        try:
            found = self._listed_info() if self._is_s3 else self._ask(lambda: self._fs.info(self._path))
        except FileNotFoundError:
            return None
        if found["type"] != "file":
            return None
        name = self.url.rsplit("/", 1)[-1]
        return ObjectInfo(self.url, name, int(found.get("size") or 0), _remote_version(found), _written(found))

    def _listed_info(self) -> dict[str, Any]:
        """What a listing says of this object: that may be allowed where reading is not, and tells why if it is refused."""
        _, key = self._bucket_and_key
        found = self._first_below(key)
        if found is None or found["Key"] != key:
            raise FileNotFoundError(self.url)
        return {"type": "file", "size": found["Size"], "ETag": found["ETag"], "LastModified": found["LastModified"]}

    def _first_below(self, prefix: str) -> dict[str, Any] | None:
        """The first object of the bucket whose key begins so, as S3 lists it.

        Listing tells why it is refused; the HEAD that s3fs asks with has no body to say it in.
        """
        bucket, _ = self._bucket_and_key
        answer = self._ask(lambda: self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1))
        return next(iter(answer.get("Contents", ())), None)

    def write(self, data: bytes) -> None:
        """Put a whole object in one request."""
        self._ask(lambda: self._put(data))

    def _put(self, data: bytes) -> None:
        if not self._is_s3 and self._protocol not in ("gs", "gcs", "az", "abfs"):
            # Only protocols with real folders (sftp, memory) need them; a bucket is nothing to be made in passing.
            self._fs.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(self._path, data)

    def create(self, data: bytes) -> bool:
        """Put a whole object unless there is one."""
        if self._conditional:
            return self._put_if({"IfNoneMatch": "*"}, data)
        if self._ask(lambda: self._fs.exists(self._path)):
            return False
        self.write(data)
        return True

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare, and replace on the condition that nobody else has since."""
        if old is None:
            return self.create(data)
        found = self.info()
        if found is None or self.read() != old:
            return False
        if self._conditional:
            return self._put_if({"IfMatch": f'"{found.etag}"'}, data)
        self.write(data)
        return True

    def remove(self, old: bytes) -> bool:
        """Compare, then remove; not at once, which few stores can."""
        try:
            if self.read() != old:
                return False
        except FileNotFoundError:
            return False
        self.delete()
        return True

    @property
    def _conditional(self) -> bool:
        """Whether the store keeps conditions on a PUT; found out once a process and bucket, and said where it does not."""
        asked = (self._protocol, self._bucket_and_key[0], str(sorted(self.options.items())))
        with _conditional_lock:
            if asked not in _conditional:
                _conditional[asked] = self._is_s3 and self._keeps_conditions()
                if not _conditional[asked]:
                    log.warning(
                        "%s does not keep conditions on a write: see to it that one run at a time writes there", self.url
                    )
        return _conditional[asked]

    def _keeps_conditions(self) -> bool:
        """Put an object that must not be there, twice: a store that takes the second one ignores the condition."""
        probe = RemotePlace(f"{self.url}{_PROBE}{secrets.token_hex(6)}", self.options)
        try:
            return probe._put_if({"IfNoneMatch": "*"}, b"1") and not probe._put_if({"IfNoneMatch": "*"}, b"2")
        except RefusedError:
            return False
        finally:
            probe.delete()

    def _put_if(self, condition: dict[str, str], data: bytes) -> bool:
        """One conditional PUT; False when the condition does not hold (412) or another such PUT wins (409).

        When the answer to a PUT is lost, the next attempt finds the condition broken, by ourselves. So what stands there
        decides: nobody else writes these bytes.
        """
        bucket, key = self._bucket_and_key

        def put() -> bool:
            try:
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            except (OSError, ClientError) as error:
                if _code(error) not in _CONDITION_FAILED:
                    raise
                return False
            return True

        if self._ask(put):
            return True
        try:
            return self.read() == data
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Names directly below this folder."""
        try:
            found = self._ask(lambda: self._fs.ls(self._path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found} - {""})

    def walk(self) -> Iterator[pa.RecordBatch]:
        """Every object below this folder; on S3 page by page, several folders at once."""
        root = self._folder_key
        fast = self._fast(root)
        if fast is not None:
            with _as_oserror(self.url):
                pages = fast.walk(root, self._ask)
                yield from (_below(to_batch(page), root) for page in pages if page)
            return
        found = self._ask(lambda: self._fs.find(self._path, detail=True))
        start = self._path.rstrip("/") + "/"
        rows = (
            (path, int(one.get("size") or 0), _remote_version(one)) for path, one in found.items() if path.startswith(start)
        )
        yield from (_below(batch, start) for batch in _in_batches(rows))

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder, as fsspec lists it."""
        start = self._path.rstrip("/") + "/"
        for path, found in self._ask(lambda: self._fs.find(self._path, detail=True)).items():
            if path.startswith(start):
                key = path.removeprefix(start)
                size = int(found.get("size") or 0)
                yield ObjectInfo(f"{self.url}/{key}", key, size, _remote_version(found), _written(found))

    def uploads(self) -> Iterator[Upload]:
        """What S3 lists of them; no other protocol tells."""
        if not self._is_s3:
            return
        bucket, root = self._bucket_and_key[0], self._folder_key
        page: dict[str, Any] = {}
        while True:
            asked = {"Bucket": bucket, "Prefix": root, **page}
            answer = self._ask(partial(self._fs.call_s3, "list_multipart_uploads", **asked))
            for one in answer.get("Uploads", ()):
                if one["Key"].startswith(root):
                    yield Upload(one["Key"].removeprefix(root), _seconds(one["Initiated"]), one["UploadId"])
            if not answer.get("IsTruncated"):
                return
            page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def abort(self, upload: Upload) -> None:
        """Let the store forget its parts."""
        bucket, key = self._bucket_and_key[0], self._folder_key + upload.key
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.number))

    def delete(self) -> None:
        """Remove this object or all below it."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._fs.rm(self._path, recursive=True))

    def exists(self) -> bool:
        """Whether there is an object here, or anything below."""
        if self._is_s3 and self._anything_below():
            return True
        return bool(self._ask(lambda: self._fs.exists(self._path)))

    def _anything_below(self) -> bool:
        try:
            return self._first_below(self._folder_key) is not None
        except FileNotFoundError:
            return False

    def lacks_bucket(self) -> str | None:
        """The name of this place's bucket, if it does not exist."""
        name, _ = self._bucket_and_key
        return None if not self._is_s3 or self._ask(lambda: self._fs.exists(name)) else name

    def _ask(self, question: Callable[[], T]) -> T:
        def once() -> T:
            with _as_oserror(self.url):
                return question()

        return patiently(once)


_conditional: dict[tuple[str, str, str], bool] = {}
_conditional_lock = threading.RLock()


def _s3_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """One attempt a call and short timeouts for s3fs: patience is `patiently`'s, and two layers of it would multiply."""
    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": s3.CONNECT_SECONDS, "read_timeout": s3.REQUEST_SECONDS}
    return {"config_kwargs": {**config, **options.get("config_kwargs", {})}}


#: A part that starts with a dot and is neither `.` nor `..`, which in a bucket are names as good as others; a folder's marker.
_HIDDEN = r"(^|/)\.([^./]|\.[^/])|/$|^$"


def _below(listed: pa.RecordBatch, root: str) -> pa.RecordBatch:
    """A listing with keys relative to `root`, without what is hidden and without markers of folders."""
    keys = pc.utf8_slice_codeunits(listed["key"], len(root))
    hidden = pc.match_substring_regex(keys, _HIDDEN)
    return listed.set_column(0, LISTED.field("key"), keys).filter(pc.invert(hidden))


def _written(found: Mapping[str, Any]) -> float:
    return _seconds(found.get("LastModified") or found.get("mtime") or found.get("created"))


def _seconds(when: Any) -> float:
    """A time as a store tells it, in seconds since the epoch; 0 where it does not."""
    return float(when.timestamp()) if hasattr(when, "timestamp") else float(when or 0)


def _remote_version(found: Mapping[str, Any]) -> str:
    version = found.get("ETag") or found.get("etag") or found.get("mtime") or found.get("created") or found.get("LastModified")
    return str(version or "").strip('"')


#: How long a store that does not answer is waited for.
PATIENCE_SECONDS = 60.0


def patiently(call: Callable[[], T]) -> T:
    """Call until the store answers, for at most `PATIENCE_SECONDS`; what another attempt would not mend is raised at once.

    Waits are drawn between nothing and twice the last one's limit ("full jitter"), so that many do not come back as one.
    """
    retrying = Retrying(
        stop=stop_any(stop_after_delay(PATIENCE_SECONDS), stop_when_event_set(_hurry)),
        sleep=sleep_using_event(_hurry),
        wait=wait_random_exponential(multiplier=0.1, max=8),
        retry=retry_if_exception(passes),
        before_sleep=_say_waiting,
        reraise=True,
    )
    return retrying(call)


_hurry = threading.Event()


@contextmanager
def hurrying() -> Iterator[None]:
    """One attempt at everything while the block runs, in this process: to clean up after a store that failed, or Ctrl-C."""
    _hurry.set()
    try:
        yield
    finally:
        _hurry.clear()


def _say_waiting(state: RetryCallState) -> None:
    level = logging.WARNING if (state.seconds_since_start or 0) > _SECONDS_UNTIL_SAID else logging.INFO
    if state.outcome is not None:
        log.log(level, "waiting for the store: %s", state.outcome.exception())


_SECONDS_UNTIL_SAID = 5.0


_LASTING = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    ChangedError,
    RefusedError,
)


def passes(error: BaseException) -> bool:
    """Whether what a store answered may be gone with the next attempt."""
    return isinstance(error, OSError) and not isinstance(error, _LASTING)


_CONDITION_FAILED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_NO_CREDENTIALS = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
    | {"TokenRefreshRequired", "RequestTimeTooSkewed", "NoCredentialsError", "UnauthenticatedError"}
)
_KINDS: tuple[tuple[frozenset[str], type[OSError]], ...] = (
    (_NO_CREDENTIALS, CredentialsError),
    (_CONDITION_FAILED, ChangedError),
    (
        frozenset({"SlowDown", "ServiceUnavailable", "Throttling", "TooManyRequests", "RequestLimitExceeded", "503", "429"}),
        ThrottledError,
    ),
    (frozenset({"NoSuchKey", "NoSuchBucket", "404", "410"}), FileNotFoundError),
    # InvalidObjectState: it lies in an archive and would have to be restored first.
    (frozenset({"AccessDenied", "AllAccessDisabled", "Forbidden", "InvalidObjectState", "401", "403"}), PermissionError),
    (frozenset({"InvalidArgument", "InvalidRequest", "MethodNotAllowed", "NotImplemented", "400", "405", "501"}), RefusedError),
    (frozenset({"RequestTimeout", "ConnectTimeoutError", "ReadTimeoutError"}), TimeoutError),
)


@contextmanager
def _as_oserror(url: str) -> Iterator[None]:
    """What botocore, aiohttp and obstore raise, as an OSError of one line that names the place."""
    try:
        yield
    except _OUR_ERRORS:
        raise
    except Exception as error:
        code = _code(error)
        if isinstance(error, OSError) and (not code or str(error).startswith(url)):
            raise
        raise _kind(error, code)(f"{url}: {_sentence(error, code)}") from error


def _kind(error: Exception, code: str) -> type[OSError]:
    for codes, kind in _KINDS:
        if code in codes:
            return kind
    for known in (FileNotFoundError, PermissionError, FileExistsError):
        if isinstance(error, known):
            return known
    return TimeoutError if "timed out" in str(error) else OSError


_OUR_ERRORS = (ThrottledError, ChangedError, CredentialsError, RefusedError)


def _code(error: BaseException | None) -> str:
    """S3's word for what went wrong, wherever a library keeps it; empty where there is none."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return str(answer["Error"].get("Code", ""))
        status = getattr(error, "status", None)  # aiohttp's
        if isinstance(status, int):
            return str(status)
        found = re.search(r"<Code>(\w+)</Code>", str(error)) or re.search(
            r"(?:error response|status code):? (\d{3})", str(error)
        )
        if found:
            return found.group(1)
        if type(error).__name__ in _NAMES_THAT_TELL:
            return type(error).__name__
        error = error.__cause__
    return ""


_NAMES_THAT_TELL = frozenset({"NoCredentialsError", "UnauthenticatedError", "ConnectTimeoutError", "ReadTimeoutError"})


def _sentence(error: Exception, code: str) -> str:
    text = str(error)
    message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if message:
        return f"{code}: {message.group(1)}"
    request = re.search(r"Error performing (\w+) (\w+://[^/\s]+)\S* in \S+ - (.*)", text)
    if request:
        method, host, reason = request.groups()
        return f"{method} {host}: {reason.replace('error sending request', 'the connection failed')[:300]}"
    first = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return f"{code}: {first[:300]}" if code and code not in first else first[:300]


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
        self._place = 0
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
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as asked for, or all that are left."""
        left = max(0, self._size - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        taken = []
        while wanted:
            piece = self._at(self._place)[:wanted]
            if not piece:
                break  # shorter than it was listed with: whoever reads it finds its end torn
            taken.append(piece)
            self._place += len(piece)
            wanted -= len(piece)
        return b"".join(taken)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _at(self, place: int) -> memoryview:
        """What is left of the piece that holds a place."""
        if not self._start <= place < self._start + len(self._piece):
            ahead, self._next = self._next, None
            forwards = place in (0, self._start + len(self._piece))
            if ahead is not None and ahead[0] == place:
                self._start, self._piece = place, ahead[1].result()
            else:
                self._start, self._piece = place, self._fetch(place, min(place + self._PIECE, self._size))
            end = place + len(self._piece)
            if forwards and self._piece and end < self._size:
                self._next = end, self._pool.submit(self._fetch, end, min(end + self._PIECE, self._size))
        return memoryview(self._piece)[place - self._start :]

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def open_patiently(place: Place, size: int) -> RangeFile:
    """An object of so many bytes as a file that can seek; a store that does not answer is waited for at every piece."""
    return RangeFile(lambda start, end: patiently(lambda: place.fetch(start, end)), size)


def require_folder(place: Place) -> None:
    """Raises StoreError where there is nothing at `place`, with the one sentence a person needs."""
    try:
        found = place.exists()
    except PermissionError as error:
        raise StoreError(f"The store {place.url} may not be read: {error}.") from None
    if not found:
        bucket = place.lacks_bucket() if isinstance(place, RemotePlace) else None
        missing = f"there is no bucket {bucket!r}" if bucket else "there is nothing under this name"
        raise StoreError(f"The store {place.url} does not exist: {missing}.")


def local_copy(place: Place, names: Mapping[str, str], cache: Path) -> Path:
    """A folder on this machine that holds the files `names` (name -> sha256) of `place`.

    A local place is used where it lies. A remote one is downloaded once a machine into `cache`, whose name its caller
    chose from the contents: a second worker finds it finished or makes its own and loses the rename.

    Raises:
        ConfigError: others may write where the caches are, and so into what is about to be loaded.
    """
    if isinstance(place, LocalPlace):
        return place.path
    cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = cache.parent.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{cache.parent} can be written by others: remove it, or let TMPDIR name another folder.")
    if cache.is_dir():
        return cache
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
