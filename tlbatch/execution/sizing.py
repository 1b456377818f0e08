"""How the work is cut: which actors, how many of them, what each takes. Pure: cluster and amount of work -> sizes.

Fused, one actor reads, decodes and predicts. Split, some read and decode for others that predict: a GPU is fed by many CPUs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.execution.actors import Classifier, DecodingActor, PredictingActor
from tlbatch.execution.executor import Worker
from tlbatch.execution.records import ClassifyJob
from tlbatch.execution.resources import ActorPool, ClusterResources
from tlbatch.schema import IMAGE

#: CPUs of one actor where nobody says otherwise: beyond, Python's lock holds the decoding threads back.
_CPUS_PER_ACTOR = 4
#: Actors that a cluster is asked for which starts machines for work, where nobody says how many.
_MOST_ACTORS = 64
#: Bytes of shards that one task reads; a shard is not cut.
_SHARD_BYTES_PER_TASK = 64 * 1024 * 1024


class ExecutionPlan(NamedTuple):
    """How the work is cut: who does it, in turn, the threads an actor uses, images a task."""

    pools: list[tuple[type[Worker], ActorPool]]
    decode_threads: int
    predict_threads: int
    rows_per_task: int


def plan_for(config: RunConfig, images: int, cluster: ClusterResources) -> ExecutionPlan:
    """Sizes that follow from the cluster and from how much there is to do; what the configuration says goes first.

    Args:
        config: its `plan`, `num_cpus`, `num_gpus`, `concurrency` and `rows_per_task`.
        images: how many images' worth of work there is.
        cluster: what each machine has. One that starts machines is asked for as many actors as `concurrency` says, or as
            there is work for: how many it may start is its own affair.

    Raises:
        ConfigError: one actor asks for more than any machine has, and none will be started.
    """
    nodes = cluster.machines
    gpus = config.num_gpus or 0
    cpus = config.num_cpus or min(_CPUS_PER_ACTOR, max(1, *(int(node.get("CPU", 0)) for node in nodes)))
    split = config.plan == "split" or (config.plan == "auto" and gpus > 0)
    decoders, predictors = now = _fit_both(nodes, cpus, gpus, split)
    if cluster.grows:
        decoders, predictors = (max(_MOST_ACTORS, fit) for fit in now)
    elif not (decoders and predictors):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        asked = f"{cpus} CPUs and {gpus:g} GPUs"
        raise ConfigError(f"num_cpus, num_gpus: one actor asks for {asked}, and no machine has them ({largest}).")
    predictors = min(predictors, config.concurrency or predictors)
    there = [min(pair) for pair in zip((decoders, predictors), now, strict=True)]
    workers = max(1, there[0] if split and gpus else there[1])
    per_task = max(1, min(config.rows_per_task, math.ceil(images / (2 * workers))))
    tasks = math.ceil(images / per_task)
    decoders, predictors = min(decoders, tasks), min(predictors, tasks)
    # Machines that are started for the work come one by one: the pools grow with them.
    decoders_now, predictors_now = (max(1, min(pair)) for pair in zip((decoders, predictors), now, strict=True))
    if not split:
        return ExecutionPlan([(Classifier, ActorPool(cpus, gpus, predictors_now, predictors))], cpus, cpus, per_task)
    if gpus:  # what predicts waits for its GPU: the CPUs are the decoders'
        decode, predict = ActorPool(cpus, 0, decoders_now, decoders), ActorPool(0, gpus, 1, predictors)
        return ExecutionPlan([(DecodingActor, decode), (PredictingActor, predict)], cpus, 1, per_task)
    each = ActorPool(cpus / 2, 0, predictors_now, predictors)
    return ExecutionPlan(
        [(DecodingActor, each), (PredictingActor, each)], max(1, cpus // 2), max(1, cpus - cpus // 2), per_task
    )


def _fit_both(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float, split: bool) -> tuple[int, int]:
    """How many actors that decode, and that predict, the machines hold."""
    decoders = _fit(nodes, cpus, 0)
    return decoders, _fit(nodes, 0 if split else cpus, gpus) if gpus else decoders


def _fit(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many actors the machines hold."""
    asked = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return sum(min(int(node.get(name, 0) / amount) for name, amount in asked.items()) for node in nodes)


def work_of(rows: pa.Table, per_task: int) -> np.ndarray:
    """(n,) int: how many images' worth of work each object is. A shard counts by its bytes, as a whole task if nobody knows."""
    bytes_an_image = max(1, _SHARD_BYTES_PER_TASK // per_task)
    sizes = pc.fill_null(rows["size"], 0).to_numpy()
    is_image = pc.equal(rows["format"], IMAGE).to_numpy()
    return np.where(is_image, 1, np.where(sizes > 0, np.maximum(1, sizes // bytes_an_image), per_task))


def cut_blocks(rows: pa.Table, weights: np.ndarray, per_task: int) -> list[pa.Table]:
    """Consecutive rows of about `per_task` images' worth of work; an object is in one block."""
    task = (np.cumsum(weights) - weights) // per_task
    starts = [0, *(np.flatnonzero(np.diff(task)) + 1).tolist(), rows.num_rows]
    return [rows.slice(start, end - start) for start, end in itertools.pairwise(starts)]


def parallelism_of(job: ClassifyJob, plan: ExecutionPlan, rows: pa.Table) -> dict[str, int]:
    """How much of each stage can be under way at once over all actors. The members of a shard are read one after the other."""
    only_images = pc.all(pc.equal(rows["format"], IMAGE)).as_py()
    first, last = plan.pools[0][1], plan.pools[-1][1]
    return {
        "list": 1,
        "fetch": first.actors * (job.requests if only_images else first.blocks_at_once),
        "decode": first.actors * job.decode_threads,
        "predict": last.actors,
        "write": last.actors * last.blocks_at_once,
    }
