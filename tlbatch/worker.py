"""The actor of the CPU plan: manifest rows -> outcome rows; reads, decodes and predicts in one place.

While the model works on one batch, threads fetch and decode the next ones, so that of an image only its result ever
crosses Ray's object store. Rows in = rows out: an image that fails passes through with its reason.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tlbatch import decode, schema
from tlbatch.decode import Pixels
from tlbatch.errors import ErrorKind, Failure
from tlbatch.guard import DeadMansSwitch, Suspects
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import Engine, Outputs, load_engine
from tlbatch.reader import Reader
from tlbatch.shards import IMAGE, Member
from tlbatch.storage import resolve

#: Requests an actor keeps in flight to a remote store for each of its CPUs: at 100 ms each they give 320 images a second.
_REQUESTS_PER_CPU = 32
#: Bytes an actor holds of images that wait to be decoded.
_MOST_BYTES_AHEAD = 256 * 1024 * 1024

#: Work that takes longer than this many seconds, and than so many batches of this model here, hangs.
_LEAST_PATIENCE, _PATIENCE_IN_BATCHES = 40.0, 20

#: Blocks that a worker which was started again takes image by image: those it had been given when it died, and some.
_CAREFUL_CALLS = 8


@dataclass(frozen=True)
class Job:
    """What an actor must know. It travels with every task, so there is no credential in it."""

    bundle_url: str
    storage_options: Mapping[str, Any]
    engine: str
    threads: int
    gpu: bool
    batch_size: int | None
    remote: bool
    image_field: str | None
    max_bytes: int
    max_pixels: int
    top_k: int
    predictions: bool
    features_dtype: str | None
    suspects_url: str

    @property
    def requests(self) -> int:
        """Images that one actor reads at once. What a local disk holds is read where it is decoded."""
        return _REQUESTS_PER_CPU * self.threads if self.remote else self.threads


class Fetched(NamedTuple):
    """One image that was read, and the seconds it took."""

    member: Member
    seconds: float


class Attempt(NamedTuple):
    """One image on its way: whose it is, its pixels or a failure, and the seconds spent on it."""

    row: Mapping[str, Any]
    member: Member
    outcome: Pixels | Failure
    fetch_seconds: float
    decode_seconds: float


class Classified(NamedTuple):
    """One image after the model: a failure, or features and, with a head, scores."""

    attempt: Attempt
    failure: Failure | None
    features: np.ndarray | None
    scores: np.ndarray | None
    predict_seconds: float


class Classifier:
    """The actor: manifest rows -> outcome rows, none lost whatever the images are. Several threads may call it at once."""

    def __init__(self, job: Job, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        self._suspects = Suspects(resolve(job.suspects_url, job.storage_options))
        self._careful_calls = _CAREFUL_CALLS if after_a_death else 0
        self._job = job
        self._bundle = load_bundle(job.bundle_url, job.storage_options)
        self._engine = load_engine(self._bundle, job.engine, threads=job.threads, gpu=job.gpu, batch_size=job.batch_size)
        self._labels = np.array(self._bundle.labels)
        self._batch = self._engine.batch_size * 2
        self._engine_lock = threading.Lock()
        self._careful_lock = threading.Lock()
        self._switch = DeadMansSwitch(max(_LEAST_PATIENCE, _PATIENCE_IN_BATCHES * self._seconds_a_batch()))
        self._ahead = max(self._batch * 3, job.requests)
        self._reader = Reader(
            job.storage_options,
            requests=job.requests,
            image_field=job.image_field,
            max_bytes=job.max_bytes,
        )
        # A remote store is waited for, by many threads.
        self._fetchers = ThreadPoolExecutor(job.requests, thread_name_prefix="tlbatch-fetch") if job.remote else None
        self._decoders = ThreadPoolExecutor(job.threads, thread_name_prefix="tlbatch-decode")

    def _seconds_a_batch(self) -> float:
        began = time.perf_counter()
        self._engine.predict(np.zeros((self._batch, *self._bundle.size, 3), np.uint8))
        return time.perf_counter() - began

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block: while the model works on one batch, the next ones are read and decoded."""
        with self._careful_lock:
            if self._careful_calls:
                self._careful_calls -= 1
                return self._to_table([one for row in rows.to_pylist() for one in self._alone(row)])
        attempts = _ahead(self._decoders, self._work(rows.to_pylist()), self._ahead)
        batches = [self._classify(batch) for batch in _batched(attempts, self._batch)]
        return self._to_table([outcome for batch in batches for outcome in batch])

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

    def _classify(self, batch: list[Attempt]) -> list[Classified]:
        with self._engine_lock, self._switch.watching():
            return _classify_batch(self._engine, batch)

    def _alone(self, row: Mapping[str, Any]) -> Iterator[Classified]:
        """An object's images, one by one: a worker died, and nobody knows yet of which."""
        if row["format"] == IMAGE:
            yield self._classified_alone(row, 0, row["key"], lambda: self._fetch_and_decode(row, partial(self._fetch, row)))
            return
        members = self._reader.members(row)
        for index in itertools.count():
            condemned = self._suspects.condemn(row["row"], index)
            if condemned is not None and condemned.stage == "read":
                yield _passed_over(row, index, row["key"], condemned)
                return
            with self._suspects.alone_with(row["row"], index, "read"):
                member = next(members, None)
            if member is None:
                return
            yield self._classified_alone(row, index, member.key, partial(self._decode, row, Fetched(member, 0.0)))

    def _classified_alone(self, row: Mapping[str, Any], index: int, key: str, work: Callable[[], Attempt]) -> Classified:
        condemned = self._suspects.condemn(row["row"], index)
        if condemned is not None:
            return _passed_over(row, index, key, condemned)
        with self._suspects.alone_with(row["row"], index, "decode"):
            attempt = work()
        with self._suspects.alone_with(row["row"], index, "predict"):
            return self._classify([attempt])[0]

    def _fetch(self, row: Mapping[str, Any]) -> Fetched:
        began = time.perf_counter()
        data = self._reader.image(row)
        return Fetched(Member(0, row["key"], data), time.perf_counter() - began)

    def _fetch_and_decode(self, row: Mapping[str, Any], fetch: Callable[[], Fetched]) -> Attempt:
        return self._decode(row, fetch())

    def _decode(self, row: Mapping[str, Any], fetched: Fetched) -> Attempt:
        member = fetched.member
        if isinstance(member.data, Failure):
            return Attempt(row, member, member.data, fetched.seconds, 0.0)
        began = time.perf_counter()
        with self._switch.watching():
            pixels = decode.decode(member.data, self._bundle.size, max_pixels=self._job.max_pixels)
        bare = Member(member.index, member.key, b"")  # the bytes are not needed any more
        return Attempt(row, bare, pixels, fetched.seconds, time.perf_counter() - began)

    def _to_table(self, classified: list[Classified]) -> pa.Table:
        rows = [one.attempt.row for one in classified]
        members = [one.attempt.member for one in classified]
        failures = [one.failure for one in classified]
        pixels = [one.attempt.outcome if isinstance(one.attempt.outcome, Pixels) else None for one in classified]
        held = Counter(row["row"] for row in rows)
        columns: dict[str, Any] = {
            schema.IMAGES: [held[row["row"]] for row in rows],
            **{name: [row[name] for row in rows] for name in ("row", "uri", "etag")},
            "key": [member.key for member in members],
            "index": [member.index for member in members],
            "stage": [failure and failure.stage for failure in failures],
            "kind": [failure and str(failure.kind) for failure in failures],
            "message": [failure and failure.message for failure in failures],
            "attempts": [failure and failure.attempts for failure in failures],
            "transient": [failure.transient if failure else None for failure in failures],
            "width": [image and image.width for image in pixels],
            "height": [image and image.height for image in pixels],
            "fetch_seconds": [one.attempt.fetch_seconds for one in classified],
            "decode_seconds": [one.attempt.decode_seconds for one in classified],
            "predict_seconds": [one.predict_seconds for one in classified],
        }
        wanted = schema.outcome_schema(
            classified=self._job.predictions,
            features_length=self._bundle.features_length if self._job.features_dtype else None,
            features_dtype=self._job.features_dtype or "float32",
        )
        if self._job.predictions:
            columns |= self._answers([one.scores for one in classified])
        if self._job.features_dtype:
            columns["features"] = _vectors([one.features for one in classified], wanted.field("features").type)
        return pa.table({name: columns[name] for name in wanted.names}, schema=wanted)

    def _answers(self, scores: list[Any]) -> dict[str, list[Any]]:
        """label, score and their like for each image, best first; equal scores keep the labels' order."""
        orders = [None if one is None else np.argsort(-one, kind="stable")[: self._job.top_k] for one in scores]
        names = [None if order is None else self._labels[order].tolist() for order in orders]
        values = [None if order is None else one[order].tolist() for order, one in zip(orders, scores, strict=True)]
        top = [value and value[0] for value in values]
        threshold = self._bundle.abstain_threshold
        return {
            "label": [name and name[0] for name in names],
            "score": top,
            "top_labels": names,
            "top_scores": values,
            "abstained": [None if score is None else threshold is not None and score < threshold for score in top],
        }


