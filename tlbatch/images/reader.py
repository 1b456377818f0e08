"""Stage 2: manifest rows -> the bytes of each image, or the reason why it could not be read.

Reads are retried here and nowhere else, because a second layer of retries would multiply the waits. Transient errors are
retried for up to 60 s. A store that does not answer at all for that long stops the run, and no image is recorded as failed.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from tlbatch.errors import (
    ArchivedError,
    ChangedError,
    CredentialsError,
    ErrorKind,
    Failure,
    NoRangesError,
    StoreUnavailableError,
    ThrottledError,
    UsageError,
)
from tlbatch.images.members import read_members
from tlbatch.images.shards import Member, ShardOptions, too_large
from tlbatch.schema import ARCHIVED
from tlbatch.storage.location import Location
from tlbatch.storage.range_file import RangeFile, range_end
from tlbatch.storage.resolve import resolve
from tlbatch.storage.retry import is_transient

T = TypeVar("T")

#: Failed reads, before any image was read, after which other objects are asked for: if none of them can be read, the store
#: counts as failing and not the single images.
_REFUSALS = 32
#: Objects that are asked for then: so many of different folders, and as many again at equal distances in the manifest; and how
#: many at once. A refused request costs little, and a store that is given up although a part of it is open never gets done.
_PROBES, _PROBED_AT_ONCE = 512, 16
#: Objects, spread over a store, of which these are chosen.
_MOST_ASKED = 65_536
#: Seconds for which an answer proves that the store is available.
_RECENTLY = 5.0


@dataclass(frozen=True)
class Patience:
    """How long the read of one object is retried.

    Each wait is random, between 0 and a limit ("full jitter"), so that many readers do not retry at the same moment.

    Attributes:
        first: limit of the first wait in seconds; it doubles with each attempt.
        longest: largest limit of a wait in seconds.
        deadline: seconds after which no attempt is started.
        sleep: called with the length of each wait in seconds.
    """

    first: float = 0.1
    longest: float = 8.0
    deadline: float = 60.0
    sleep: Callable[[float], None] = time.sleep


def choose_probes(manifest: pa.Table) -> tuple[str, ...]:
    """Uris of a few objects from all over a store, by which a reader sees whether anything in the store can be read."""
    possible = pc.and_(pc.not_equal(manifest["format"], ARCHIVED), pc.fill_null(pc.greater(manifest["size"], 0), True))
    rows = np.flatnonzero(possible.to_numpy())
    some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_ASKED)).astype(np.int64))
    mask = np.zeros(manifest.num_rows, bool)
    mask[rows[some]] = True
    uris = manifest["uri"].filter(pa.array(mask))
    if len(uris) <= 2 * _PROBES:
        return tuple(uris.to_pylist())
    folders = pc.replace_substring_regex(uris, "[^/]*$", "").to_numpy(zero_copy_only=False)
    firsts = np.flatnonzero(folders[1:] != folders[:-1]) + 1  # the manifest is sorted: the objects of a folder follow another
    spread = np.linspace(0, len(uris) - 1, _PROBES)
    of_folders = firsts[np.linspace(0, len(firsts) - 1, min(_PROBES, len(firsts))).astype(np.int64)] if len(firsts) else firsts
    chosen: np.ndarray = np.unique(np.concatenate([spread.astype(np.int64), of_folders]))
    return tuple(uris.take(pa.array(chosen, pa.int64())).to_pylist())


class Throttle:
    """Limits an actor's requests in flight.

    The limit is halved if the store throttles or does not answer in time, and grows by one after as many answers as the limit.
    """

    #: A throttling store rejects all requests in flight; within this time they count as one.
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
        """Wait until fewer requests than the limit are in flight, and count one more while the block runs."""
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
    """Reads the objects of a store for one actor; safe to use from many threads.

    Args:
        options: fsspec's `storage_options`.
        requests: maximum number of requests in flight.
        image_field: column or feature of a shard with the bytes of the images, or extension of the members, if not the usual.
        exclude: globs of members of archives to skip.
        max_bytes: maximum size of one image in bytes.
        patience: how long transient errors are retried; permanent errors are not retried.
        probes: uris of some objects of the store (`choose_probes`), asked for if none of the first ones can be read.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        requests: int = 1,
        image_field: str | None = None,
        exclude: Sequence[str] = (),
        max_bytes: int = 1 << 62,
        patience: Patience | None = None,
        probes: Sequence[str] = (),
    ) -> None:
        self._options = options
        self._throttle = Throttle(requests)
        self._roots: dict[str, Location] = {}
        self._field = image_field
        self._exclude = exclude
        self._max_bytes = max_bytes
        self._patience = patience or Patience()
        self._answered = -math.inf
        self._good: Callable[[], Any] | None = None
        self._refusals = 0
        self._probes = list(probes)
        self._probing = threading.Lock()

    def image(self, row: Mapping[str, Any]) -> bytes | Failure:
        """Read the bytes of one loose image in the version that was listed.

        Args:
            row: the manifest row: `uri`, `size` and `etag`; `size` and `etag` are None if the list does not give them.

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
        given = self._with_retries(lambda: location.fetch(0, None, etag), location)
        if isinstance(given, Failure):
            return given
        data, attempts = given
        if row["size"] is not None and len(data) != row["size"]:
            message = f"listed with {row['size']} bytes, but {len(data)} bytes were read"
            return Failure("read", ErrorKind.CHANGED, message, attempts)
        return too_large(len(data), self._max_bytes) or data

    def members(self, row: Mapping[str, Any], passed: Counter[str] | None = None) -> Iterator[Member]:
        """Read the images of one shard, in the order of the shard; damage and read errors are members with a failure.

        Args:
            row: the manifest row, whose `format` is that of a shard, or archived.
            passed: counts the members that are skipped, by kind.

        Raises:
            StoreUnavailableError: the store itself is failing.
        """
        if row["format"] == ARCHIVED:
            yield Member(0, row["key"], Failure("read", ErrorKind.ARCHIVED, _IN_ARCHIVE, 0))
            return
        shard = self._shard(row)
        if isinstance(shard, Failure):
            yield Member(0, row["key"], shard)
            return
        location, size, etag = shard

        def fetch(start: int, end: int) -> bytes:
            last = range_end(start, end, size)
            given = self._with_retries(lambda: location.fetch(start, last, etag), location)
            if isinstance(given, Failure):
                raise _GaveUpError(given)
            if len(given[0]) > end - start:
                if last is None:
                    message = f"listed with {size} bytes, but {len(given[0])} bytes were read"
                    raise _GaveUpError(Failure("read", ErrorKind.CHANGED, message, given[1]))
                raise _GaveUpError(Failure("read", ErrorKind.UNSUPPORTED, "the server ignores range requests"))
            return given[0]

        read = 0
        with RangeFile(fetch, size) as file:
            try:
                for member in read_members(row["format"], io.BufferedReader(file), self._wanted(row, passed)):
                    yield member
                    read += 1
            except _GaveUpError as error:
                yield Member(read, row["key"], error.failure)

    def _location(self, uri: str) -> Location | Failure:
        """The location of an object; a Failure if its address is invalid, which is possible in a list of addresses."""
        try:
            return self._resolve_once(uri)
        except (UsageError, ValueError) as error:
            return Failure("read", ErrorKind.NOT_FOUND, f"the address is invalid: {error}"[:500])

    def _resolve_once(self, uri: str) -> Location:
        """The location of an object; each bucket is resolved once."""
        protocol, double_slash, path = uri.partition("://")
        bucket, slash, key = path.partition("/")
        if not double_slash or not slash or protocol == "file":
            return resolve(uri, self._options)
        root = self._roots.get(protocol + bucket)
        if root is None:
            root = self._roots[protocol + bucket] = resolve(f"{protocol}://{bucket}", self._options)
        return root.join(key)

    def _wanted(self, row: Mapping[str, Any], passed: Counter[str] | None) -> ShardOptions:
        skipped = Counter() if passed is None else passed
        return ShardOptions(row["key"], self._field, self._max_bytes, self._exclude, skipped)

    def _shard(self, row: Mapping[str, Any]) -> tuple[Location, int, str | None] | Failure:
        """Location, size and version of a shard; if a list gives no size, the present ones, so that no piece is of another."""
        location = self._location(row["uri"])
        if isinstance(location, Failure) or row["size"] is not None:
            return location if isinstance(location, Failure) else (location, row["size"], row["etag"] or None)
        given = self._with_retries(location.info, location)
        if isinstance(given, Failure):
            return given
        if given[0] is None:
            return Failure("read", ErrorKind.NOT_FOUND, f"{location.url} does not exist")
        return location, given[0].size, row["etag"] or given[0].etag or None

    def _with_retries(self, ask: Callable[[], T], location: Location) -> tuple[T, int] | Failure:
        """Call `ask`, a request for `location`, with retries: its result and the number of attempts, or a Failure."""
        try:
            return self._call(ask), 1
        except OSError as error:
            return self._retry(ask, location) if _worth_retrying(error) else self._failure_of_object(error, 1, location)

    def _retry(self, ask: Callable[[], T], location: Location) -> tuple[T, int] | Failure:
        patience = self._patience
        retrying = Retrying(
            stop=stop_before_delay(patience.deadline),
            wait=wait_random_exponential(multiplier=patience.first, max=patience.longest),
            retry=retry_if_exception(_worth_retrying),
            sleep=patience.sleep,
            reraise=True,
        )
        patience.sleep(random.uniform(0, patience.first))
        try:
            given = retrying(self._call, ask)
        except OSError as error:
            return self._failure_of_object(error, 1 + retrying.statistics["attempt_number"], location)
        return given, 1 + retrying.statistics["attempt_number"]

    def _call(self, ask: Callable[[], T]) -> T:
        with self._throttle.request():
            given = ask()
        self._answered = time.monotonic()
        self._good = ask
        return given

    def _failure_of_object(self, error: OSError, attempts: int, location: Location) -> Failure:
        """The failure of one object; raises StoreUnavailableError if the store itself is failing."""
        failure = _failure(error, attempts)
        permanent = not _worth_retrying(error)
        if not permanent and not self._still_answers(location):
            raise StoreUnavailableError(f"the store did not answer for {self._patience.deadline:.0f} s: {failure.message}")
        self._answered = time.monotonic()  # a refusal is an answer
        self._refusals += not permanent or failure.kind is ErrorKind.ACCESS_DENIED
        if self._refusals >= _REFUSALS and self._good is None and not self._finds_another():
            raise StoreUnavailableError(f"the store lists its images, but none of them can be read: {failure.message}")
        return failure

    def _finds_another(self) -> bool:
        """Whether any object can be read: of those that were read meanwhile, or of the probes, each of which is asked once."""
        with self._probing:
            until = time.monotonic() + self._patience.deadline
            with ThreadPoolExecutor(_PROBED_AT_ONCE) as pool:
                list(pool.map(partial(self._probe, until), self._probes))
            self._probes = []
            return self._good is not None

    def _probe(self, until: float, uri: str) -> None:
        """Ask for the first byte of an object, unless one could be read or the time is up."""
        if self._good is None and time.monotonic() < until:
            location = self._location(uri)
            if not isinstance(location, Failure):
                with contextlib.suppress(OSError):
                    self._call(partial(location.fetch, 0, 1))

    def _still_answers(self, location: Location) -> bool:
        """Whether the store answered recently, or answers now: to the last request that succeeded, or to a metadata request."""
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


def _worth_retrying(error: BaseException) -> bool:
    """Whether a retry makes sense; expired credentials may be renewed during the waits."""
    return is_transient(error) or isinstance(error, CredentialsError)


def _failure(error: OSError, attempts: int) -> Failure:
    kinds: tuple[tuple[type[OSError] | tuple[type[OSError], ...], ErrorKind], ...] = (
        ((FileNotFoundError, NotADirectoryError, IsADirectoryError), ErrorKind.NOT_FOUND),
        (ChangedError, ErrorKind.CHANGED),
        (NoRangesError, ErrorKind.UNSUPPORTED),
        (ArchivedError, ErrorKind.ARCHIVED),
        (PermissionError, ErrorKind.ACCESS_DENIED),
        (ThrottledError, ErrorKind.THROTTLED),
        (TimeoutError, ErrorKind.TIMEOUT),
    )
    kind = next((kind for types, kind in kinds if isinstance(error, types)), ErrorKind.READ_FAILED)
    message = f"{_IN_ARCHIVE}: {error}" if kind is ErrorKind.ARCHIVED else str(error)
    return Failure("read", kind, message[:500], attempts)


_IN_ARCHIVE = "the store keeps this object in an archive; restore it first"
