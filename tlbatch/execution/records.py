"""What decoder and predictor pass on, as Arrow tables: attempts with their pixels, and outcomes.

No image is lost: an image that failed is a row with its reason. If one actor decodes and predicts, only outcomes become Arrow
tables. Otherwise the resized uint8 pixels do, too, and nothing larger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.decode import Pixels
from tlbatch.schema import Size

#: The columns of every outcome, whatever else the run asks for.
_COMMON = schema.outcome_schema(classified=False, features_length=None, features_dtype="float32")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One image before the model: its object's manifest row, its index and key, its pixels or a failure, and the time spent."""

    row: Mapping[str, Any]
    index: int
    key: str
    outcome: Pixels | Failure
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    #: What was skipped in the shard, by kind; complete once the shard is read.
    passed: Mapping[str, int] = field(default_factory=dict)


class Classified(NamedTuple):
    """One image after the model: a failure, or features and, with a head, scores."""

    attempt: Attempt
    failure: Failure | None
    features: np.ndarray | None = None
    scores: np.ndarray | None = None
    predict_seconds: float = 0.0


def attempts_to_table(attempts: Sequence[Attempt], size: Size, dtype: str = "uint8") -> pa.Table:
    """Attempts as a block; `pixels` holds height x width x 3 numbers, null for an image that failed."""
    arrays = [one.outcome.array if isinstance(one.outcome, Pixels) else None for one in attempts]
    flat = np.empty((len(arrays), *size, 3), dtype)
    for slot, array in zip(flat, arrays, strict=True):
        slot[...] = 0 if array is None else array
    length = 3 * size[0] * size[1]
    missing = pa.array([array is None for array in arrays], pa.bool_())
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), length, mask=missing)
    failures = [one.outcome if isinstance(one.outcome, Failure) else None for one in attempts]
    columns = _common_columns(attempts, failures) | {"pixels": values}
    fields = [field for field in _COMMON if field.name in columns]
    return pa.table(columns, schema=pa.schema([*fields, pa.field("pixels", values.type)]))


def attempts_from_table(table: pa.Table, size: Size) -> list[Attempt]:
    """The inverse of `attempts_to_table`; the pixels are views of the block."""
    column = table["pixels"].combine_chunks()
    flat = column.values.to_numpy().reshape(-1, *size, 3)[column.offset :]
    attempts = []
    for number, row in enumerate(table.drop_columns(["pixels"]).to_pylist()):
        if row["kind"] is None:
            outcome: Pixels | Failure = Pixels(flat[number], row["width"], row["height"], row[schema.WHITE_LEVEL])
        else:
            outcome = Failure(row["stage"], ErrorKind(row["kind"]), row["message"], row["attempts"])
        passed = json.loads(row[schema.PASSED] or "{}")
        attempts.append(Attempt(row, row["index"], row["key"], outcome, row["fetch_seconds"], row["decode_seconds"], passed))
    return attempts


def _common_columns(attempts: Sequence[Attempt], failures: Sequence[Failure | None]) -> dict[str, Any]:
    """The columns that attempts and outcomes share."""
    images = Counter(one.row["row"] for one in attempts)
    pixels = [one.outcome if isinstance(one.outcome, Pixels) else None for one in attempts]
    return {
        schema.IMAGES: [images[one.row["row"]] for one in attempts],
        schema.PASSED: [json.dumps(one.passed) if one.passed and not one.index else None for one in attempts],
        **{name: [one.row[name] for one in attempts] for name in ("row", "uri", "etag")},
        "key": [one.key for one in attempts],
        "index": [one.index for one in attempts],
        "stage": [failure and failure.stage for failure in failures],
        "kind": [failure and str(failure.kind) for failure in failures],
        "message": [failure and failure.message for failure in failures],
        "attempts": [failure and failure.attempts for failure in failures],
        "transient": [_is_transient(one, failure) for one, failure in zip(attempts, failures, strict=True)],
        "width": [one and one.width for one in pixels],
        "height": [one and one.height for one in pixels],
        schema.WHITE_LEVEL: [one and one.white_level for one in pixels],
        "fetch_seconds": [one.fetch_seconds for one in attempts],
        "decode_seconds": [one.decode_seconds for one in attempts],
    }


def _is_transient(attempt: Attempt, failure: Failure | None) -> bool | None:
    """Whether another run may succeed; None for an image that did not fail.

    What this run's own listing had and a request did not find is away, perhaps only for a while. A list of addresses, which
    gives no etag, may name what never existed.
    """
    if failure is None:
        return None
    return failure.transient or (failure.kind is ErrorKind.NOT_FOUND and attempt.row["etag"] is not None)


