"""The actors: manifest rows -> attempts (`Decoder`) -> outcomes (`Predictor`), or both in one (`Classifier`).

On CPUs one actor does both: while the model works on one batch, threads fetch and decode the next ones, so that of an image
nothing crosses Ray's object store. Beside a GPU many CPUs decode for it, and blocks of uint8 pixels cross over.
Rows in = rows out: an image that fails passes through with its reason.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tlbatch import decode
from tlbatch.blocks import Answers, Attempt, Classified, Outcomes, attempts_from_table, attempts_to_table
from tlbatch.decode import Pixels
from tlbatch.errors import ErrorKind, Failure
from tlbatch.guard import DeadMansSwitch, Suspects
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import Engine, Head, Outputs, load_engine, load_head
from tlbatch.reader import Reader
from tlbatch.schema import TABLE
from tlbatch.shards import IMAGE, Member
from tlbatch.storage import resolve

#: Requests an actor keeps in flight to a remote store for each of its CPUs: at 100 ms each they give 320 images a second.
_REQUESTS_PER_CPU = 32
#: Bytes an actor holds of images that wait to be decoded.
_MOST_BYTES_AHEAD = 256 * 1024 * 1024

#: Work hangs that takes longer than this many seconds, and than so many times what this model takes here for all that it is
#: given at a time.
_LEAST_PATIENCE, _PATIENCE = 40.0, 20

#: Blocks that a worker which was started again takes image by image: those it had been given when it died, and some.
_CAREFUL_CALLS = 8


@dataclass(frozen=True)
class Job:
    """What an actor must know. It travels with every task, so there is no credential in it.

    Attributes:
        bundle_url: whose base and head are run.
        head_urls: bundles of the same base, whose heads are run on the same features, each for a table of its own.
    """

    bundle_url: str
    head_urls: tuple[str, ...]
    storage_options: Mapping[str, Any]
    engine: str
    decode_threads: int
    predict_threads: int
    gpu: bool
    batch_size: int | None
    remote: bool
    image_field: str | None
    max_bytes: int
    max_pixels: int
    max_side: int
    top_k: int
    predictions: bool
    features_dtype: str | None
    suspects_url: str

    @property
    def requests(self) -> int:
        """Images that one actor reads at once. What a local disk holds is read where it is decoded."""
        return _REQUESTS_PER_CPU * self.decode_threads if self.remote else self.decode_threads


class Fetched(NamedTuple):
    """One image that was read, and the seconds it took."""

    member: Member
    seconds: float


class _Careful:
    """Whether a block is taken image by image: a worker died over one of the first, and nobody knows of which image."""

    def __init__(self, *, after_a_death: bool) -> None:
        self._calls = _CAREFUL_CALLS if after_a_death else 0
        self._lock = threading.Lock()

    def work(self, carefully: Callable[[], pa.Table], freely: Callable[[], pa.Table]) -> pa.Table:
        """Do one block's work in one of two ways; the careful one by one thread at a time."""
        with self._lock:
            if self._calls:
                self._calls -= 1
                return carefully()
        return freely()


class Decoder:
    """Manifest rows -> attempts, none lost whatever the images are. Several threads may call it at once."""

    def __init__(self, job: Job, bundle: Bundle, ahead: int, switch: DeadMansSwitch) -> None:
        self._suspects = Suspects(resolve(job.suspects_url, job.storage_options))
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
        return _ahead(self._decoders, self._work(rows), self._depth)

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
            condemned = self._suspects.condemn(row["row"], index)
            if condemned is not None and condemned.stage == "read":
                yield Attempt(row, index, row["key"], condemned)
                return
            with self._suspects.alone_with(row["row"], index, "read"):
                member = next(members, None)
            if member is None:
                return
            yield self._alone(row, index, member.key, partial(self._decode, row, Fetched(member, 0.0)))

    def _alone(self, row: Mapping[str, Any], index: int, key: str, work: Callable[[], Attempt]) -> Attempt:
        condemned = self._suspects.condemn(row["row"], index)
        if condemned is not None:
            return Attempt(row, index, key, condemned)
        with self._suspects.alone_with(row["row"], index, "decode"):
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


