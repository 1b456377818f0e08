"""A key of an S3 bucket -> its bytes, through obstore; and how its listings are requested (`storage/s3_listing.py`).

All other requests go through s3fs, which spends milliseconds of Python time on each. obstore spends a tenth of that and
releases Python's lock meanwhile (`benchmarks/stores.py`). Endpoint and credentials come from s3fs, so that both use the same
chain. Nothing here retries; `storage/retry.py` and `images/reader.py` do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from botocore.exceptions import NoCredentialsError
from fsspec.asyn import sync

from tlbatch.storage.location import WalkRules
from tlbatch.storage.s3_listing import Ask, Endpoint, walk

#: Timeouts in seconds without data, and for connecting. The connection is closed as well, so that a retry opens a new one.
REQUEST_SECONDS, CONNECT_SECONDS = 20.0, 5.0
_WHOLE_SECONDS = 1800.0

#: Options of s3fs that obstore supports as well. With any other option, all requests go through s3fs.
_OPTIONS = frozenset({"anon", "endpoint_url", "profile", "client_kwargs"})
_CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})

#: How long obstore keeps credentials before it asks s3fs's chain again, which renews expiring credentials.
_CREDENTIALS_SECONDS = 300


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
        region = _region(filesystem, name) if aws else client.meta.region_name or "us-east-1"
        self._endpoint = Endpoint(
            url=f"https://s3.{region}.amazonaws.com/{name}" if aws else f"{endpoint.rstrip('/')}/{name}",
            region=region,
            aws=".amazonaws.com" in endpoint,
            certificates=filesystem.session.get_config_variable("ca_bundle") or True,
            timeout=(CONNECT_SECONDS, REQUEST_SECONDS),
            credentials=None if filesystem.anon else partial(_frozen_credentials, filesystem),
            head=lambda key: filesystem.call_s3("head_object", Bucket=name, Key=key),
        )
        settings: dict[str, Any] = {} if aws else {"endpoint": endpoint}
        settings |= {"skip_signature": True} if filesystem.anon else {"credential_provider": _credentials_of(filesystem)}
        # TLS detects bits that are flipped in transit.
        self._checksums = Checksums() if endpoint.startswith("http://") else None
        self._store = S3Store(
            name,
            region=region,
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

    def walk(self, root: str, ask: Ask, rules: WalkRules) -> Iterator[pa.RecordBatch]:
        """Every object below a prefix, as `s3_listing.walk` gives them."""
        return walk(self._endpoint, root, ask, rules)


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


def _region(filesystem: Any, name: str) -> str:
    """The region of an AWS bucket, which obstore needs: unlike s3fs, it does not follow AWS's redirects."""
    answer = filesystem.call_s3("head_bucket", Bucket=name)
    return str(answer.get("BucketRegion") or filesystem.s3.meta.region_name)


def _credentials_of(filesystem: Any) -> Callable[[], Any]:
    """A credential provider for obstore that uses s3fs's chain: environment, profile, instance role, or what botocore finds."""

    def provide() -> dict[str, Any]:
        frozen = _frozen_credentials(filesystem)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_SECONDS),
        }

    return provide


def _frozen_credentials(filesystem: Any) -> Any:
    """Credentials of s3fs's chain, renewed if they were about to expire; raises NoCredentialsError if there are none."""

    async def ask() -> Any:
        found = await filesystem.session.get_credentials()
        return None if found is None else await found.get_frozen_credentials()

    frozen = sync(filesystem.loop, ask)
    if frozen is None:
        raise NoCredentialsError
    return frozen
