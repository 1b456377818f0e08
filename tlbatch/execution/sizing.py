"""A cluster and an amount of work -> which actors, how many, and the resources of each; pure functions.

In the fused plan one actor reads, decodes and predicts. In the split plan some actors read and decode for others that predict,
because one GPU needs many CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.execution.actors import Classifier, DecodingActor, PredictingActor
from tlbatch.execution.blocks import RowBlocks
from tlbatch.execution.executor import Worker
from tlbatch.execution.records import ClassifyJob
from tlbatch.execution.resources import ActorPool, ClusterResources
from tlbatch.model.engines import calls_at_once
from tlbatch.schema import is_loose

#: CPUs of one actor unless configured. With more, Python's lock slows the decoding threads down.
_CPUS_PER_ACTOR = 4
#: Actors that a cluster with an autoscaler is asked for, unless configured.
_MOST_ACTORS = 64
#: Bytes of shards that one task reads. A shard is never split.
_SHARD_BYTES_PER_TASK = 64 * 1024 * 1024


class ExecutionPlan(NamedTuple):
    """The pools of actors in the order in which a block passes them, the threads of one actor, and the images of one task."""

    pools: list[tuple[type[Worker], ActorPool]]
    decode_threads: int
    predict_threads: int
    rows_per_task: int


def plan_for(config: RunConfig, images: int, cluster: ClusterResources) -> ExecutionPlan:
    """Choose sizes from the cluster and the amount of work. Configured values take precedence.

    Args:
        config: its `plan`, `num_cpus`, `num_gpus`, `concurrency` and `rows_per_task`.
        images: the amount of work, in images.
        cluster: the resources of each machine. A cluster with an autoscaler is asked for as many actors as `concurrency` says,
            or as there is work for. The autoscaler limits how many machines it starts.

    Raises:
        ConfigError: one actor needs more than any machine has, and no machine will be started.
    """
    nodes = cluster.machines
    gpus = config.num_gpus or 0
    cpus = config.num_cpus or min(_CPUS_PER_ACTOR, max(1, *(int(node.get("CPU", 0)) for node in nodes)))
    split = config.plan == "split" or (config.plan == "auto" and gpus > 0)
    decoders, predictors = fit_now = _fit_both(nodes, cpus, gpus, split)
    if cluster.grows:
        decoders, predictors = (max(_MOST_ACTORS, fit) for fit in fit_now)
    elif not (decoders and predictors):
        machines = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        needed = f"{cpus} CPUs and {gpus:g} GPUs"
        raise ConfigError(f"num_cpus, num_gpus: one actor needs {needed}, but no machine has them ({machines}).")
    predictors = min(predictors, config.concurrency or predictors)
    decoders_now, predictors_now = (min(pair) for pair in zip((decoders, predictors), fit_now, strict=True))
    workers = max(1, decoders_now if split and gpus else predictors_now)
    per_task = max(1, min(config.rows_per_task, math.ceil(images / (2 * workers))))
    tasks = math.ceil(images / per_task)
    decoders, predictors = min(decoders, tasks), min(predictors, tasks)
    # Machines that an autoscaler starts arrive one by one, and the pools grow with them.
    decoders_now, predictors_now = (max(1, min(pair)) for pair in zip((decoders, predictors), fit_now, strict=True))
    if not split:
        return ExecutionPlan([(Classifier, ActorPool(cpus, gpus, predictors_now, predictors))], cpus, cpus, per_task)
    if gpus:  # a predictor waits for its GPU, so the decoders get the CPUs
        decode, predict = ActorPool(cpus, 0, decoders_now, decoders), ActorPool(0, gpus, 1, predictors)
        return ExecutionPlan([(DecodingActor, decode), (PredictingActor, predict)], cpus, 1, per_task)
    each = ActorPool(cpus / 2, 0, predictors_now, predictors)
    return ExecutionPlan(
        [(DecodingActor, each), (PredictingActor, each)], max(1, cpus // 2), max(1, cpus - cpus // 2), per_task
    )


def _fit_both(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float, split: bool) -> tuple[int, int]:
    """How many decoding actors and how many predicting actors fit on the machines."""
    decoders = _fit(nodes, cpus, 0)
    return decoders, _fit(nodes, 0 if split else cpus, gpus) if gpus else decoders


def _fit(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many actors fit on the machines."""
    needed = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return sum(min(int(node.get(name, 0) / amount) for name, amount in needed.items()) for node in nodes)


def work_of(rows: pa.Table, per_task: int) -> np.ndarray:
    """(n,) int: the work of each object, in images. A shard counts by its bytes, and as a whole task if its size is unknown."""
    loose = is_loose(rows)
    if pc.all(loose).as_py() is not False:  # of most tables, and ten million rows would take a second below
        return np.ones(rows.num_rows, np.int32)
    bytes_per_image = max(1, _SHARD_BYTES_PER_TASK // per_task)
    sizes = pc.fill_null(rows["size"], 0).to_numpy()
    return np.where(loose.to_numpy(), 1, np.where(sizes > 0, np.maximum(1, sizes // bytes_per_image), per_task))


def cut_blocks(rows: pa.Table, weights: np.ndarray, per_task: int) -> RowBlocks:
    """Blocks of consecutive rows with about `per_task` images of work each. An object is in one block."""
    if weights.max(initial=1) == 1:
        return RowBlocks(rows, np.arange(0, max(1, rows.num_rows), per_task))
    task = (np.cumsum(weights) - weights) // per_task
    return RowBlocks(rows, np.append(0, np.flatnonzero(np.diff(task)) + 1))


def parallelism_of(job: ClassifyJob, plan: ExecutionPlan, rows: pa.Table) -> dict[str, int]:
    """How many tasks of each stage can run at once, over all actors. The members of a shard are read one after the other."""
    only_images = pc.all(is_loose(rows)).as_py()
    first, last = plan.pools[0][1], plan.pools[-1][1]
    return {
        "list": 1,
        "fetch": first.actors * (job.requests if only_images else first.blocks_at_once),
        "decode": first.actors * job.decode_threads,
        "predict": last.actors * calls_at_once(job.engine),
        "write": last.actors * last.blocks_at_once,
    }
