"""A URL of any fsspec protocol -> a storage location; on S3 with conditional writes, and fast reads through obstore."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from tlbatch.errors import RefusedError, TlbatchError
from tlbatch.storage import s3, s3_listing
from tlbatch.storage.conditions import Conditions, S3Attempts, known, probe, put_if
from tlbatch.storage.failures import as_config_error, as_oserror
from tlbatch.storage.location import (
    EVERYTHING,
    LISTED,
    OBJECTS_PER_BATCH,
    PROBE,
    UNREADABLE,
    ObjectInfo,
    Upload,
    WalkRules,
    objects_below,
    to_batch,
)
from tlbatch.storage.obstore_client import CONNECT_SECONDS, REQUEST_SECONDS, can_name
from tlbatch.storage.retry import with_retries

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Most objects of one request that deletes several, and requests at once.
_DELETED_AT_ONCE, _DELETERS = 1_000, 16


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
        """The file system of fsspec, connected; raises ConfigError if the options or the environment are wrong."""
        classes = fsspec.get_filesystem_class(self._protocol).__mro__
        known = {name for one in classes for name in inspect.signature(one.__init__).parameters}
        with as_config_error(self._protocol, known):
            defaults = _s3_defaults(self.options) if self._is_s3 else {}
            found = fsspec.filesystem(self._protocol, **{"use_listings_cache": False, **defaults, **self.options})
            if self._is_s3:
                found.connect()
                _ = urlsplit(found.s3.meta.endpoint_url).port  # which botocore does not look at
        return found

    @property
    def filesystem(self) -> Any:
        """The file system of fsspec that reaches it, for a library that takes one."""
        return self._fs

    def object_store_settings(self) -> dict[str, str]:
        """Endpoint and credentials of a bucket of S3 as libraries on Rust's `object_store` take them; elsewhere none."""
        return s3.object_store_settings(self._fs, self._bucket_and_key[0]) if self._is_s3 else {}

    @cached_property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.url))

    @property
    def _bucket_and_key(self) -> tuple[str, str]:
        # fsspec takes a slash off the end, which belongs to a key of S3.
        bucket, _, key = (self.url.partition("://")[2] if self._is_s3 else self._path).partition("/")
        return bucket, key

    @property
    def _folder_key(self) -> str:
        """The prefix of all keys below this location."""
        _, key = self._bucket_and_key
        return key.rstrip("/") + "/" if key else ""

    def _obstore_bucket(self, key: str) -> s3.Bucket | None:
        """The bucket through obstore, which is faster than fsspec; None if obstore cannot handle the options or the key."""
        if not (self._is_s3 and s3.serves(self.options) and can_name(key)):
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
            if not self._is_s3:
                return cast("bytes", self._fs.cat_file(self._path, start=start or None, end=end))
            name, key = self._bucket_and_key
            bucket = self._obstore_bucket(key)
            if bucket is not None and (bucket.marks_ranges or not (start or end is not None)):
                with contextlib.suppress(s3.UnmarkedRangeError):
                    return bucket.get(key, start, end, etag)
            return s3.get_object(self._fs, name, key, start, end, etag)

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

    def is_public(self) -> bool:
        """Whether S3 lists this folder to anybody, if these options ask with credentials."""
        if not self._is_s3 or self.options.get("anon"):
            return False
        try:
            return RemoteLocation(self.url, {**self.options, "anon": True})._first_below(self._folder_key) is not None
        except (OSError, TlbatchError):
            return False

    def write(self, data: bytes | mmap.mmap) -> None:
        """Write a whole object, in one request unless it is larger than about 100 MB."""
        self._ask(lambda: self._put(data))

    def _put(self, data: bytes | mmap.mmap) -> None:
        if not self._is_s3:
            # Only protocols with real folders (sftp, memory) need this; a bucket must not be created as a side effect.
            self._fs.makedirs(self._path.rsplit("/", 1)[0], exist_ok=True)
        if isinstance(data, mmap.mmap):
            data.seek(0)  # an earlier attempt may have read from it as from a file
        self._fs.pipe_file(self._path, data)

    def create(self, data: bytes) -> bool:
        """Write a whole object if it does not exist."""
        if self._conditions.create:
            return self._put_if(data, IfNoneMatch="*")
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
        if self._conditions.replace:
            return self._put_if(data, IfMatch=f'"{found.etag}"')
        self.write(data)
        return True

    def remove(self, old: bytes) -> bool:
        """Compare, then remove, in two requests; few stores support a conditional delete."""
        try:
            if self.read() != old:
                return False
        except FileNotFoundError:
            return False
        self.unlink()
        return True

    @property
    def _conditions(self) -> Conditions:
        """The conditions that the store keeps; probed once per process and bucket, with a warning if some are missing."""
        name, key = self._bucket_and_key

        def find() -> Conditions:
            folder = key.rpartition("/")[0]
            attempts = S3Attempts(self._call, name, f"{folder}/{PROBE}" if folder else PROBE)
            found = probe(attempts) if self._is_s3 else Conditions()
            found.warn(f"{self._protocol}://{name}", "" if self._is_s3 else "conditional writes")
            return found

        return known((self._protocol, name, str(sorted(self.options.items()))), find)

    def _put_if(self, data: bytes, **condition: str) -> bool:
        """Make one conditional PUT; False if the condition does not hold.

        If the answer to a successful PUT is lost, the retry fails its condition because of the first attempt. Therefore the
        stored content decides: no other process writes these bytes.
        """
        if put_if(self._call, *self._bucket_and_key, data, **condition):
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
        bucket = self._ask(lambda: self._obstore_bucket(root.removesuffix("/")))
        if bucket is not None:
            below = WalkRules(
                lambda folder: rules.skips(folder.removeprefix(root)),
                lambda folder, reason: rules.passed(folder.removeprefix(root), reason),
                bounds=[root + bound for bound in rules.bounds],
            )
            with as_oserror(self.url):
                yield from (objects_below(page, root, rules) for page in bucket.walk(root, self._ask, below))
            return
        start = self._path.rstrip("/") + "/"
        found = self._walk_folders(start, rules) if self._has_folders else self._find()
        below_here = (item for item in found if item[0].startswith(start))
        while chunk := list(itertools.islice(below_here, OBJECTS_PER_BATCH)):
            batch = to_batch([(path, int(one.get("size") or 0), _remote_version(one)) for path, one in chunk])
            archived = pa.array([self._is_archived(path, one) for path, one in chunk], pa.bool_())
            yield objects_below(batch.set_column(3, LISTED.field("archived"), archived), start, rules)

    @property
    def _has_folders(self) -> bool:
        """Whether the protocol has real folders, and nothing of its own that finds all objects below one."""
        return not isinstance(self._fs, AsyncFileSystem) and type(self._fs).find is AbstractFileSystem.find

    def _find(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every object below this folder, as fsspec finds it."""
        yield from self._ask(lambda: self._fs.find(self._path, detail=True)).items()

    def _walk_folders(self, start: str, rules: WalkRules, folder: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The same, folder by folder: fsspec's own walk takes a folder that it cannot list for an empty one."""
        try:
            entries = self._ask(lambda: self._fs.ls((start + folder).rstrip("/") or "/", detail=True))
        except FileNotFoundError:  # removed since the folder above was listed
            return
        except PermissionError:
            if not folder:
                raise
            rules.passed(folder, UNREADABLE)
            return
        for entry in sorted(entries, key=lambda one: str(one["name"])):
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                yield path, entry
            elif path != (start + folder).rstrip("/") and not rules.skips(f"{path.removeprefix(start)}/"):
                yield from self._walk_folders(start, rules, f"{path.removeprefix(start)}/")

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
        """Unfinished multipart uploads that S3 lists below this folder; none for other protocols and simple servers."""
        if not self._is_s3:
            return
        bucket, root = self._bucket_and_key[0], self._folder_key
        page: dict[str, Any] = {}
        while True:
            asked = {"Bucket": bucket, "Prefix": root, **page}
            try:
                answer = self._call("list_multipart_uploads", **asked)
            except (RefusedError, FileNotFoundError) as error:  # half of the servers tried do not list them
                log.info("unfinished uploads are not listed: %s", error)
                return
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
            self._call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.number)

    def unlink(self) -> None:
        """Remove this object, on S3 with one request."""
        if self._is_s3:
            self._delete_key(self._bucket_and_key[1])
        else:
            self.delete()

    def delete(self) -> None:
        """Remove this object, or everything below this folder."""
        if not self._is_s3:
            with contextlib.suppress(FileNotFoundError):
                self._ask(lambda: self._fs.rm(self._path, recursive=True))
            return
        if self.info() is not None:
            self.unlink()
        keys = self._keys_below()
        with ThreadPoolExecutor(_DELETERS, thread_name_prefix="tlbatch-delete") as pool:
            at_once = (keys[start : start + _DELETED_AT_ONCE] for start in range(0, len(keys), _DELETED_AT_ONCE))
            left = [key for some in pool.map(self._delete_keys, at_once) for key in some]
            list(pool.map(self._delete_key, left))

    def _keys_below(self) -> list[str]:
        asked: dict[str, Any] = {"Bucket": self._bucket_and_key[0], "Prefix": self._folder_key}
        keys = list[str]()
        with contextlib.suppress(FileNotFoundError):
            while "ContinuationToken" not in asked or asked["ContinuationToken"]:
                answer = self._call("list_objects_v2", **asked)
                keys += [found["Key"] for found in answer.get("Contents", ())]
                asked["ContinuationToken"] = answer.get("NextContinuationToken") if answer.get("IsTruncated") else None
        return keys

    def _delete_keys(self, keys: Sequence[str]) -> Sequence[str]:
        """Delete objects with one request, which not every server knows; returns those that have to be deleted one by one."""
        objects = {"Objects": [{"Key": key} for key in keys]}  # not every server knows `Quiet`
        try:
            with as_oserror(self.url):
                answer = self._fs.call_s3("delete_objects", Bucket=self._bucket_and_key[0], Delete=objects)
        except OSError as error:
            log.info("several objects cannot be deleted with one request: %s", error)
            return keys
        return [found["Key"] for found in answer.get("Errors", ()) if "Key" in found]

    def _delete_key(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete_object", Bucket=self._bucket_and_key[0], Key=key)

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

    def head_etag(self) -> str | None:
        """The version of this object of S3, asked for without a listing; None if the store says that it does not exist.

        Raises:
            PermissionError: the store does not say it: without ListBucket, Amazon refuses what does not exist.
        """
        name, key = self._bucket_and_key
        try:
            return _remote_version(self._call("head_object", Bucket=name, Key=key))
        except FileNotFoundError:
            return None

    def may_have_bucket(self) -> bool:
        """Whether the store does not say that this location's bucket of S3 does not exist; asked for without a listing."""
        try:
            self._call("head_bucket", Bucket=self._bucket_and_key[0])
        except FileNotFoundError:
            return False
        except PermissionError:
            pass  # it exists, or belongs to somebody else
        return True

    def lacks_bucket(self) -> str | None:
        """The name of this location's bucket if the bucket does not exist, else None."""
        name, _ = self._bucket_and_key
        return None if not self._is_s3 or self._ask(lambda: self._fs.exists(name)) else name

    def _call(self, operation: str, **asked: Any) -> Any:
        """Make a request to S3 by the name of botocore's operation."""
        return self._ask(lambda: self._fs.call_s3(operation, **asked))

    def _ask(self, question: Callable[[], T]) -> T:
        def once() -> T:
            with as_oserror(self.url):
                return question()

        return with_retries(once)


def _s3_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """One attempt per call and short timeouts for s3fs; only `with_retries` retries, since two layers would multiply waits."""
    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": CONNECT_SECONDS, "read_timeout": REQUEST_SECONDS}
    return {"config_kwargs": {**config, **options.get("config_kwargs", {})}}


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
