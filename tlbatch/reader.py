"""Stage 2: manifest rows -> the bytes of each image, or the reason why there are none.

Retries live here and nowhere else: a second layer above would multiply the waits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlbatch.errors import ErrorKind, Failure
from tlbatch.storage import LocalPlace, resolve


@dataclass(frozen=True)
class Patience:
    """How long one image is worth waiting for: waits grow from `first` seconds, doubled, until `deadline` seconds passed.

    The wait is drawn between nothing and the whole ("full jitter"), so that many readers do not come back as one.
    """

    first: float = 0.1
    longest: float = 8.0
    deadline: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


def read_image(uri: str, size: int, etag: str, options: Mapping[str, Any], patience: Patience | None = None) -> bytes | Failure:
    """The bytes of one object as the listing saw it.

    Args:
        uri: its full address.
        size: in bytes, as listed.
        etag: its version, as listed. An object that is another one by now gives kind `changed`.
        options: fsspec's `storage_options`.
        patience: how often and how long to try again; trouble that will not pass is not tried again.
    """
    patience = patience or Patience()
    place = resolve(uri, options)
    end = patience.clock() + patience.deadline
    attempt = 0
    while True:
        attempt += 1
        try:
            data = place.read()
        except Exception as error:  # fsspec's filesystems raise their libraries' own exceptions
            failure = _classify(error, attempt)
            wait = random.uniform(0, min(patience.longest, patience.first * 2**attempt))
            if not failure.transient or failure.kind is ErrorKind.ACCESS_DENIED or patience.clock() + wait > end:
                return failure
            patience.sleep(wait)
            continue
        found = place.info() if isinstance(place, LocalPlace) else None
        if len(data) != size or (found is not None and found.etag != etag):
            return Failure("read", ErrorKind.CHANGED, f"listed with {size} bytes, read with {len(data)}", attempt)
        return data


def _classify(error: Exception, attempts: int) -> Failure:
    """The kind of a store's exception. s3fs translates S3's codes to Python's exceptions; their text names the rest."""
    text = f"{type(error).__name__}: {error}"[:500]
    kind = ErrorKind.READ_FAILED
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        kind = ErrorKind.NOT_FOUND
    elif isinstance(error, PermissionError):
        kind = ErrorKind.ACCESS_DENIED
    elif isinstance(error, TimeoutError):
        kind = ErrorKind.TIMEOUT
    elif any(word in text for word in ("SlowDown", "Throttl", "TooManyRequests", "503", "429")):
        kind = ErrorKind.THROTTLED
    return Failure("read", kind, text, attempts)