def _passed_over(row: Mapping[str, Any], index: int, key: str, reason: Failure) -> Classified:
    """An image that is not tried again."""
    return Classified(Attempt(row, Member(index, key, reason), reason, 0.0, 0.0), reason, None, None, 0.0)


def _classify_batch(engine: Engine, attempts: list[Attempt]) -> list[Classified]:
    """Predict the images that have pixels; the others pass through with their reason."""
    arrays = [one.outcome.array for one in attempts if isinstance(one.outcome, Pixels)]
    began = time.perf_counter()
    given = iter(_predict(engine, np.stack(arrays)) if arrays else ())
    share = (time.perf_counter() - began) / max(1, len(arrays))
    classified = []
    for one in attempts:
        if isinstance(one.outcome, Failure):
            classified.append(Classified(one, one.outcome, None, None, 0.0))
            continue
        answer = next(given)
        if isinstance(answer, Failure):
            classified.append(Classified(one, answer, None, None, share))
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
    scores = None if outputs.scores is None else outputs.scores[number]
    if not np.isfinite(outputs.features[number] if scores is None else scores).all():
        return Failure("predict", ErrorKind.PREDICT_FAILED, "the model gave numbers that are not finite")
    return outputs.features[number], scores


def _vectors(features: list[np.ndarray | None], kind: pa.FixedSizeListType) -> pa.Array:
    """Vectors, None where an image failed, as a fixed-size list column without a Python object a number."""
    dtype = kind.value_type.to_pandas_dtype()
    nothing = np.zeros(kind.list_size, dtype)
    flat = np.concatenate([nothing if one is None else one.astype(dtype) for one in features])
    missing = pa.array([one is None for one in features])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind, mask=missing)


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