class PredictionFormat(NamedTuple):
    """How scores become predictions: the classes, and when an image is abstained.

    Attributes:
        labels: the classes, in the order of the scores.
        top_k: how many classes `top_labels` lists.
        abstain_threshold: an image with a lower best score is marked `abstained`; None if none is.
        label_thresholds: for each label the lowest score at which an image gets it, if images may have several labels.
    """

    labels: Sequence[str]
    top_k: int
    abstain_threshold: float | None = None
    label_thresholds: Sequence[float] | None = None

    def columns(self, scores: np.ndarray) -> dict[str, pa.Array]:
        """The columns of predictions from (n, C) scores, best first; equal scores keep the order of the classes.

        If an image may have several labels, `top_labels` are the labels it gets.
        """
        labels = pa.array(self.labels, pa.string())
        order = np.argsort(-scores, axis=1, kind="stable")
        values = np.take_along_axis(scores, order, axis=1)
        named = np.broadcast_to(np.arange(order.shape[1]) < self.top_k, order.shape)
        least = -np.inf if self.abstain_threshold is None else self.abstain_threshold
        abstained = np.asarray(values[:, 0] < least)
        if self.label_thresholds is not None:
            named = values >= np.asarray(self.label_thresholds, scores.dtype)[order]
            abstained = ~np.asarray(named.any(axis=1))
        ends = np.concatenate([[0], np.cumsum(named.sum(axis=1))]).astype(np.int32)
        of_type = dict(schema.CLASSIFIED)
        return {
            "label": labels.take(pa.array(order[:, 0])),
            "score": pa.array(values[:, 0], pa.float32()),
            "top_labels": pa.ListArray.from_arrays(ends, labels.take(pa.array(order[named])), of_type["top_labels"]),
            "top_scores": pa.ListArray.from_arrays(ends, pa.array(values[named], pa.float32()), of_type["top_scores"]),
            "abstained": pa.array(abstained),
        }


class OutcomeFormat(NamedTuple):
    """The columns that a run needs of each image, as a table of `schema.outcome_schema`."""

    #: None if nothing is predicted.
    predictions: PredictionFormat | None
    features_length: int
    features_dtype: str | None

    def to_table(self, classified: Sequence[Classified]) -> pa.Table:
        """One row per image, in the same order."""
        columns = _common_columns([one.attempt for one in classified], [one.failure for one in classified])
        columns["predict_seconds"] = [one.predict_seconds for one in classified]
        wanted = schema.outcome_schema(
            classified=self.predictions is not None,
            features_length=self.features_length if self.features_dtype else None,
            features_dtype=self.features_dtype or "float32",
        )
        if self.predictions is not None:
            columns |= _prediction_columns(self.predictions, [one.scores for one in classified])
        if self.features_dtype:
            columns["features"] = _vectors([one.features for one in classified], wanted.field("features").type)
        return pa.table({name: columns[name] for name in wanted.names}, schema=wanted)


def _prediction_columns(form: PredictionFormat, scores: list[Any]) -> dict[str, pa.Array]:
    """The columns of predictions, null for an image without scores."""
    existing = [one for one in scores if one is not None]
    columns = form.columns(np.stack(existing) if existing else np.empty((0, len(form.labels)), np.float32))
    numbers = iter(range(len(existing)))
    positions = pa.array([None if one is None else next(numbers) for one in scores], pa.int64())
    return {name: column.take(positions) for name, column in columns.items()}


def _vectors(features: list[np.ndarray | None], kind: pa.FixedSizeListType) -> pa.Array:
    """Vectors, None for failed images, as a column of fixed-size lists, without one Python object per number."""
    dtype = kind.value_type.to_pandas_dtype()
    nothing = np.zeros(kind.list_size, dtype)
    flat = np.concatenate([nothing if one is None else one.astype(dtype) for one in features])
    missing = pa.array([one is None for one in features])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind, mask=missing)


#: Requests to a remote store that an actor keeps in flight per CPU: at 100 ms each, that is 320 images a second.
_REQUESTS_PER_CPU = 32


@dataclass(frozen=True)
class ClassifyJob:
    """The job of an actor. It travels with every task, so it contains no credentials.

    Attributes:
        bundle_url: the bundle whose base and head are run.
        head_urls: bundles of the same base. Their heads are run on the same features, each for its own table.
        remote: whether any row is remote, that is, whether its uri is a URL and not a path.
        probes: uris of some objects of the whole store (`images.reader.choose_probes`).
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
    quarantine_url: str
    exclude: Sequence[str] = ()
    probes: tuple[str, ...] = ()

    @property
    def requests(self) -> int:
        """How many images one actor reads at once. The decoding threads read local images themselves."""
        return _REQUESTS_PER_CPU * self.decode_threads if self.remote else self.decode_threads
