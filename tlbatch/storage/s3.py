"""A key of an S3 bucket -> its bytes, through obstore; and how its listings are requested (`storage/s3_listing.py`).

All other requests go through s3fs, which spends milliseconds of Python time on each. obstore spends a tenth of that and
releases Python's lock meanwhile (`benchmarks/stores.py`). Endpoint and credentials come from s3fs, so that both use the same
chain. Nothing here retries; `storage/retry.py` and `images/reader.py` do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

import pyarrow as pa
from botocore.exceptions import NoCredentialsError
from fsspec.asyn import sync

from tlbatch.errors import NoRangesError
from tlbatch.storage.location import WalkRules
from tlbatch.storage.obstore_client import (
    CONNECT_SECONDS,
    REQUEST_SECONDS,
    client_options,
    get_options,
    plain_etag,
    require_version,
)
from tlbatch.storage.s3_listing import Ask, Endpoint, walk

#: Options of s3fs that obstore supports as well. With any other option, all requests go through s3fs.
_OPTIONS = frozenset({"anon", "endpoint_url", "profile", "client_kwargs", "requester_pays"})
_CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})

#: Bytes of an object that is not read for a part of it.
_LARGE = (8 << 20) + 1

#: How long obstore keeps credentials before it asks s3fs's chain again, which renews expiring credentials.
_CREDENTIALS_SECONDS = 300


def serves(options: Mapping[str, Any]) -> bool:
    """Whether obstore supports these options of s3fs."""
    return options.keys() <= _OPTIONS and set(options.get("client_kwargs", ())) <= _CLIENT_OPTIONS


@lru_cache(maxsize=64)
def bucket(filesystem: Any, name: str) -> Bucket:
    """The bucket `name` with the endpoint and credentials of an s3fs filesystem, created once per process."""
    return Bucket(filesystem, name)


class Bucket:
    """One bucket of an S3 store."""

    def __init__(self, filesystem: Any, name: str) -> None:
        from obstore.store import S3Store

        endpoint, region, aws = _address(filesystem, name)
        self._endpoint = Endpoint(
            url=f"https://s3.{region}.amazonaws.com/{name}" if aws else f"{endpoint.rstrip('/')}/{name}",
            region=region,
            aws=".amazonaws.com" in endpoint,
            certificates=filesystem.session.get_config_variable("ca_bundle") or True,
            timeout=(CONNECT_SECONDS, REQUEST_SECONDS),
            credentials=None if filesystem.anon else partial(_frozen_credentials, filesystem),
            head=lambda key: filesystem.call_s3("head_object", Bucket=name, Key=key),
            headers={"x-amz-request-payer": "requester"} if filesystem.requester_pays else {},
        )
        settings: dict[str, Any] = {"request_payer": bool(filesystem.requester_pays)}
        settings |= {} if aws else {"endpoint": endpoint}
        settings |= {"skip_signature": True} if filesystem.anon else {"credential_provider": _credentials_of(filesystem)}
        #: Whether ranges are marked as ranges; some servers answer with the status of a whole object.
        self.marks_ranges = True
        # TLS detects bits that are flipped in transit.
        self._checksums = Checksums() if endpoint.startswith("http://") else None
        self._store = S3Store(
            name,
            region=region,
            client_options=client_options(plain_http=endpoint.startswith("http://")),
            retry_config={"max_retries": 0},
            **settings,
        )

    def get(self, key: str, start: int = 0, end: int | None = None, etag: str | None = None) -> bytes:
        """The bytes of an object, or its bytes from `start` to `end`; with `etag`, only of this version.

        Raises:
            UnmarkedRangeError: the server does not mark a range as one; `get_object` can read it.
        """
        import obstore

        options = get_options(start, end, etag)
        try:
            answer = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
        except obstore.exceptions.BaseError as error:
            if "range" not in options or not _NOT_MARKED.search(str(error)):
                raise
            self.marks_ranges = False
            raise UnmarkedRangeError from None
        found = answer.meta["e_tag"] or ""
        require_version(key, found, etag)
        data = bytes(answer.bytes())
        if self._checksums is not None and not start and end is None:
            self._checksums.require(key, data, found.strip('"'))
        return data

    def walk(self, root: str, ask: Ask, rules: WalkRules) -> Iterator[pa.RecordBatch]:
        """Every object below a prefix, as `s3_listing.walk` gives them."""
        return walk(self._endpoint, root, ask, rules)


def object_store_settings(filesystem: Any, name: str) -> dict[str, str]:
    """Endpoint and credentials of the bucket `name` as libraries on Rust's `object_store` take them.

    Credentials that expire are those of now.
    """
    endpoint, region, aws = _address(filesystem, name)
    found = {"aws_region": region, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    if not aws:
        found["aws_endpoint_url"] = endpoint
    if filesystem.anon:
        return {**found, "aws_skip_signature": "true"}
    frozen = _frozen_credentials(filesystem)
    keys = {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
    return {**found, **keys, **({"aws_session_token": frozen.token} if frozen.token else {})}


def get_object(
    filesystem: Any, bucket: str, key: str, start: int = 0, end: int | None = None, etag: str | None = None
) -> bytes:
    """The same as `Bucket.get` through s3fs, which knows every key, and from servers that send more than the range.

    Raises:
        NoRangesError: the server sends the whole object instead of a range, and the object is large.
    """
    asked = {"IfMatch": f'"{plain_etag(etag)}"'} if etag else {}
    if start or end is not None:
        asked["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    answer = filesystem.call_s3("get_object", Bucket=bucket, Key=key, **asked)

    async def body() -> bytes:
        async with answer["Body"] as stream:
            require_version(key, answer.get("ETag") or "", etag)
            too_much = "Range" in asked and not _is_range(answer, start, end)
            if too_much and not _is_small_object(answer):
                raise NoRangesError(f"{key}: this store does not answer ranges, and the object is too large to read at once")
            data: bytes = await stream.read()
            return data[start:end] if too_much else data

    found: bytes = sync(filesystem.loop, body)
    return found


def _is_range(answer: Mapping[str, Any], start: int, end: int | None) -> bool:
    """Whether an answer has the bytes from `start` and no more; the status does not say so on every server."""
    begins = re.match(r"bytes (\d+)-", answer.get("ContentRange") or "")
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    right = int(begins[1]) == start if begins else status == HTTPStatus.PARTIAL_CONTENT
    return right and (end is None or int(answer.get("ContentLength") or 0) <= end - start)


def _is_small_object(answer: Mapping[str, Any]) -> bool:
    """Whether an answer is a whole object that is small enough to be read for a part of it."""
    is_whole = answer["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.OK and not answer.get("ContentRange")
    return is_whole and int(answer.get("ContentLength", _LARGE)) < _LARGE


class UnmarkedRangeError(Exception):
    """The answer to a range has the status of a whole object, or does not say which range it is."""


#: What obstore says of such an answer.
_NOT_MARKED = re.compile(r"non-partial response|Content-Range|Requested .*, got ")


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


def _address(filesystem: Any, name: str) -> tuple[str, str, bool]:
    """The endpoint of a bucket, its region, and whether the endpoint is AWS's own."""
    filesystem.connect()
    meta = filesystem.s3.meta
    aws = meta.endpoint_url in ("https://s3.amazonaws.com", f"https://s3.{meta.region_name}.amazonaws.com")
    return meta.endpoint_url, _region(filesystem, name) if aws else meta.region_name or "us-east-1", aws


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
