"""A URL of any fsspec protocol as a storage location; on S3 with conditional writes and fast reads through obstore."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from botocore.exceptions import ClientError

from tlbatch.errors import RefusedError
from tlbatch.storage import s3
from tlbatch.storage.failures import CONDITION_FAILED, as_oserror, error_code
from tlbatch.storage.location import LISTED, PROBE_INFIX, ObjectInfo, Upload, in_batches, to_batch
from tlbatch.storage.retry import with_retries

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteLocation:
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

    def join(self, *names: str) -> RemoteLocation:
        """The place `names` below this one."""
        below = RemoteLocation("/".join((self.url.rstrip("/"), *names)), self.options)
        if "_fs" in self.__dict__:
            below.__dict__["_fs"] = self._fs  # finding it takes longer than reading a small object
        return below

    def read(self) -> bytes:
        """The whole object."""
        return with_retries(self.fetch)

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object or a part of it. Only S3 can say that it is another version."""
        with as_oserror(self.url):
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
        probe = RemoteLocation(f"{self.url}{PROBE_INFIX}{secrets.token_hex(6)}", self.options)
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
                if error_code(error) not in CONDITION_FAILED:
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
            with as_oserror(self.url):
                pages = fast.walk(root, self._ask)
                yield from (_below(to_batch(page), root) for page in pages if page)
            return
        found = self._ask(lambda: self._fs.find(self._path, detail=True))
        start = self._path.rstrip("/") + "/"
        rows = (
            (path, int(one.get("size") or 0), _remote_version(one)) for path, one in found.items() if path.startswith(start)
        )
        yield from (_below(batch, start) for batch in in_batches(rows))

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
            with as_oserror(self.url):
                return question()

        return with_retries(once)


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
