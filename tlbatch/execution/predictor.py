"""Attempts -> outcomes, batch by batch, with the bundle's model and any further heads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from tlbatch.errors import ErrorKind, Failure
from tlbatch.execution.isolation import Quarantine, Watchdog
from tlbatch.execution.records import (
    Attempt,
    Classified,
    ClassifyJob,
    OutcomeFormat,
    PredictionFormat,
)
from tlbatch.images.decode import Pixels
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import Engine, Head, Outputs, load_engine, load_head
from tlbatch.schema import TABLE
from tlbatch.storage.resolve import resolve

#: Work hangs that takes longer than this many seconds, and than so many times what this model takes here for all that it is
#: given at a time.
MIN_HANG_SECONDS, _HANG_FACTOR = 40.0, 20


class Predictor:
    """Attempts -> outcomes, batch by batch; the model is one thread's at a time."""

    def __init__(self, job: ClassifyJob, bundle: Bundle) -> None:
        self._quarantine = Quarantine(resolve(job.quarantine_url, job.storage_options))
        self._engine = load_engine(bundle, job.engine, threads=job.predict_threads, gpu=job.gpu, batch_size=job.batch_size)
        self._lock = threading.Lock()
        self.at_once = self._engine.at_once
        began = time.perf_counter()
        self._engine.predict(np.zeros((self.at_once, *bundle.size, 3), np.uint8))
        self.switch = Watchdog(max(MIN_HANG_SECONDS, _HANG_FACTOR * (time.perf_counter() - began)))
        self._most = float(np.finfo(job.features_dtype).max) if job.features_dtype else math.inf
        answers = prediction_format_of(bundle, job.top_k) if job.predictions else None
        self._outcomes = OutcomeFormat(answers, bundle.features_length, job.features_dtype)
        self._heads = [self._head(load_bundle(url, job.storage_options), job) for url in job.head_urls]

    def _head(self, bundle: Bundle, job: ClassifyJob) -> tuple[Head, OutcomeFormat]:
        head = load_head(bundle, job.engine, threads=job.predict_threads)
        return head, OutcomeFormat(prediction_format_of(bundle, job.top_k), bundle.features_length, None)

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
        failure = self._quarantine.failure_of(attempt.row["row"], attempt.index)
        if failure is not None:
            return Classified(attempt, failure)
        with self._quarantine.isolated(attempt.row["row"], attempt.index, "predict"):
            return self._classify([attempt])[0]

    def _classify(self, batch: list[Attempt]) -> list[Classified]:
        with self._lock, self.switch.watching():
            return _classify_batch(self._engine, batch)


def prediction_format_of(bundle: Bundle, top_k: int) -> PredictionFormat:
    """How the scores of a bundle's head are read."""
    return PredictionFormat(bundle.labels, top_k, bundle.abstain_threshold, bundle.label_thresholds)


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


def _batched(items: Iterable[Attempt], size: int) -> Iterator[list[Attempt]]:
    batch: list[Attempt] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
