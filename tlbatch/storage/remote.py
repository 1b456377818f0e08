"""A URL of any fsspec protocol -> a storage location; on S3 with conditional writes, and fast reads through obstore."""

from __future__ import annotations

import contextlib
import itertools
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
from tlbatch.storage import s3, s3_listing
from tlbatch.storage.failures import CONDITION_FAILED, as_oserror, error_code
from tlbatch.storage.location import (
    EVERYTHING,
    LISTED,
    OBJECTS_PER_BATCH,
    PROBE_INFIX,
    ObjectInfo,
    Upload,
    WalkRules,
    to_batch,
)
from tlbatch.storage.retry import with_retries

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteLocation:
    """A folder or object at a URL of any fsspec protocol.

    S3 writes conditionally. Elsewhere `create` and `swap` check first and then write, which is safe with one writer at a time.
    Every method except `fetch` retries transient errors for up to `RETRY_SECONDS`. Exceptions of libraries become OSErrors.
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
        defaults = _s3_defaults(self.options) if self._is_s3 else {}
        return fsspec.filesystem(self._protocol, **{"use_listings_cache": False, **defaults, **self.options})

    @cached_property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.url))

    @property
    def _bucket_and_key(self) -> tuple[str, str]:
        bucket, _, key = self._path.partition("/")
        return bucket, key

    @property
    def _folder_key(self) -> str:
        """The prefix of all keys below this location."""
        _, key = self._bucket_and_key
        return key.rstrip("/") + "/" if key else ""

    def _obstore_bucket(self, key: str) -> s3.Bucket | None:
        """The bucket through obstore, which is faster than fsspec; None if obstore cannot handle the options or the key."""
        if not (self._is_s3 and s3.serves(self.options) and s3.can_name(key)):
            return None
        return s3.bucket(self._fs, self._bucket_and_key[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def join(self, *names: str) -> RemoteLocation:
        """The location `names` below this one."""
        below = RemoteLocation("/".join((self.url.rstrip("/"), *names)), self.options)
        if "_fs" in self.__dict__:
            below.__dict__["_fs"] = self._fs  # looking it up takes longer than reading a small object
        return below

    def read(self) -> bytes:
        """The whole object."""
        return with_retries(self.fetch)

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object or a part of it; only S3 checks `etag`."""
        with as_oserror(self.url):
            _, key = self._bucket_and_key
            bucket = self._obstore_bucket(key)
            if bucket is not None:
                return bucket.get(key, start, end, etag)
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
        archived = self._is_archived(self._path, found)
        return ObjectInfo(self.url, name, int(found.get("size") or 0), _remote_version(found), _written(found), archived)

    def _listed_info(self) -> dict[str, Any]:
        """This object's entry in a listing, which may be permitted where reading is not, and whose errors have a reason."""
        _, key = self._bucket_and_key
        found = self._first_below(key)
        if found is None or found["Key"] != key:
            raise FileNotFoundError(self.url)
        listed = {name: found.get(name) for name in ("ETag", "LastModified", "StorageClass")}
        return {"type": "file", "size": found["Size"], **listed}

    def _first_below(self, prefix: str) -> dict[str, Any] | None:
        """The listing entry of the bucket's first object whose key begins with `prefix`; None if there is none.

        A refused listing comes with a reason. A refused HEAD, which s3fs would use, has no body and therefore no reason.
        """
        bucket, _ = self._bucket_and_key
        answer = self._ask(lambda: self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1))
        return next(iter(answer.get("Contents", ())), None)

    def write(self, data: bytes) -> None:
        """Write a whole object in one request."""
        self._ask(lambda: self._put(data))

    def _put(self, data: bytes) -> None:
        if not self._is_s3 and self._protocol not in ("gs", "gcs", "az", "abfs"):
            # Only protocols with real folders (sftp, memory) need this; a bucket must not be created as a side effect.
            self._fs.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(self._path, data)

    def create(self, data: bytes) -> bool:
        """Write a whole object if it does not exist."""
        if self._conditional:
            return self._put_if({"IfNoneMatch": "*"}, data)
        if self._ask(lambda: self._fs.exists(self._path)):
            return False
        self.write(data)
        return True

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare, and replace on the condition that no other process has replaced the object since."""
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
        """Compare, then remove, in two requests; few stores support a conditional delete."""
        try:
            if self.read() != old:
                return False
        except FileNotFoundError:
            return False
        self.delete()
        return True

    @property
    def _conditional(self) -> bool:
        """Whether the store supports conditional PUTs; probed once per process and bucket, with a warning if it does not."""
        store = (self._protocol, self._bucket_and_key[0], str(sorted(self.options.items())))
        with _conditional_lock:
            if store not in _conditional:
                _conditional[store] = self._is_s3 and self._probe_conditional_put()
                if not _conditional[store]:
                    log.warning("%s ignores conditional writes. Make sure only one run at a time writes to it.", self.url)
        return _conditional[store]

    def _probe_conditional_put(self) -> bool:
        """Create the same object twice with `If-None-Match`; a store that accepts the second PUT ignores the condition."""
        probe = RemoteLocation(f"{self.url}{PROBE_INFIX}{secrets.token_hex(6)}", self.options)
        try:
            return probe._put_if({"IfNoneMatch": "*"}, b"1") and not probe._put_if({"IfNoneMatch": "*"}, b"2")
        except RefusedError:
            return False
        finally:
            probe.delete()

    def _put_if(self, condition: dict[str, str], data: bytes) -> bool:
        """Make one conditional PUT; False if the condition does not hold (412) or a concurrent conditional PUT wins (409).

        If the answer to a successful PUT is lost, the retry fails its condition because of the first attempt. Therefore the
        stored content decides: no other process writes these bytes.
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
        return sorted(set(map(_last_part, self._entries())) - {""})

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted."""
        return sorted({_last_part(entry) for entry in self._entries() if entry["type"] == "directory"} - {""})

    def _entries(self) -> list[Mapping[str, Any]]:
        """What fsspec says of each object and folder directly below this folder."""
        try:
            return list(self._ask(lambda: self._fs.ls(self._path, detail=True)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
        """Every object below this folder; on S3 page by page, several folders at once."""
        root = self._folder_key
        bucket = self._obstore_bucket(root)
        if bucket is not None:
            below = WalkRules(
                lambda folder: rules.skips(folder.removeprefix(root)),
                lambda folder, reason: rules.passed(folder.removeprefix(root), reason),
            )
            with as_oserror(self.url):
                yield from (_below(page, root) for page in bucket.walk(root, self._ask, below))
            return
        found = self._ask(lambda: self._fs.find(self._path, detail=True))
        start = self._path.rstrip("/") + "/"
        below_here = (item for item in found.items() if item[0].startswith(start))
        while chunk := list(itertools.islice(below_here, OBJECTS_PER_BATCH)):
            batch = to_batch([(path, int(one.get("size") or 0), _remote_version(one)) for path, one in chunk])
            archived = pa.array([self._is_archived(path, one) for path, one in chunk], pa.bool_())
            yield _below(batch.set_column(3, LISTED.field("archived"), archived), start)

    def _is_archived(self, path: str, found: Mapping[str, Any]) -> bool:
        """Whether a listed object of S3 must be restored before it can be read."""
        if not self._is_s3 or found.get("StorageClass") not in s3_listing.ARCHIVES:
            return False
        bucket, _, key = path.partition("/")
        return not s3_listing.is_restored(lambda: self._fs.call_s3("head_object", Bucket=bucket, Key=key))

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder, as fsspec lists it."""
        start = self._path.rstrip("/") + "/"
        for path, found in self._ask(lambda: self._fs.find(self._path, detail=True)).items():
            if path.startswith(start):
                key = path.removeprefix(start)
                size = int(found.get("size") or 0)
                yield ObjectInfo(f"{self.url}/{key}", key, size, _remote_version(found), _written(found))

    def uploads(self) -> Iterator[Upload]:
        """Unfinished multipart uploads that S3 lists below this folder; none for other protocols."""
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
        """Abort a multipart upload, so that the store deletes its parts."""
        bucket, key = self._bucket_and_key[0], self._folder_key + upload.key
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.number))

    def delete(self) -> None:
        """Remove this object, or everything below this folder."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._fs.rm(self._path, recursive=True))

    def exists(self) -> bool:
        """Whether this object exists, or any object below this folder."""
        if self._is_s3 and self._anything_below():
            return True
        return bool(self._ask(lambda: self._fs.exists(self._path)))

    def _anything_below(self) -> bool:
        try:
            return self._first_below(self._folder_key) is not None
        except FileNotFoundError:
            return False

    def lacks_bucket(self) -> str | None:
        """The name of this location's bucket if the bucket does not exist, else None."""
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
    """One attempt per call and short timeouts for s3fs; only `with_retries` retries, since two layers would multiply waits."""
    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": s3.CONNECT_SECONDS, "read_timeout": s3.REQUEST_SECONDS}
    return {"config_kwargs": {**config, **options.get("config_kwargs", {})}}


def _below(listed: pa.RecordBatch, root: str) -> pa.RecordBatch:
    """A listing with keys relative to `root`, without folder markers."""
    keys = pc.utf8_slice_codeunits(listed["key"], len(root)) if root else listed["key"]
    markers = pc.or_(pc.ends_with(keys, "/"), pc.equal(keys, ""))
    return listed.set_column(0, LISTED.field("key"), keys).filter(pc.invert(markers))


def _written(found: Mapping[str, Any]) -> float:
    return _seconds(found.get("LastModified") or found.get("mtime") or found.get("created"))


def _seconds(when: Any) -> float:
    """A store's timestamp in seconds since the epoch; 0 if there is none."""
    return float(when.timestamp()) if hasattr(when, "timestamp") else float(when or 0)


def _remote_version(found: Mapping[str, Any]) -> str:
    version = found.get("ETag") or found.get("etag") or found.get("mtime") or found.get("created") or found.get("LastModified")
    return str(version or "").strip('"')


def _last_part(entry: Mapping[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
