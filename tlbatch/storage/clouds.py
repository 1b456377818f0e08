"""A URL of Google Cloud Storage or Azure Blob Storage -> a storage location with conditional writes, through obstore."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar, cast

import pyarrow as pa

from tlbatch.errors import ChangedError, ConfigError, RefusedError, StoreError, line_of
from tlbatch.storage import azure, gcs
from tlbatch.storage.conditions import Conditions, known, probe
from tlbatch.storage.failures import as_oserror
from tlbatch.storage.location import EVERYTHING, PROBE, ObjectInfo, Upload, WalkRules, in_batches, objects_below
from tlbatch.storage.obstore_client import Address, can_name, client_options, get_options, plain_etag, require_version
from tlbatch.storage.retry import with_retries

log = logging.getLogger(__name__)

T = TypeVar("T")

PROTOCOLS = (*azure.PROTOCOLS, *gcs.PROTOCOLS)
#: Bytes of an object that is not written with one request, and of a piece of it; objects of one request to a listing.
_LARGE, _PIECE, _LISTED_AT_ONCE = 100 << 20, 16 << 20, 5_000
#: Objects that are deleted at once.
_DELETED_AT_ONCE = 1_000


@dataclass(frozen=True)
class CloudLocation:
    """A folder or object in a bucket of Google or in a container of Azure.

    Every method except `fetch` retries transient errors for up to `RETRY_SECONDS`. Exceptions of obstore become OSErrors.
    Keys are paths: a key with an empty part, as `a//b`, cannot be reached.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def _protocol(self) -> str:
        return self.url.split("://", 1)[0]

    @cached_property
    def _address(self) -> Address:
        read = azure.address if self._protocol in azure.PROTOCOLS else gcs.address
        return read(self.url, self.options)

    @property
    def _root(self) -> CloudLocation:
        """The bucket as a whole."""
        return CloudLocation("/".join(self.url.split("/")[:3]), self.options)

    @property
    def _key(self) -> str:
        """The key; raises RefusedError if obstore cannot name it."""
        if not can_name(self._address.key):
            raise RefusedError(f"{self.url}: a key with an empty part, '.', '..' or a control character cannot be reached")
        return self._address.key

    @property
    def _store(self) -> Any:
        """The client of obstore; raises ConfigError if options or environment are wrong."""
        bucket, _, settings = self._address
        return _client("az" if self._protocol in azure.PROTOCOLS else "gs", bucket, json.dumps(settings, sort_keys=True))

    @property
    def filesystem(self) -> Any:
        """A file system of fsspec that reaches it, for a library that takes one."""
        from obstore.fsspec import FsspecStore

        settings = self._address.settings
        kind = cast("Any", FsspecStore)
        return kind(self._protocol, config=settings, client_options=client_options(plain_http=_is_plain(settings)))

    def object_store_settings(self) -> dict[str, str]:
        """Endpoint and credentials as libraries on Rust's `object_store` take them, besides those of the environment."""
        settings = self._address.settings
        found = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}
        return {**found, **({"allow_http": "true"} if _is_plain(settings) else {})}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def join(self, *names: str) -> CloudLocation:
        """The location `names` below this one."""
        return CloudLocation("/".join((self.url.rstrip("/"), *names)), self.options)

    def read(self) -> bytes:
        """The whole object."""
        return with_retries(self.fetch)

    def fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The object or a part of it, of the version `etag` if that is given."""
        return self._fetch(start, end, etag)[0]

    def _fetch(self, start: int = 0, end: int | None = None, etag: str | None = None) -> tuple[bytes, Mapping[str, Any]]:
        """Bytes, and what the store says of the object."""
        import obstore

        with self._errors():
            answer = obstore.get(self._store, self._key, options=cast("Any", get_options(start, end, etag)))
            require_version(self.url, answer.meta["e_tag"] or "", etag)
            return bytes(answer.bytes()), cast("Mapping[str, Any]", answer.meta)

    def info(self) -> ObjectInfo | None:
        """Size and version of this object."""
        import obstore

        if not self._key:
            return None
        try:
            found = self._ask(lambda: obstore.head(self._store, self._key))
        except FileNotFoundError:
            return None
        name = self.url.rsplit("/", 1)[-1]
        return ObjectInfo(self.url, name, found["size"], _plain(found["e_tag"]), found["last_modified"].timestamp())

    def write(self, data: bytes | mmap.mmap) -> None:
        """Write a whole object, in one request unless it is larger than 100 MiB."""
        self._ask(lambda: self._put(data))

    def _put(self, data: bytes | mmap.mmap, mode: Any = None) -> None:
        import obstore

        many = mode is None and len(data) > _LARGE
        obstore.put(self._store, self._key, data, mode=mode, use_multipart=many, chunk_size=_PIECE)

    def create(self, data: bytes) -> bool:
        """Write a whole object if it does not exist."""
        if self._conditions.create:
            return self._put_if(data, "create")
        if self.info() is not None:
            return False
        self.write(data)
        return True

    def swap(self, data: bytes, old: bytes | None) -> bool:
        """Compare, and replace on the condition that no other process has replaced the object since."""
        if old is None:
            return self.create(data)
        try:
            current, found = with_retries(self._fetch)
        except FileNotFoundError:
            return False
        if current != old:
            return False
        if self._conditions.replace:
            return self._put_if(data, {name: found[name] for name in ("e_tag", "version") if found[name]})
        self.write(data)
        return True

    def remove(self, old: bytes) -> bool:
        """Compare, then remove, in two requests."""
        try:
            if self.read() != old:
                return False
        except FileNotFoundError:
            return False
        self.unlink()
        return True

    def _put_if(self, data: bytes, mode: Any) -> bool:
        """Write on a condition; False if it does not hold.

        If the answer to a successful request is lost, the retry fails its condition because of the first attempt. Therefore the
        stored content decides: no other process writes these bytes.
        """
        try:
            self._ask(lambda: self._put(data, mode))
        except (ChangedError, FileNotFoundError):
            try:
                return self.read() == data
            except FileNotFoundError:
                return False
        return True

    @property
    def _conditions(self) -> Conditions:
        """The conditions that the store keeps; probed once per process and bucket, with a warning if some are missing."""
        bucket, key, settings = self._address

        def find() -> Conditions:
            found = probe(_Attempts(self._root.join(*key.split("/")[:-1], PROBE)))
            found.warn(f"{self._protocol}://{bucket}")
            return found

        return known((self._protocol, bucket, json.dumps(settings, sort_keys=True)), find)

    def names(self) -> list[str]:
        """Names directly below this folder."""
        folders, objects = self._level()
        return sorted({*folders, *objects})

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, sorted."""
        return sorted(self._level()[0])

    def _level(self) -> tuple[list[str], list[str]]:
        """Names of the folders, and of the objects, directly below this one."""
        import obstore

        try:
            found = self._ask(lambda: obstore.list_with_delimiter(self._store, self._key or None))
        except FileNotFoundError:
            return [], []
        below = [path.rsplit("/", 1)[-1] for path in found["common_prefixes"]]
        return below, [one["path"].rsplit("/", 1)[-1] for one in found["objects"]]

    def walk(self, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
        """Every object below this folder, page by page."""
        root = f"{self._key.rstrip('/')}/" if self._key else ""
        listed = ((one["path"], one["size"], _plain(one["e_tag"])) for one in self._listed())
        yield from (objects_below(batch, root, rules) for batch in in_batches(listed))

    def contents(self) -> Iterator[ObjectInfo]:
        """Every object below this folder."""
        start = len(f"{self._key.rstrip('/')}/") if self._key else 0
        for one in self._listed():
            key = one["path"][start:]
            yield ObjectInfo(f"{self.url}/{key}", key, one["size"], _plain(one["e_tag"]), one["last_modified"].timestamp())

    def _listed(self) -> Iterator[Mapping[str, Any]]:
        """What the store says of each object below this folder. After an error the listing goes on behind the last object."""
        import obstore

        pages: Iterator[Any] | None = None
        last: str | None = None

        def next_page() -> Sequence[Mapping[str, Any]] | None:
            nonlocal pages
            try:
                with self._errors():
                    pages = pages or iter(obstore.list(self._store, self._key or None, offset=last, chunk_size=_LISTED_AT_ONCE))
                    return next(pages, None)
            except OSError:
                pages = None
                raise

        while page := with_retries(next_page):
            yield from page
            last = page[-1]["path"]

    def uploads(self) -> Iterator[Upload]:
        """None: Azure discards unfinished blocks after a week, and obstore does not list those of Google."""
        return iter(())

    def abort(self, upload: Upload) -> None:
        """Nothing: there are none."""

    def unlink(self) -> None:
        """Remove this object."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: obstore.delete(self._store, self._key))

    def delete(self) -> None:
        """Remove this object, or everything below this folder."""
        import obstore

        if self._key:
            self.unlink()
        below = (one["path"] for one in self._listed())
        while some := list(itertools.islice(below, _DELETED_AT_ONCE)):
            with contextlib.suppress(FileNotFoundError):
                self._ask(partial(obstore.delete, self._store, some))

    def exists(self) -> bool:
        """Whether this object exists, or any object below this folder."""
        try:
            return self.info() is not None or next(self._listed(), None) is not None
        except FileNotFoundError:
            return False

    def is_public(self) -> bool:
        """Whether the store lists this folder to anybody, if these options ask with credentials."""
        if self._address.settings.get("skip_signature"):
            return False
        try:
            return CloudLocation(self.url, {**self.options, "anon": True}).exists()
        except (OSError, ConfigError):
            return False

    def lacks_bucket(self) -> str | None:
        """The name of this location's bucket if the bucket does not exist, else None."""
        try:
            next(self._root._listed(), None)
        except FileNotFoundError:
            return self._address.bucket
        except StoreError:
            pass  # about one of its names
        return None

    def _ask(self, question: Callable[[], T]) -> T:
        def once() -> T:
            with self._errors():
                return question()

        return with_retries(once)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn exceptions of obstore into OSErrors."""
        from obstore import exceptions

        with as_oserror(self.url):
            try:
                yield
            except (exceptions.PreconditionError, exceptions.AlreadyExistsError) as error:
                raise ChangedError(f"{self.url}: the condition of the request does not hold") from error
            except exceptions.InvalidPathError as error:
                found = _NO_PATH.search(str(error))
                raise StoreError(
                    f"{self.url} has an object whose name cannot be listed here{f', {found[1]!r}' if found else ''}: it has an "
                    "empty part, '.', '..' or a control character. Name a folder without it, or a list of addresses."
                ) from None


@dataclass(frozen=True)
class _Attempts:
    """Requests for an object that is there, with conditions that do not hold."""

    location: CloudLocation

    def write(self) -> None:
        """Without a condition."""
        self.location.write(b"")

    def create(self) -> None:
        """As if it did not exist."""
        self.location._ask(lambda: self.location._put(b"", "create"))

    def replace(self) -> None:
        """As if it were another version."""
        self.location._ask(lambda: self.location._put(b"", {"e_tag": '"0x0"', "version": "1"}))

    def read(self) -> None:
        """Another version."""
        with_retries(lambda: self.location.fetch(etag="0x0"))

    def unlink(self) -> None:
        """Remove it."""
        self.location.unlink()


@lru_cache(maxsize=64)
def _client(service: str, bucket: str, settings: str) -> Any:
    """The client of a bucket, created once per process.

    Raises:
        ConfigError: the settings or the environment are wrong.
    """
    from obstore import exceptions, store

    kind = store.AzureStore if service == "az" else store.GCSStore
    given = json.loads(settings)
    try:
        return kind(
            bucket, **given, client_options=client_options(plain_http=_is_plain(given)), retry_config={"max_retries": 0}
        )
    except (exceptions.BaseError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{service}:// does not work with these storage_options and this environment: {line_of(error)}."
        ) from None


#: What obstore says of a listing with a key that it cannot name.
_NO_PATH = re.compile(r'invalid path: (?:Error parsing )?Path "(.*?)"(?::| contained)', re.DOTALL)


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether the address of the store is one of plain HTTP."""
    return str(settings.get("endpoint") or settings.get("base_url") or "").startswith("http://")


def _plain(etag: str | None) -> str:
    """An etag without quotation marks, which a listing of Azure lacks; empty if the store gives none."""
    return plain_etag(etag or "")
