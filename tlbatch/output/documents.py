"""The JSON documents of an output, typed: `run.json`, `report.json`, receipts, the part plan and `latest.json`.

At run time they are plain dictionaries whose keys keep the order in which they were written: a sealed document is compared
byte for byte (`schema.seal`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class PointerEntry(TypedDict):
    """One run of `latest.json`."""

    run_id: str
    books_sha256: str


class PointerDocument(TypedDict):
    """`latest.json`: the runs that make up the table, the oldest first."""

    schema_version: int
    updated: str
    runs: list[PointerEntry]


class SpecDocument(TypedDict):
    """The part of `run.json` that changes the answer: the fields of `config.Spec`, of which these are read back."""

    images: str
    engine: str
    predictions: bool
    features: bool
    features_dtype: NotRequired[str]
    image_field: NotRequired[str | None]
    exclude: NotRequired[Sequence[str]]
    top_k: NotRequired[int]
    rescored: NotRequired[str]
    compacted: NotRequired[list[str]]


class RunDocument(TypedDict):
    """`run.json`: what a run lists and with what it works."""

    schema_version: int
    run_id: str
    began: str
    manifest_sha256: str
    objects: int
    bounds: NotRequired[list[str]]
    spec: SpecDocument
    bundle: str
    skipped: int
    list_seconds: float
    counts: NotRequired[Mapping[str, int]]
    skipped_by_kind: NotRequired[Mapping[str, int]]
    unreadable: NotRequired[list[str]]
    inventory: NotRequired[Mapping[str, Any]]
    resources: NotRequired[Mapping[str, Any]]
    bundle_url: NotRequired[str]
    base: str
    multi_label: NotRequired[bool]
    abstain_threshold: NotRequired[float | None]
    pixel_rules: NotRequired[Mapping[str, Any]]
    versions: NotRequired[Mapping[str, str]]
    features_url: NotRequired[str]
    on: NotRequired[list[PointerEntry]]
    removed_sha256: NotRequired[str]
    fingerprint: str


class PublishedFile(TypedDict):
    """One published Parquet file: its digest, its rows, and the half-open range of manifest rows it covers."""

    sha256: str
    rows: int
    objects: list[int]


class BottleneckDocument(TypedDict):
    """The stage that limited a command (`output/bottleneck.py`)."""

    stage: str
    busy: float
    remedy: str


class ReportDocument(TypedDict):
    """`report.json`, and what `classify`, `extract`, `rescore` and `compact` return."""

    run_id: str
    output: str
    objects: int
    listed: int
    predicted: int
    failed: int
    skipped: int
    seconds: float
    images_per_second: float
    bundle: str
    engine: str
    failed_by_kind: dict[str, int]
    failed_transient: int
    stage_seconds: dict[str, float]
    bottleneck: NotRequired[BottleneckDocument | None]
    labels: dict[str, int]
    #: Images of more than 8 bits, by the value that was taken as white; runs of older versions lack it.
    white_levels: NotRequired[dict[str, int]]
    manifest_sha256: NotRequired[str]
    files: NotRequired[dict[str, PublishedFile]]
    counts: NotRequired[Mapping[str, int]]
    on: NotRequired[list[PointerEntry]]
    removed_sha256: NotRequired[str]
    #: What was skipped in the store and inside its shards, by kind, and folders that could not be opened.
    left: NotRequired[Mapping[str, int]]
    skipped_by_kind: NotRequired[Mapping[str, int]]
    skipped_in_shards: NotRequired[Mapping[str, int]]
    unreadable: NotRequired[list[str]]
    #: Of the inventory that was read in place of a listing: the bucket, its manifest, when it was made, its objects.
    inventory: NotRequired[Mapping[str, Any]]
    #: Of an incremental run with failures: `listed` and `failed` of the whole table, and failures that the table did not have.
    table: NotRequired[Mapping[str, int]]
    failed_new: NotRequired[int]
    unreadable_new: NotRequired[int]
    compared: NotRequired[Mapping[str, Any] | None]
    kept_back: NotRequired[list[str]]
    # Only in what a command returns, never in the file:
    already_done: NotRequired[bool]
    continued: NotRequired[str]
    report: NotRequired[str]
    tables: NotRequired[dict[str, ReportDocument]]


class Receipt(TypedDict):
    """The receipt of a staged part."""

    part: str
    part_sha256: str
    #: Half-open ranges of manifest rows.
    rows: list[list[int]]
    #: Images of each object that does not hold exactly one, by manifest row.
    images: dict[str, int]
    predicted: int
    failed: int
    failed_by_kind: dict[str, int]
    stage_seconds: dict[str, float]
    #: What was skipped in shards, by kind, by manifest row.
    passed: NotRequired[dict[str, dict[str, int]]]


class PartPlan(TypedDict):
    """`staged/plan`: the parts from which a run is published."""

    parts: Sequence[str]
