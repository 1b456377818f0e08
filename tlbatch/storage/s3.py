"""A key of an S3 bucket -> its bytes, and a prefix -> its listing: the two most frequent requests, through obstore.

All other requests go through s3fs, which spends milliseconds of Python time on each. obstore spends a tenth of that and
releases Python's lock meanwhile (`benchmarks/stores.py`). Endpoint and credentials come from s3fs, so that both use the same
chain. Nothing here retries; `storage/retry.py` and `images/reader.py` do.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Any

from fsspec.asyn import sync

#: Timeouts in seconds without data, and for connecting. The connection is closed as well, so that a retry opens a new one.
REQUEST_SECONDS, CONNECT_SECONDS = 20.0, 5.0
_WHOLE_SECONDS = 1800.0

#: Options of s3fs that obstore supports as well. With any other option, all requests go through s3fs.
_OPTIONS = frozenset({"anon", "endpoint_url", "profile", "client_kwargs"})
_CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})

#: How long obstore keeps credentials before it asks s3fs's chain again, which renews expiring credentials.
_CREDENTIALS_SECONDS = 300

#: Folders listed concurrently, also the number at which the search for folders stops; and the most levels of that search.
_LISTERS, _LEVELS = 16, 4
#: Objects of a page, and pages in the queue to the consumer. Queued pages are Python objects, which take much memory.
_LISTED_AT_ONCE, _PAGES_WAITING = 2_000, 8

#: Parts of obstore's error messages for a listing with a key that it cannot represent, or with XML that it cannot parse.
_ODD_KEYS = ("parsing Path", 'ath "', "invalid list response")

#: (key, size, etag) of one object.
Listed = tuple[str, int, str]
Ask = Callable[[Callable[[], Any]], Any]


def serves(options: Mapping[str, Any]) -> bool:
    """Whether obstore supports these options of s3fs."""
    return options.keys() <= _OPTIONS and options.get("client_kwargs", {}).keys() <= _CLIENT_OPTIONS


def can_name(key: str) -> bool:
    """Whether obstore can represent this key: its keys are paths, S3's keys are strings."""
    parts = key.removesuffix("/").split("/")
    return key == "" or all(part not in ("", ".", "..") and part.isprintable() for part in parts)


@lru_cache(maxsize=64)
def bucket(filesystem: Any, name: str) -> Bucket:
    """The bucket `name` with the endpoint and credentials of an s3fs filesystem, created once per process."""
    return Bucket(filesystem, name)


