"""Seconds in each stage -> the stage that limited a run, and its remedy; a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: A stage that was busy for less than this share of the time is not the bottleneck: start-up and publishing took the time.
_BINDS = 0.5

_START = "most of the time went into start-up and publishing, which take hardly longer for more images"
_REMEDIES = {
    "list": "a list of addresses as `images` instead of a folder",
    "fetch": "more workers or workers closer to the store (`address`), or images packed in shards",
    "decode": "more CPUs (`address`)",
    "predict": "a GPU (`num_gpus`) or more CPUs (`address`)",
    "write": "larger parts (`rows_per_task`)",
}
_MORE_GPUS = "more GPUs (`address`)"
_IN_INT8 = "a base in int8 (`train --quantize int8`, about {:.1f} times as fast), a GPU (`num_gpus`) or more CPUs (`address`)"
#: How many times as fast the model alone is in int8: MobileNetV2 on a processor with VNNI. Larger networks gain more, and
#: processors without VNNI less (docs/benchmarks.md).
_TIMES_IN_INT8 = 2.0


def bottleneck(
    stage_seconds: Mapping[str, float],
    parallelism: Mapping[str, int],
    seconds: float,
    *,
    gpu: bool,
    quantizable: bool = False,
) -> dict[str, Any]:
    """Find the stage that limited the speed of a command.

    Args:
        stage_seconds: seconds of each stage, summed over all workers.
        parallelism: how much of each stage can run at once, over all workers.
        seconds: how long the command took.
        gpu: whether the model ran on a GPU.
        quantizable: whether the model ran on CPUs in float32, and could run in int8.

    Returns:
        `stage`, the busiest stage, or `start` if no stage was busy for half of the time; `busy`, the share of its capacity
        (`parallelism` times `seconds`) that the busiest stage used; and `remedy`, what would help, as a noun phrase that
        names the setting, or for `start` as a whole sentence.
    """
    shares = {stage: min(1.0, taken / (parallelism[stage] * seconds)) for stage, taken in stage_seconds.items()}
    stage, busy = max(shares.items(), key=lambda share: share[1])
    if busy < _BINDS:
        return {"stage": "start", "busy": round(busy, 3), "remedy": _START}
    in_int8 = _IN_INT8.format(gain_in_int8(stage_seconds)) if quantizable else _REMEDIES["predict"]
    of_model = _MORE_GPUS if gpu else in_int8
    remedy = of_model if stage == "predict" else _REMEDIES[stage]
    return {"stage": stage, "busy": round(busy, 3), "remedy": remedy}


def gain_in_int8(stage_seconds: Mapping[str, float]) -> float:
    """How many times as fast a run on CPUs would be with its base in int8: decoding, which shares the CPUs, stays as it is."""
    model, rest = (stage_seconds.get(stage, 0.0) for stage in ("predict", "decode"))
    return (model + rest) / (model / _TIMES_IN_INT8 + rest) if model else 1.0