class Predictor:
    """Attempts -> outcomes, batch by batch; the model is one thread's at a time."""

    def __init__(self, job: Job, bundle: Bundle) -> None:
        self._suspects = Suspects(resolve(job.suspects_url, job.storage_options))
        self._engine = load_engine(bundle, job.engine, threads=job.predict_threads, gpu=job.gpu, batch_size=job.batch_size)
        self._lock = threading.Lock()
        self.at_once = self._engine.at_once
        began = time.perf_counter()
        self._engine.predict(np.zeros((self.at_once, *bundle.size, 3), np.uint8))
        self.switch = DeadMansSwitch(max(_LEAST_PATIENCE, _PATIENCE * (time.perf_counter() - began)))
        self._most = float(np.finfo(job.features_dtype).max) if job.features_dtype else math.inf
        answers = answers_of(bundle, job.top_k) if job.predictions else None
        self._outcomes = Outcomes(answers, bundle.features_length, job.features_dtype)
        self._heads = [self._head(load_bundle(url, job.storage_options), job) for url in job.head_urls]

    def _head(self, bundle: Bundle, job: Job) -> tuple[Head, Outcomes]:
        head = load_head(bundle, job.engine, threads=job.predict_threads)
        return head, Outcomes(answers_of(bundle, job.top_k), bundle.features_length, None)

    def table(self, attempts: Iterable[Attempt]) -> pa.Table:
        """Outcomes of attempts, in order; where there are several heads, of one after the other."""
        batches = [self._classify(batch) for batch in _batched(attempts, self.at_once)]
        return self._table([outcome for batch in batches for outcome in batch])

    def table_alone(self, attempts: Iterable[Attempt]) -> pa.Table:
        """The same, one by one, each marked while this worker is alone with it."""
        return self._table([self._alone(attempt) for attempt in attempts])

    def _table(self, classified: Sequence[Classified]) -> pa.Table:
        first = self._outcomes.to_table([_writable(one, self._most) for one in classified])
        if not self._heads:
            return first
        tables = [first]
        for head, outcomes in self._heads:
            with self._lock:
                others = _with_head(head, classified)
            tables.append(outcomes.to_table(others))
        numbered = [table.append_column(TABLE, pa.array(np.full(len(table), n, np.int8))) for n, table in enumerate(tables)]
        return pa.concat_tables(numbered, promote_options="default")

    def _alone(self, attempt: Attempt) -> Classified:
        if isinstance(attempt.outcome, Failure):
            return Classified(attempt, attempt.outcome)
        condemned = self._suspects.condemn(attempt.row["row"], attempt.index)
        if condemned is not None:
            return Classified(attempt, condemned)
        with self._suspects.alone_with(attempt.row["row"], attempt.index, "predict"):
            return self._classify([attempt])[0]

    def _classify(self, batch: list[Attempt]) -> list[Classified]:
        with self._lock, self.switch.watching():
            return _classify_batch(self._engine, batch)


class Classifier:
    """The fused actor: manifest rows -> outcome rows."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._predictor = Predictor(job, bundle)
        ahead = 2 * self._predictor.at_once
        self._decoder = Decoder(job, bundle, ahead, self._predictor.switch)
        self._careful = _Careful(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block: while the model works on one batch, the next ones are read and decoded."""
        rows = block.to_pylist()
        return self._careful.work(
            lambda: self._predictor.table_alone(self._decoder.alone(rows)),
            lambda: self._predictor.table(self._decoder.attempts(rows)),
        )


class DecodingActor:
    """The first actor of the split plan: manifest rows -> blocks of pixels."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size = bundle.size
        self._decoder = Decoder(job, bundle, 2 * job.decode_threads, DeadMansSwitch(_LEAST_PATIENCE))
        self._careful = _Careful(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block of images, read and decoded."""
        rows = block.to_pylist()
        return self._careful.work(
            lambda: attempts_to_table(list(self._decoder.alone(rows)), self._size),
            lambda: attempts_to_table(list(self._decoder.attempts(rows)), self._size),
        )


