"""Seconds in each stage -> which of them a run waited for, and what would change it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Under this share of the time no stage is said to bind: the command was busy with starting and ending.
_BINDS = 0.5

_START = "start-up and publishing take the time, and take hardly longer for more images"
_REMEDIES = {
    "list": "a list of addresses as `images` spares the listing",
    "fetch": "workers nearer to the store or more of them (`address`), or images packed in shards",
    "decode": "more CPUs (`address`)",
    "predict": "a GPU (`num_gpus`) or more CPUs (`address`)",
    "write": "larger parts (`rows_per_task`)",
}
_MORE_GPUS = "more GPUs (`address`)"


def bottleneck(stage_seconds: Mapping[str, float], lanes: Mapping[str, int], seconds: float, *, gpu: bool) -> dict[str, Any]:
    """The stage that a command waited for.

    Args:
        stage_seconds: seconds each stage took, summed over everything that worked on it.
        lanes: for each stage how much of it can be under way at once, over all workers.
        seconds: how long the command took.
        gpu: whether the model was on a GPU.

    Returns:
        `stage`, or `start` where none was at work for half of the time; `busy`, the share of the command's time in which the
        lanes of the stage that was at work most were taken; `remedy`, in words, with the setting that would change it.
    """
    shares = {stage: min(1.0, taken / (lanes[stage] * seconds)) for stage, taken in stage_seconds.items()}
    stage, busy = max(shares.items(), key=lambda share: share[1])
    if busy < _BINDS:
        return {"stage": "start", "busy": round(busy, 3), "remedy": _START}
    remedy = _MORE_GPUS if gpu and stage == "predict" else _REMEDIES[stage]
    return {"stage": stage, "busy": round(busy, 3), "remedy": remedy}
