"""Conditional requests to a bucket of S3 -> whether the server carried them out, and which conditions it keeps at all.

Many servers do not look at some of the headers, and overwrite an object although the condition does not hold.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tlbatch.errors import ChangedError, RefusedError

log = logging.getLogger(__name__)

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

    def warn(self, store: str, ignored: str = "") -> None:
        """Warn of the conditions that a store does not keep, in other words if they are given."""
        if all(self):
            return
        advice = "Make sure only one run at a time writes to it."
        if self.create and self.replace:
            advice = "The etag of each object that is read is compared instead."
        log.warning("%s does not keep conditions: it ignores %s. %s", store, ignored or self.ignored(), advice)


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


def known(store: Hashable, find: Callable[[], Conditions]) -> Conditions:
    """The conditions that a store keeps; found out once per process."""
    with _known_lock:
        if store not in _known:
            _known[store] = find()
        return _known[store]


_known: dict[Hashable, Conditions] = {}
_known_lock = threading.RLock()


class Attempts(Protocol):
    """Requests for one object, which holds nothing else and exists: their conditions do not hold."""

    def write(self) -> None:
        """Write the object, without a condition."""

    def create(self) -> None:
        """Write it on the condition that it does not exist."""

    def replace(self) -> None:
        """Write it on the condition that it has a version that no object has."""

    def read(self) -> None:
        """Read it on that condition."""

    def unlink(self) -> None:
        """Remove it."""


def probe(attempts: Attempts) -> Conditions:
    """Find out with an object that is removed again which conditions a server keeps.

    The object always has the same key. If a process dies meanwhile, what it leaves does not disturb the next probe, which
    removes it.
    """
    try:
        attempts.write()
        return Conditions(
            any(_refused(attempts.create) for _ in range(_ATTEMPTS)), _refused(attempts.replace), _refused(attempts.read)
        )
    finally:
        with contextlib.suppress(OSError):  # it does no harm, and the next command removes it
            attempts.unlink()


@dataclass(frozen=True)
class S3Attempts:
    """Requests to a server that speaks S3.

    Args:
        call: makes a request.
        bucket: the bucket.
        key: of the object.
    """

    call: Call
    bucket: str
    key: str

    def write(self) -> None:
        """Without a condition."""
        self._ask("put_object", Body=b"")

    def create(self) -> None:
        """As if it did not exist."""
        self._ask("put_object", Body=b"", IfNoneMatch="*")

    def replace(self) -> None:
        """As if it were another version."""
        self._ask("put_object", Body=b"", IfMatch=_NO_ETAG)

    def read(self) -> None:
        """Another version."""
        self._ask("get_object", IfMatch=_NO_ETAG)

    def unlink(self) -> None:
        """Remove it."""
        self._ask("delete_object")

    def _ask(self, operation: str, **asked: Any) -> None:
        self.call(operation, Bucket=self.bucket, Key=self.key, **asked)


def _refused(attempt: Callable[[], None]) -> bool:
    """Whether the server refuses a request whose condition does not hold; not if it carries it out or knows no conditions."""
    try:
        attempt()
    except (ChangedError, FileNotFoundError):
        return True
    except RefusedError:
        return False
    return False