class Bucket:
    """One bucket of an S3 store."""

    def __init__(self, filesystem: Any, name: str) -> None:
        from obstore.store import S3Store

        filesystem.connect()
        client = filesystem.s3
        endpoint: str = client.meta.endpoint_url
        aws = endpoint in ("https://s3.amazonaws.com", f"https://s3.{client.meta.region_name}.amazonaws.com")
        settings: dict[str, Any] = {} if aws else {"endpoint": endpoint}
        settings |= {"skip_signature": True} if filesystem.anon else {"credential_provider": _credentials_of(filesystem)}
        self._filesystem = filesystem
        self._name = name
        # TLS detects bits that are flipped in transit.
        self._checksums = Checksums() if endpoint.startswith("http://") else None
        self._store = S3Store(
            name,
            region=_region(filesystem, name) if aws else client.meta.region_name or "us-east-1",
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "read_timeout": f"{REQUEST_SECONDS:.0f}s",  # without data; a slow body may take longer in total
                "timeout": f"{_WHOLE_SECONDS:.0f}s",
                "connect_timeout": f"{CONNECT_SECONDS:.0f}s",
            },
            retry_config={"max_retries": 0},
            **settings,
        )

    def get(self, key: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The bytes of an object, or its bytes from `start` to `end`; with `etag`, only of this version."""
        import obstore

        options: dict[str, Any] = {}
        if etag:
            options["if_match"] = f'"{etag}"'
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        answer = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
        data = bytes(answer.bytes())
        if self._checksums is not None and not start and end is None:
            self._checksums.require(key, data, (answer.meta["e_tag"] or "").strip('"'))
        return data

    def walk(self, root: str, ask: Ask) -> Iterator[Sequence[Listed]]:
        """Every object below a prefix, page by page; several folders are listed concurrently.

        Args:
            root: the prefix with its trailing slash; empty for the whole bucket.
            ask: calls a function with retries.
        """
        folders, loose = self._folders(root, ask)
        yield loose
        pages: queue.Queue[Sequence[Listed] | BaseException | None] = queue.Queue(_PAGES_WAITING)
        given_up = threading.Event()

        def list_folder(folder: str) -> None:
            walk = _Walk(self._filesystem, self._name, self._store, folder)
            try:
                while not given_up.is_set() and (page := ask(walk.next_page)):
                    pages.put(page)
                pages.put(None)
            except BaseException as error:  # raised again by the consumer of the pages
                pages.put(error)

        with ThreadPoolExecutor(_LISTERS, thread_name_prefix="tlbatch-list") as pool:
            listing = [pool.submit(list_folder, folder) for folder in folders]
            left = len(folders)
            try:
                while left:
                    page = pages.get()
                    if isinstance(page, BaseException):
                        raise page
                    if page is None:
                        left -= 1
                    else:
                        yield page
            finally:
                given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in listing):  # some may be waiting for room in the queue
                    with contextlib.suppress(queue.Empty):
                        pages.get(timeout=0.1)

    def _folders(self, root: str, ask: Ask) -> tuple[list[str], list[Listed]]:
        """Folders that can be listed concurrently, and the objects above them, found level by level."""
        folders, loose = [root], list[Listed]()
        for _ in range(_LEVELS):
            if len(folders) >= _LISTERS:
                break
            below = []
            for folder in folders:
                names, objects, complete = ask(partial(self._level, folder))
                if not complete:
                    below.append(folder)  # its first level does not fit on one page: it is listed as one folder
                    continue
                below += names
                loose += objects
            if below == folders:
                break
            folders = below
        return folders, loose

    def _level(self, folder: str) -> tuple[list[str], list[Listed], bool]:
        answer = self._filesystem.call_s3("list_objects_v2", Bucket=self._name, Prefix=folder, Delimiter="/")
        names = [one["Prefix"] for one in answer.get("CommonPrefixes", ())]
        return names, _plain(answer), not answer.get("IsTruncated")


class Checksums:
    """Compares the bytes of objects with their etags, which are usually MD5 digests; on a mismatch the object is read again.

    The same bytes twice mean that this store's etags are not MD5 digests. From then on, nothing is compared.
    """

    def __init__(self) -> None:
        self._etags_are_md5 = True
        self._mismatched: dict[str, str] = {}

    def require(self, key: str, data: bytes, etag: str) -> None:
        """Raise OSError if the bytes differ from their etag, unless the same bytes were read before."""
        if not self._etags_are_md5 or len(etag) != _MD5_DIGITS or not set(etag) <= _HEX:
            return
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        previous = self._mismatched.pop(key, None)
        if found == etag:
            return
        if found == previous:
            self._etags_are_md5 = False
            return
        self._mismatched[key] = found
        raise OSError(f"the bytes of {key} differ from its etag {etag}")


_MD5_DIGITS, _HEX = 32, frozenset("0123456789abcdef")


class _Walk:
    """One folder's listing, pages in the order of the keys; after an error, the next call continues after the last page."""

    def __init__(self, filesystem: Any, name: str, store: Any, folder: str) -> None:
        self._filesystem = filesystem
        self._name = name
        self._store = store
        self._folder = folder
        self._after = ""
        self._stream: Iterator[Any] | None = None
        self._odd_keys = not can_name(folder)

    def next_page(self) -> Sequence[Listed]:
        """The next page of objects; empty at the end."""
        page = self._from_s3fs() if self._odd_keys else self._from_obstore()
        if page:
            self._after = page[-1][0]
        return page

    def _from_obstore(self) -> Sequence[Listed]:
        import obstore

        if self._stream is None:
            self._stream = iter(obstore.list(self._store, self._folder, offset=self._after or None, chunk_size=_LISTED_AT_ONCE))
        try:
            page = next(self._stream, ())
        except BaseException as error:
            self._stream = None
            if not any(word in str(error) for word in _ODD_KEYS):
                raise
            self._odd_keys = True  # this folder has a key that is not a path, or that XML cannot represent
            return self._from_s3fs()
        if any(one["size"] == 0 or "\ufffd" in one["path"] for one in page):
            # Empty objects may be folder markers, whose trailing slash obstore removes. Some servers write U+FFFD for what XML
            # cannot represent; s3fs requests keys in another encoding.
            self._stream = None
            return self._from_s3fs()
        return [(one["path"], one["size"], (one["e_tag"] or "").strip('"')) for one in page]

    def _from_s3fs(self) -> Sequence[Listed]:
        after = {"StartAfter": self._after} if self._after else {}
        return _plain(self._filesystem.call_s3("list_objects_v2", Bucket=self._name, Prefix=self._folder, **after))


def _plain(answer: Mapping[str, Any]) -> list[Listed]:
    return [(one["Key"], one["Size"], one["ETag"].strip('"')) for one in answer.get("Contents", ())]


def _region(filesystem: Any, name: str) -> str:
    """The region of an AWS bucket, which obstore needs: unlike s3fs, it does not follow AWS's redirects."""
    answer = filesystem.call_s3("head_bucket", Bucket=name)
    return str(answer.get("BucketRegion") or filesystem.s3.meta.region_name)


def _credentials_of(filesystem: Any) -> Callable[[], Any]:
    """A credential provider for obstore that uses s3fs's chain: environment, profile, instance role, or what botocore finds."""

    async def ask() -> Any:
        found = await filesystem.session.get_credentials()
        return None if found is None else await found.get_frozen_credentials()

    def provide() -> dict[str, Any]:
        from botocore.exceptions import NoCredentialsError

        frozen = sync(filesystem.loop, ask)
        if frozen is None:
            raise NoCredentialsError
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_SECONDS),
        }

    return provide
