"""Stage 2: manifest rows -> the bytes of each image, or the reason why there are none.

Retries of reads live here and nowhere else: a second layer above would multiply the waits. A bad minute of the store is
waited out; a store that gives no answer at all for that long ends the run, because its images are not to blame.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from tlbatch.errors import ChangedError, CredentialsError, ErrorKind, Failure, StoreUnavailableError, ThrottledError, UsageError
from tlbatch.images.members import read_members
from tlbatch.images.shards import Member, ShardOptions, too_large
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import RangeFile
from tlbatch.storage.resolve import resolve
from tlbatch.storage.retry import is_transient

T = TypeVar("T")

#: Refusals in a row, with not one image read, after which the store is closed and not single images.
_REFUSALS = 32
#: Seconds for which an answer proves that the store is there.
_RECENTLY = 5.0


@dataclass(frozen=True)
class Patience:
    """How long one object is worth waiting for: waits grow from `first` seconds, doubled, until `deadline` seconds passed.

    Each wait is drawn between nothing and the whole ("full jitter"), so that many readers do not come back as one.
    """

    first: float = 0.1
    longest: float = 8.0
    deadline: float = 60.0
    sleep: Callable[[float], None] = time.sleep


class Throttle:
    """How many requests an actor keeps in flight: halved when the store asks for less, one more after as many answers."""

    #: A store that is overrun says so to all requests under way; they count once.
    _SECONDS_BETWEEN_CUTS = 1.0

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = float(most)
        self._most = most
        self._clock = clock
        self._last_cut = -self._SECONDS_BETWEEN_CUTS
        self._in_flight = 0
        self._free = threading.Condition()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Wait for a place, and hold it while the block runs."""
        with self._free:
            self._free.wait_for(lambda: self._in_flight < max(1, int(self.limit)))
            self._in_flight += 1
        try:
            yield
        except (ThrottledError, TimeoutError):
            self._cut()
            raise
        else:
            self.limit = min(self._most, self.limit + 1 / self.limit)
        finally:
            with self._free:
                self._in_flight -= 1
                self._free.notify()

    def _cut(self) -> None:
        with self._free:
            if self._clock() - self._last_cut >= self._SECONDS_BETWEEN_CUTS:
                self._last_cut = self._clock()
                self.limit = max(1.0, self.limit / 2)


