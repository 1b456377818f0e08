"""Receipts -> counters that Ray exports to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter


@cache
def _counters() -> tuple[Counter, Counter]:
    images = Counter("tlbatch_images", "Images whose outcome is staged", ("outcome", "kind"))
    return images, Counter("tlbatch_stage_seconds", "Seconds in a stage, summed over all workers", ("stage",))


def count_receipt(receipt: Mapping[str, Any]) -> None:
    """Add a receipt to the counters that Ray exports to Prometheus."""
    images, seconds = _counters()
    counted = {("predicted", ""): receipt["predicted"]}
    counted |= {("failed", kind): count for kind, count in receipt["failed_by_kind"].items()}
    for (outcome, kind), count in counted.items():
        if count:
            images.inc(count, {"outcome": outcome, "kind": kind})
    for stage, taken in receipt["stage_seconds"].items():
        if taken > 0:
            seconds.inc(taken, {"stage": stage})
