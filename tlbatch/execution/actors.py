"""The actors of a run: manifest rows -> outcome rows, with decoder and predictor in one actor or in two."""

from __future__ import annotations

import pyarrow as pa

from tlbatch.execution.decoder import Decoder
from tlbatch.execution.isolation import IsolationMode, Watchdog
from tlbatch.execution.predictor import MIN_HANG_SECONDS, Predictor
from tlbatch.execution.records import ClassifyJob, attempts_from_table, attempts_to_table
from tlbatch.images import decode
from tlbatch.model.bundle import load_bundle


class Classifier:
    """The actor of the fused plan: manifest rows -> outcome rows."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._predictor = Predictor(job, bundle)
        self._decoder = Decoder(job, bundle, 2 * self._predictor.at_once, self._predictor.watchdog)
        self._isolation = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block: while the model runs on one batch, the next images are read and decoded."""
        rows = block.to_pylist()
        return self._isolation.run(
            isolated=lambda: self._predictor.table_isolated(self._decoder.attempts_isolated(rows)),
            normal=lambda: self._predictor.table(self._decoder.attempts(rows)),
        )


class DecodingActor:
    """The first actor of the split plan: manifest rows -> blocks of pixels."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        decode.prepare_process()
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size, self._dtype = bundle.size, bundle.pixel_rules.dtype
        self._decoder = Decoder(job, bundle, 2 * job.decode_threads, Watchdog(MIN_HANG_SECONDS))
        self._isolation = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block of images, read and decoded."""
        rows = block.to_pylist()
        return self._isolation.run(
            isolated=lambda: attempts_to_table(list(self._decoder.attempts_isolated(rows)), self._size, self._dtype),
            normal=lambda: attempts_to_table(list(self._decoder.attempts(rows)), self._size, self._dtype),
        )


class PredictingActor:
    """The second actor of the split plan: blocks of pixels -> outcome rows."""

    def __init__(self, job: ClassifyJob, *, after_a_death: bool = False) -> None:
        bundle = load_bundle(job.bundle_url, job.storage_options)
        self._size = bundle.size
        self._predictor = Predictor(job, bundle)
        self._isolation = IsolationMode(after_a_death=after_a_death)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block of pixels, predicted."""
        attempts = attempts_from_table(block, self._size)
        return self._isolation.run(
            isolated=lambda: self._predictor.table_isolated(attempts),
            normal=lambda: self._predictor.table(attempts),
        )