class Reader:
    """Reads the objects of one store for one actor, from many threads at once.

    Args:
        options: fsspec's `storage_options`.
        requests: the most requests in flight.
        image_field: of shards, where the images' bytes have an unusual name.
        max_bytes: of one image.
        patience: how often and how long to try again; trouble that will not pass is not tried again.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        requests: int = 1,
        image_field: str | None = None,
        max_bytes: int = 1 << 62,
        patience: Patience | None = None,
    ) -> None:
        self._options = options
        self._throttle = Throttle(requests)
        self._roots: dict[str, Location] = {}
        self._field = image_field
        self._max_bytes = max_bytes
        self._patience = patience or Patience()
        self._answered = -math.inf
        self._good: Callable[[], Any] | None = None
        self._refusals = 0

    def image(self, row: Mapping[str, Any]) -> bytes | Failure:
        """The bytes of one loose image, as the version that was listed.

        Args:
            row: of the manifest: `uri`, `size` and `etag` (either may be None: nobody knows).

        Raises:
            StoreUnavailableError: the store itself is failing.
        """
        refused = too_large(row["size"] or 0, self._max_bytes)
        if refused is not None:
            return refused
        location = self._location(row["uri"])
        if isinstance(location, Failure):
            return location
        etag = row["etag"] or None
        given = self._patiently(lambda: location.fetch(0, None, etag), location)
        if isinstance(given, Failure):
            return given
        data, attempts = given
        if row["size"] is not None and len(data) != row["size"]:
            message = f"listed with {row['size']} bytes, read with {len(data)}"
            return Failure("read", ErrorKind.CHANGED, message, attempts)
        return too_large(len(data), self._max_bytes) or data

    def members(self, row: Mapping[str, Any]) -> Iterator[Member]:
        """The images of one shard, in its order; damage and trouble are members with a failure.

        Args:
            row: of the manifest, `format` being one of `shards`.

        Raises:
            StoreUnavailableError: the store itself is failing.
        """
        location = self._location(row["uri"])
        size = row["size"]
        if isinstance(location, Failure):
            size = location
        elif size is None:
            size = self._size_of(location)
        if isinstance(location, Failure) or isinstance(size, Failure):
            yield Member(0, row["key"], size)
            return
        etag = row["etag"] or None

        def fetch(start: int, end: int) -> bytes:
            given = self._patiently(lambda: location.fetch(start, end, etag), location)
            if isinstance(given, Failure):
                raise _GaveUpError(given)
            if len(given[0]) > end - start:
                raise _GaveUpError(Failure("read", ErrorKind.UNSUPPORTED, "the server gives whole objects and no ranges"))
            return given[0]

        read = 0
        with RangeFile(fetch, size) as file:
            try:
                for member in read_members(row["format"], io.BufferedReader(file), self._wanted(row)):
                    yield member
                    read += 1
            except _GaveUpError as error:
                yield Member(read, row["key"], error.failure)

    def _location(self, uri: str) -> Location | Failure:
        """Where an object lies; a list may hold addresses that are none."""
        try:
            return self._found(uri)
        except (UsageError, ValueError) as error:
            return Failure("read", ErrorKind.NOT_FOUND, f"this is no address: {error}"[:500])

    def _found(self, uri: str) -> Location:
        """What all objects of a bucket share is found once."""
        protocol, double_slash, path = uri.partition("://")
        bucket, slash, key = path.partition("/")
        if not double_slash or not slash or protocol == "file":
            return resolve(uri, self._options)
        root = self._roots.get(protocol + bucket)
        if root is None:
            root = self._roots[protocol + bucket] = resolve(f"{protocol}://{bucket}", self._options)
        return root.join(key)

    def _wanted(self, row: Mapping[str, Any]) -> ShardOptions:
        return ShardOptions(row["key"], self._field, self._max_bytes)

    def _size_of(self, location: Location) -> int | Failure:
        given = self._patiently(location.info, location)
        if isinstance(given, Failure):
            return given
        return given[0].size if given[0] is not None else Failure("read", ErrorKind.NOT_FOUND, f"{location.url} is not there")

    def _patiently(self, ask: Callable[[], T], location: Location) -> tuple[T, int] | Failure:
        """What `ask` gives and the attempts it took, or why it gives nothing; `place` is what it asks for."""
        try:
            return self._answer(ask), 1
        except OSError as error:
            return self._again(ask, location) if _may_pass(error) else self._judged(error, 1, location)

    def _again(self, ask: Callable[[], T], location: Location) -> tuple[T, int] | Failure:
        patience = self._patience
        retrying = Retrying(
            stop=stop_before_delay(patience.deadline),
            wait=wait_random_exponential(multiplier=patience.first, max=patience.longest),
            retry=retry_if_exception(_may_pass),
            sleep=patience.sleep,
            reraise=True,
        )
        patience.sleep(random.uniform(0, patience.first))
        try:
            given = retrying(self._answer, ask)
        except OSError as error:
            return self._judged(error, 1 + retrying.statistics["attempt_number"], location)
        return given, 1 + retrying.statistics["attempt_number"]

    def _answer(self, ask: Callable[[], T]) -> T:
        with self._throttle.request():
            given = ask()
        self._answered = time.monotonic()
        self._good = ask
        return given

    def _judged(self, error: OSError, attempts: int, location: Location) -> Failure:
        """The failure of an object; raises where it is the store's."""
        failure = _failure(error, attempts)
        lasting = not _may_pass(error)
        if not lasting and not self._still_answers(location):
            raise StoreUnavailableError(f"the store gave no answer for {self._patience.deadline:.0f} s: {failure.message}")
        self._answered = time.monotonic()  # a refusal is an answer
        self._refusals += not lasting or failure.kind is ErrorKind.ACCESS_DENIED
        if self._refusals >= _REFUSALS and self._good is None:
            raise StoreUnavailableError(f"the store lists its images and refuses to give them: {failure.message}")
        return failure

    def _still_answers(self, location: Location) -> bool:
        """Whether others were answered just now, or what could be read before still can, or the store knows of the object."""
        if time.monotonic() - self._answered < _RECENTLY:
            return True
        with contextlib.suppress(OSError):
            (self._good or location.info)()
            return True
        return False


class _GaveUpError(OSError):
    """A piece of a shard could not be read."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt makes sense. Credentials that ran out are renewed by somebody while we wait."""
    return is_transient(error) or isinstance(error, CredentialsError)


def _failure(error: OSError, attempts: int) -> Failure:
    kinds: tuple[tuple[type[OSError] | tuple[type[OSError], ...], ErrorKind], ...] = (
        ((FileNotFoundError, NotADirectoryError, IsADirectoryError), ErrorKind.NOT_FOUND),
        (ChangedError, ErrorKind.CHANGED),
        (PermissionError, ErrorKind.ACCESS_DENIED),
        (ThrottledError, ErrorKind.THROTTLED),
        (TimeoutError, ErrorKind.TIMEOUT),
    )
    kind = next((kind for types, kind in kinds if isinstance(error, types)), ErrorKind.READ_FAILED)
    return Failure("read", kind, str(error)[:500], attempts)
