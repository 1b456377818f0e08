"""Manifest rows -> attempts: threads read and decode images in advance of the model."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from tlbatch.errors import Failure
from tlbatch.execution.isolation import Quarantine, Watchdog
from tlbatch.execution.records import Attempt, ClassifyJob
from tlbatch.images import decode
from tlbatch.images.reader import Reader
from tlbatch.images.shards import Member
from tlbatch.model.bundle import Bundle
from tlbatch.schema import IMAGE
from tlbatch.storage.resolve import resolve

#: The most bytes of images that an actor holds until they are decoded.
_MAX_PREFETCH_BYTES = 256 * 1024 * 1024


class Fetched(NamedTuple):
    """One image that was read, the seconds it took, and what was skipped in its shard so far."""

    member: Member
    seconds: float
    passed: Mapping[str, int] = MappingProxyType({})


class Decoder:
    """Manifest rows -> attempts, one for each image, whatever the images contain. Several threads may call it at once.

    Args:
        job: the actor's job.
        bundle: its input size is the size of the pixels.
        prefetch: the fewest images that are read and decoded in advance.
        watchdog: watches each decoding step.
    """

    def __init__(self, job: ClassifyJob, bundle: Bundle, prefetch: int, watchdog: Watchdog) -> None:
        self._quarantine = Quarantine(resolve(job.quarantine_url, job.storage_options))
        self._decode = partial(
            decode.decode, size=bundle.size, max_pixels=job.max_pixels, max_side=job.max_side, rules=bundle.pixel_rules
        )
        self._watchdog = watchdog
        requests = job.requests
        self._prefetch = max(prefetch, requests)
        self._reader = Reader(
            job.storage_options,
            requests=requests,
            image_field=job.image_field,
            exclude=job.exclude,
            max_bytes=job.max_bytes,
            probes=job.probes,
        )
        # Requests to a remote store mostly wait, so they have many threads of their own. A thread starts when it is needed.
        self._fetchers = ThreadPoolExecutor(requests, thread_name_prefix="tlbatch-fetch")
        self._decoders = ThreadPoolExecutor(job.decode_threads, thread_name_prefix="tlbatch-decode")

    def attempts(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Attempt]:
        """The images of the rows, in order; while the caller processes one, the next ones are read and decoded."""
        return _run_ahead(self._decoders, self._work(rows), self._prefetch)

    def attempts_isolated(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Attempt]:
        """The images of the rows, one at a time, each marked in the quarantine while it is processed."""
        for row in rows:
            if row["format"] == IMAGE:
                work = partial(self._fetch_and_decode, row, partial(self._fetch, row))
                yield self._isolated(row, 0, row["key"], work)
            else:
                yield from self._members_isolated(row)

    def _work(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Callable[[], Attempt]]]:
        """The tasks of the decoding threads, each with the bytes it holds.

        The decoding thread reads a local image itself. The members of a shard are read here.
        """
        for row in rows:
            if row["format"] == IMAGE:
                fetch: Callable[[], Fetched] = partial(self._fetch, row)
                if "://" in row["uri"]:
                    fetch = self._fetchers.submit(fetch).result
                yield row["size"] or 0, partial(self._fetch_and_decode, row, fetch)
                continue
            began = time.perf_counter()
            passed: Counter[str] = Counter()
            for member in self._reader.members(row, passed):
                fetched = Fetched(member, time.perf_counter() - began, passed)
                yield 0 if isinstance(member.data, Failure) else len(member.data), partial(self._attempt, row, fetched)
                began = time.perf_counter()

    def _members_isolated(self, row: Mapping[str, Any]) -> Iterator[Attempt]:
        passed: Counter[str] = Counter()
        members = self._reader.members(row, passed)
        for index in itertools.count():
            failure = self._quarantine.failure_of(row["row"], index)
            if failure is not None and failure.stage == "read":
                yield Attempt(row, index, row["key"], failure)
                return
            with self._quarantine.isolated(row["row"], index, "read"):
                member = next(members, None)
            if member is None:
                return
            yield self._isolated(row, index, member.key, partial(self._attempt, row, Fetched(member, 0.0, passed)))

    def _isolated(self, row: Mapping[str, Any], index: int, key: str, work: Callable[[], Attempt]) -> Attempt:
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
        return self._attempt(row, fetch())

    def _attempt(self, row: Mapping[str, Any], fetched: Fetched) -> Attempt:
        index, key, data = fetched.member.index, fetched.member.key, fetched.member.data
        if isinstance(data, Failure):
            return Attempt(row, index, key, data, fetched.seconds, passed=fetched.passed)
        began = time.perf_counter()
        with self._watchdog.watching():
            pixels = self._decode(data)
        return Attempt(row, index, key, pixels, fetched.seconds, time.perf_counter() - began, fetched.passed)


def _run_ahead(pool: ThreadPoolExecutor, tasks: Iterable[tuple[int, Callable[[], Attempt]]], depth: int) -> Iterator[Attempt]:
    """The results of tasks, in order. `depth` tasks, fewer if they are large, run in advance of the caller."""
    running: deque[tuple[int, Future[Attempt]]] = deque()
    bytes_held = 0
    for size, task in tasks:
        running.append((size, pool.submit(task)))
        bytes_held += size
        while len(running) >= depth or (bytes_held > _MAX_PREFETCH_BYTES and len(running) > 1):
            size_done, first = running.popleft()
            bytes_held -= size_done
            yield first.result()
    while running:
        yield running.popleft()[1].result()
