"""Conditional requests to a bucket of S3 -> whether the server carried them out, and which conditions it keeps at all.

Many servers do not look at some of the headers, and overwrite an object although the condition does not hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from tlbatch.errors import ChangedError, RefusedError

#: Makes a request to S3: the name of an operation of botocore and its parameters -> its answer. Transient errors are retried,
#: and all errors are OSErrors.
Call = Callable[..., Any]

#: An etag that no object has.
_NO_ETAG = f'"{"0" * 32}"'
#: How often the probe is created anew: another process that probes at the same moment may remove it in between.
_ATTEMPTS = 3


class Conditions(NamedTuple):
    """Which conditions a server keeps.

    Attributes:
        create: `If-None-Match: *` of a PUT, which creates an object and never replaces one.
        replace: `If-Match` of a PUT, which replaces one version of an object only.
        read: `If-Match` of a GET.
    """

    create: bool = False
    replace: bool = False
    read: bool = False

    def ignored(self) -> str:
        """The conditions that the server does not keep; an empty text if it keeps all."""
        names = ("If-None-Match on PUT", "If-Match on PUT", "If-Match on GET")
        return ", ".join(name for name, kept in zip(names, self, strict=True) if not kept)


def put_if(call: Call, bucket: str, key: str, data: bytes, **condition: str) -> bool:
    """Make one conditional PUT; False if the condition does not hold.

    Only 412 says so and, for `IfMatch`, that there is no object. A 409 says that another request for the same key is in
    progress: the request is repeated like after any transient error.
    """
    try:
        call("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except ChangedError:
        return False
    except FileNotFoundError:
        if "IfMatch" not in condition:
            raise
        return False
    return True


def probe(call: Call, bucket: str, key: str) -> Conditions:
    """Find out with an object that is removed again which conditions a server keeps.

    The object always has the same key. If a process dies meanwhile, what it leaves does not disturb the next probe, which
    removes it.

    Args:
        call: makes a request.
        bucket: the bucket.
        key: of the object, which holds nothing else.
    """
    try:
        call("put_object", Bucket=bucket, Key=key, Body=b"")
        return Conditions(
            any(_refused(call, "put_object", Bucket=bucket, Key=key, Body=b"", IfNoneMatch="*") for _ in range(_ATTEMPTS)),
            _refused(call, "put_object", Bucket=bucket, Key=key, Body=b"", IfMatch=_NO_ETAG),
            _refused(call, "get_object", Bucket=bucket, Key=key, IfMatch=_NO_ETAG),
        )
    finally:
        with contextlib.suppress(OSError):  # it does no harm, and the next command removes it
            call("delete_object", Bucket=bucket, Key=key)


def _refused(call: Call, operation: str, **asked: Any) -> bool:
    """Whether the server refuses a request whose condition does not hold; not if it carries it out or knows no conditions."""
    try:
        call(operation, **asked)
    except (ChangedError, FileNotFoundError):
        return True
    except RefusedError:
        return False
    return False