class PredictingActor:
    """The second actor of the split plan: blocks of pixels -> outcome rows."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size = bundle.size
        self._predictor = Predictor(job, bundle)
        self._careful = _Careful(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block through the model."""
        attempts = attempts_from_table(block, self._size)
        return self._careful.work(lambda: self._predictor.table_alone(attempts), lambda: self._predictor.table(attempts))


def answers_of(bundle: Bundle, top_k: int) -> Answers:
    """How the scores of a bundle's head are read."""
    return Answers(bundle.labels, top_k, bundle.abstain_threshold, bundle.label_thresholds)


def _with_head(head: Head, classified: Sequence[Classified]) -> list[Classified]:
    """The same images with the scores of another head on their features; an image without features keeps its failure."""
    features = [one.features for one in classified if one.features is not None]
    began = time.perf_counter()
    scores = head.predict(np.stack(features)) if features else np.empty((0, 0), np.float32)
    share = (time.perf_counter() - began) / max(1, len(features))
    given = iter(scores)
    found = []
    for one in classified:
        if one.features is None:
            found.append(one)
            continue
        own = next(given)
        failure = None if np.isfinite(own).all() else _not_finite()
        found.append(Classified(one.attempt, failure, one.features, None if failure else own, share))
    return found


def _writable(one: Classified, most: float) -> Classified:
    """An image whose features are to be written fails where a number is larger than `most`, which the type can hold."""
    if one.features is None or most == math.inf or np.abs(one.features).max() <= most:
        return one
    message = f"a feature of {np.abs(one.features).max():.3g} is more than can be written; set features_dtype=float32"
    return Classified(one.attempt, Failure("predict", ErrorKind.PREDICT_FAILED, message), predict_seconds=one.predict_seconds)


def _classify_batch(engine: Engine, attempts: list[Attempt]) -> list[Classified]:
    """Predict the images that have pixels; the others pass through with their reason."""
    arrays = [one.outcome.array for one in attempts if isinstance(one.outcome, Pixels)]
    began = time.perf_counter()
    given = iter(_predict(engine, np.stack(arrays)) if arrays else ())
    share = (time.perf_counter() - began) / max(1, len(arrays))
    classified = []
    for one in attempts:
        if isinstance(one.outcome, Failure):
            classified.append(Classified(one, one.outcome))
            continue
        answer = next(given)
        if isinstance(answer, Failure):
            classified.append(Classified(one, answer, predict_seconds=share))
        else:
            classified.append(Classified(one, None, *answer, share))
    return classified


def _predict(engine: Engine, pixels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None] | Failure]:
    """Features and scores of each image. A batch the engine refuses is tried image by image: one never costs another."""
    try:
        outputs = engine.predict(pixels)
    except Exception as error:  # an engine's own exceptions are of no common kind
        if len(pixels) == 1:
            return [Failure("predict", ErrorKind.PREDICT_FAILED, f"{type(error).__name__}: {error}"[:500])]
        return [_predict(engine, pixels[number : number + 1])[0] for number in range(len(pixels))]
    return [_one_output(outputs, number) for number in range(len(pixels))]


def _one_output(outputs: Outputs, number: int) -> tuple[np.ndarray, np.ndarray | None] | Failure:
    features, scores = outputs.features[number], None if outputs.scores is None else outputs.scores[number]
    if not np.isfinite(features if scores is None else scores).all():
        return _not_finite()
    return features, scores


def _not_finite() -> Failure:
    return Failure("predict", ErrorKind.PREDICT_FAILED, "the model gave numbers that are not finite")


def _ahead(pool: ThreadPoolExecutor, work: Iterable[tuple[int, Callable[[], Attempt]]], depth: int) -> Iterator[Attempt]:
    """What each piece of work gives, in order; `depth` of them are under way, fewer of large ones, while the caller works."""
    waiting: deque[tuple[int, Future[Attempt]]] = deque()
    held = 0
    for size, one in work:
        waiting.append((size, pool.submit(one)))
        held += size
        while len(waiting) >= depth or (held > _MOST_BYTES_AHEAD and len(waiting) > 1):
            size_done, first = waiting.popleft()
            held -= size_done
            yield first.result()
    while waiting:
        yield waiting.popleft()[1].result()


def _batched(items: Iterable[Attempt], size: int) -> Iterator[list[Attempt]]:
    batch: list[Attempt] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
