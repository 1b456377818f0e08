"""The actors of a run: decoder and predictor fused in one, or split into two."""

from __future__ import annotations

import pyarrow as pa

from tlbatch.execution.decoder import Decoder
from tlbatch.execution.isolation import IsolationMode, Watchdog
from tlbatch.execution.predictor import MIN_HANG_SECONDS, Predictor
from tlbatch.execution.records import (
    ClassifyJob,
    attempts_from_table,
    attempts_to_table,
)
from tlbatch.images import decode
from tlbatch.model.bundle import load_bundle


class Classifier:
    """The fused actor: manifest rows -> outcome rows."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._predictor = Predictor(job, bundle)
        ahead = 2 * self._predictor.at_once
        self._decoder = Decoder(job, bundle, ahead, self._predictor.switch)
        self._careful = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block: while the model works on one batch, the next ones are read and decoded."""
        rows = block.to_pylist()
        return self._careful.work(
            lambda: self._predictor.table_alone(self._decoder.alone(rows)),
            lambda: self._predictor.table(self._decoder.attempts(rows)),
        )


class DecodingActor:
    """The first actor of the split plan: manifest rows -> blocks of pixels."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size = bundle.size
        self._decoder = Decoder(job, bundle, 2 * job.decode_threads, Watchdog(MIN_HANG_SECONDS))
        self._careful = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block of images, read and decoded."""
        rows = block.to_pylist()
        return self._careful.work(
            lambda: attempts_to_table(list(self._decoder.alone(rows)), self._size),
            lambda: attempts_to_table(list(self._decoder.attempts(rows)), self._size),
        )


class PredictingActor:
    """The second actor of the split plan: blocks of pixels -> outcome rows."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size = bundle.size
        self._predictor = Predictor(job, bundle)
        self._careful = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block through the model."""
        attempts = attempts_from_table(block, self._size)
        return self._careful.work(lambda: self._predictor.table_alone(attempts), lambda: self._predictor.table(attempts))
