"""Manifest rows -> attempts: images read and decoded ahead of the model by threads."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from tlbatch.errors import Failure
from tlbatch.execution.isolation import Quarantine, Watchdog
from tlbatch.execution.records import (
    Attempt,
    ClassifyJob,
)
from tlbatch.images import decode
from tlbatch.images.reader import Reader
from tlbatch.images.shards import Member
from tlbatch.model.bundle import Bundle
from tlbatch.schema import IMAGE
from tlbatch.storage.resolve import resolve

#: Bytes an actor holds of images that wait to be decoded.
_MAX_PREFETCH_BYTES = 256 * 1024 * 1024


class Fetched(NamedTuple):
    """One image that was read, and the seconds it took."""

    member: Member
    seconds: float


class Decoder:
    """Manifest rows -> attempts, none lost whatever the images are. Several threads may call it at once."""

    def __init__(self, job: ClassifyJob, bundle: Bundle, ahead: int, switch: Watchdog) -> None:
        self._quarantine = Quarantine(resolve(job.quarantine_url, job.storage_options))
        self._size, self._limits = bundle.size, {"max_pixels": job.max_pixels, "max_side": job.max_side}
        self._switch = switch
        requests = job.requests
        self._depth = max(ahead, requests)
        self._reader = Reader(job.storage_options, requests=requests, image_field=job.image_field, max_bytes=job.max_bytes)
        # A remote store is waited for, by many threads.
        self._fetchers = ThreadPoolExecutor(requests, thread_name_prefix="tlbatch-fetch") if job.remote else None
        self._decoders = ThreadPoolExecutor(job.decode_threads, thread_name_prefix="tlbatch-decode")

    def attempts(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Attempt]:
        """The images of the rows, in order; while the caller works on one, the next ones are read and decoded."""
        return _prefetch(self._decoders, self._work(rows), self._depth)

    def alone(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Attempt]:
        """The same, one by one, each marked while this worker is alone with it."""
        for row in rows:
            if row["format"] == IMAGE:
                work = partial(self._fetch_and_decode, row, partial(self._fetch, row))
                yield self._alone(row, 0, row["key"], work)
            else:
                yield from self._members_alone(row)

    def _work(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Callable[[], Attempt]]]:
        """What decoding threads do, with the bytes it holds: images, loose or out of shards that are read here."""
        for row in rows:
            if row["format"] == IMAGE:
                fetch: Callable[[], Fetched] = partial(self._fetch, row)
                if self._fetchers is not None:
                    fetch = self._fetchers.submit(fetch).result
                yield row["size"] or 0, partial(self._fetch_and_decode, row, fetch)
                continue
            began = time.perf_counter()
            for member in self._reader.members(row):
                read = Fetched(member, time.perf_counter() - began)
                yield 0 if isinstance(member.data, Failure) else len(member.data), partial(self._decode, row, read)
                began = time.perf_counter()

    def _members_alone(self, row: Mapping[str, Any]) -> Iterator[Attempt]:
        members = self._reader.members(row)
        for index in itertools.count():
            failure = self._quarantine.failure_of(row["row"], index)
            if failure is not None and failure.stage == "read":
                yield Attempt(row, index, row["key"], failure)
                return
            with self._quarantine.isolated(row["row"], index, "read"):
                member = next(members, None)
            if member is None:
                return
            yield self._alone(row, index, member.key, partial(self._decode, row, Fetched(member, 0.0)))

    def _alone(self, row: Mapping[str, Any], index: int, key: str, work: Callable[[], Attempt]) -> Attempt:
        failure = self._quarantine.failure_of(row["row"], index)
        if failure is not None:
            return Attempt(row, index, key, failure)
        with self._quarantine.isolated(row["row"], index, "decode"):
            return work()

    def _fetch(self, row: Mapping[str, Any]) -> Fetched:
        began = time.perf_counter()
        data = self._reader.image(row)
        return Fetched(Member(0, row["key"], data), time.perf_counter() - began)

    def _fetch_and_decode(self, row: Mapping[str, Any], fetch: Callable[[], Fetched]) -> Attempt:
        return self._decode(row, fetch())

    def _decode(self, row: Mapping[str, Any], fetched: Fetched) -> Attempt:
        index, key, data = fetched.member.index, fetched.member.key, fetched.member.data
        if isinstance(data, Failure):
            return Attempt(row, index, key, data, fetched.seconds)
        began = time.perf_counter()
        with self._switch.watching():
            pixels = decode.decode(data, self._size, **self._limits)
        return Attempt(row, index, key, pixels, fetched.seconds, time.perf_counter() - began)


def _prefetch(pool: ThreadPoolExecutor, work: Iterable[tuple[int, Callable[[], Attempt]]], depth: int) -> Iterator[Attempt]:
    """What each piece of work gives, in order; `depth` of them are under way, fewer of large ones, while the caller works."""
    waiting: deque[tuple[int, Future[Attempt]]] = deque()
    held = 0
    for size, one in work:
        waiting.append((size, pool.submit(one)))
        held += size
        while len(waiting) >= depth or (held > _MAX_PREFETCH_BYTES and len(waiting) > 1):
            size_done, first = waiting.popleft()
            held -= size_done
            yield first.result()
    while waiting:
        yield waiting.popleft()[1].result()
