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
from tlbatch.execution.records import Attempt, Classified, ClassifyJob, OutcomeFormat, PredictionFormat
from tlbatch.images.decode import Pixels
from tlbatch.model.batches import Outputs
from tlbatch.model.bundle import Bundle, load_bundle
from tlbatch.model.engines import Engine, Head, load_engine, load_head
from tlbatch.schema import TABLE
from tlbatch.storage.resolve import resolve

#: A step counts as hung after 40 s, or after 20 times the measured time of one batch, whichever is longer.
MIN_HANG_SECONDS, _HANG_FACTOR = 40.0, 20


class Predictor:
    """Attempts -> outcomes, batch by batch. As many threads as the engine allows run the model at a time."""

    def __init__(self, job: ClassifyJob, bundle: Bundle) -> None:
        self._quarantine = Quarantine(resolve(job.quarantine_url, job.storage_options))
        self._engine = load_engine(bundle, job.engine, threads=job.predict_threads, gpu=job.gpu, batch_size=job.batch_size)
        self._engine_free = threading.BoundedSemaphore(self._engine.parallel)
        self._heads_free = threading.Lock()
        self.at_once = self._engine.at_once
        began = time.perf_counter()
        self._engine.predict(np.zeros((self.at_once, *bundle.size, 3), bundle.pixel_rules.dtype))
        self.watchdog = Watchdog(max(MIN_HANG_SECONDS, _HANG_FACTOR * (time.perf_counter() - began)))
        self._largest = float(np.finfo(job.features_dtype).max) if job.features_dtype else math.inf
        predictions = prediction_format_of(bundle, job.top_k) if job.predictions else None
        self._outcomes = OutcomeFormat(predictions, bundle.features_length, job.features_dtype)
        self._heads = [self._head(load_bundle(url, job.storage_options), job) for url in job.head_urls]

    def _head(self, bundle: Bundle, job: ClassifyJob) -> tuple[Head, OutcomeFormat]:
        head = load_head(bundle, job.engine, threads=job.predict_threads)
        return head, OutcomeFormat(prediction_format_of(bundle, job.top_k), bundle.features_length, None)

    def table(self, attempts: Iterable[Attempt]) -> pa.Table:
        """The outcomes of attempts, in order; with several heads, those of one head after the other."""
        batches = [self._classify(batch) for batch in _batched(attempts, self.at_once)]
        return self._table([outcome for batch in batches for outcome in batch])

    def table_isolated(self, attempts: Iterable[Attempt]) -> pa.Table:
        """The same, one image at a time, each marked in the quarantine while it is processed."""
        return self._table([self._isolated(attempt) for attempt in attempts])

    def _table(self, classified: Sequence[Classified]) -> pa.Table:
        first = self._outcomes.to_table([_writable(one, self._largest) for one in classified])
        if not self._heads:
            return first
        tables = [first]
        for head, outcomes in self._heads:
            with self._heads_free:
                rescored = _with_head(head, classified)
            tables.append(outcomes.to_table(rescored))
        numbered = [table.append_column(TABLE, pa.array(np.full(len(table), n, np.int8))) for n, table in enumerate(tables)]
        return pa.concat_tables(numbered, promote_options="default")

    def _isolated(self, attempt: Attempt) -> Classified:
        if isinstance(attempt.outcome, Failure):
            return Classified(attempt, attempt.outcome)
        failure = self._quarantine.failure_of(attempt.row["row"], attempt.index)
        if failure is not None:
            return Classified(attempt, failure)
        with self._quarantine.isolated(attempt.row["row"], attempt.index, "predict"):
            return self._classify([attempt])[0]

    def _classify(self, batch: list[Attempt]) -> list[Classified]:
        with self._engine_free, self.watchdog.watching():
            return _classify_batch(self._engine, batch)


def prediction_format_of(bundle: Bundle, top_k: int) -> PredictionFormat:
    """How the scores of a bundle's head become predictions."""
    return PredictionFormat(bundle.labels, top_k, bundle.abstain_threshold, bundle.label_thresholds)


def _with_head(head: Head, classified: Sequence[Classified]) -> list[Classified]:
    """The same images with the scores of another head on their features; an image without features keeps its failure."""
    features = [one.features for one in classified if one.features is not None]
    began = time.perf_counter()
    scores = head.predict(np.stack(features)) if features else np.empty((0, 0), np.float32)
    share = (time.perf_counter() - began) / max(1, len(features))
    remaining = iter(scores)
    rescored = []
    for one in classified:
        if one.features is None:
            rescored.append(one)
            continue
        found = next(remaining)
        failure = None if np.isfinite(found).all() else _not_finite()
        rescored.append(Classified(one.attempt, failure, one.features, None if failure else found, share))
    return rescored


def _writable(one: Classified, largest: float) -> Classified:
    """The image, or a failure if one of its features is larger than `largest`, the largest number of the written type."""
    if one.features is None or largest == math.inf or np.abs(one.features).max() <= largest:
        return one
    message = f"a feature of {np.abs(one.features).max():.3g} is too large to be written; set features_dtype=float32"
    return Classified(one.attempt, Failure("predict", ErrorKind.PREDICT_FAILED, message), predict_seconds=one.predict_seconds)


def _classify_batch(engine: Engine, attempts: list[Attempt]) -> list[Classified]:
    """Predict the images that have pixels; the others keep their failure."""
    arrays = [one.outcome.array for one in attempts if isinstance(one.outcome, Pixels)]
    began = time.perf_counter()
    results = iter(_predict(engine, _stacked(arrays)) if arrays else ())
    share = (time.perf_counter() - began) / max(1, len(arrays))
    classified = []
    for one in attempts:
        if isinstance(one.outcome, Failure):
            classified.append(Classified(one, one.outcome))
            continue
        result = next(results)
        if isinstance(result, Failure):
            classified.append(Classified(one, result, predict_seconds=share))
        else:
            classified.append(Classified(one, None, *result, share))
    return classified


def _predict(engine: Engine, pixels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None] | Failure]:
    """Features and scores of each image. If the engine fails on a batch, each image is tried alone and fails alone."""
    try:
        outputs = engine.predict(pixels)
    except Exception as error:  # the exceptions of engines have no common type
        if len(pixels) == 1:
            return [Failure("predict", ErrorKind.PREDICT_FAILED, f"{type(error).__name__}: {error}"[:500])]
        return [_predict(engine, pixels[number : number + 1])[0] for number in range(len(pixels))]
    return [_one_output(outputs, number) for number in range(len(pixels))]


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(n, height, width, 3) pixels, as a view if the images lie one behind the other, as in a block of a decoding actor."""
    first = arrays[0]
    of_one_block = first.base is not None and all(array.base is first.base for array in arrays)
    if of_one_block and (np.diff([array.ctypes.data for array in arrays]) == first.nbytes).all():
        return np.lib.stride_tricks.as_strided(
            first, (len(arrays), *first.shape), (first.nbytes, *first.strides), writeable=False
        )
    return np.stack(arrays)


def _one_output(outputs: Outputs, number: int) -> tuple[np.ndarray, np.ndarray | None] | Failure:
    features, scores = outputs.features[number], None if outputs.scores is None else outputs.scores[number]
    if not np.isfinite(features if scores is None else scores).all():
        return _not_finite()
    return features, scores


def _not_finite() -> Failure:
    return Failure("predict", ErrorKind.PREDICT_FAILED, "the model returned numbers that are not finite")


def _batched(items: Iterable[Attempt], size: int) -> Iterator[list[Attempt]]:
    batch: list[Attempt] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
