"""What the cluster has, pools of actors on it, and the uses of Ray's private API that a plain fallback could replace.

Ray is pinned to one minor release. Should a private name move, the fallback costs speed and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

#: Blocks that an actor has at a time: while the last images of one block are predicted and written, the first images of the
#: next block are fetched and decoded.
_BLOCKS_AT_ONCE = 2

#: Blocks of many that are there at once, before a task has cut the others.
_FIRST_BLOCKS = 64

#: Seconds within which an autoscaler has reported on its cluster once.
_AUTOSCALER_SECONDS = 15.0

#: Seconds after which Ray Data's loop looks at its operators while no task ends. By default it looks ten times a second, which
#: took two hundredths of two CPUs from the model; a task that ends wakes it at once.
_LOOP_SECONDS = 0.5


class ActorPool(NamedTuple):
    """Actors of one kind: the CPUs and GPUs that each reserves, and the fewest and the most of them."""

    cpus: float
    gpus: float
    least: int
    actors: int

    @property
    def blocks_at_once(self) -> int:
        """Blocks that each actor has at a time; one more with a GPU, which predicts one block while another one is staged."""
        return _BLOCKS_AT_ONCE + (1 if self.gpus else 0)


class ClusterResources(NamedTuple):
    """Each machine's resources by Ray's names ("CPU", "GPU"), and whether an autoscaler starts more machines."""

    machines: Sequence[Mapping[str, float]]
    grows: bool = False


def cluster_address(address: str | None) -> str:
    """The address of the cluster to use; empty for a Ray on this machine alone."""
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    return "" if where == "local" else where


def read_cluster() -> ClusterResources:
    """The cluster that this process is connected to."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    grows = _has_autoscaler()
    # The autoscaler of a cluster that was started for this job may need a moment before it reports.
    end = time.monotonic() + (0 if any(machine.get("CPU") for machine in machines) else _AUTOSCALER_SECONDS)
    while not grows and time.monotonic() < end:
        time.sleep(0.5)
        grows = _has_autoscaler()
    return ClusterResources(machines, grows)


def send_token() -> None:
    """Let Ray's clients in this process send a token if one is at hand; without RAY_AUTH_MODE they send none.

    Without the private name, they send one only if the user sets RAY_AUTH_MODE=token.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it says that a token is used
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def io_pool(blocks: int, cpus: int, concurrency: int | None) -> ActorPool:
    """Actors for work that mostly reads: as many as fit or, if an autoscaler starts machines, one for each block."""
    found = read_cluster()
    fit = sum(int(machine.get("CPU", 0)) // cpus for machine in found.machines)
    most = max(1, min(blocks, concurrency or blocks, blocks if found.grows else fit))
    return ActorPool(cpus, 0, max(1, min(fit, most)), most)


def _has_autoscaler() -> bool:
    """Whether an autoscaler that can start machines manages the cluster.

    Ray has no public question for that. An autoscaler that only watches names the type of each node `node_<id>`. Without the
    private names below a cluster counts as one that does not grow.
    """
    import ray

    try:
        from ray._private.worker import global_worker
        from ray.autoscaler.v2.sdk import get_cluster_status

        # Not `ray.experimental.internal_kv`: it loses its client when anything in this process shuts another cluster down.
        status = global_worker.gcs_client.internal_kv_get(b"__autoscaling_status", None)
        nodes = get_cluster_status(ray.get_runtime_context().gcs_address)
    except (ImportError, AttributeError):
        return False
    legacy = json.loads(status or b"{}").get("autoscaler_report") or {}
    names = list((legacy.get("node_type_mapping") or {}).values())
    names += [node.ray_node_type_name for node in (*nodes.active_nodes, *nodes.idle_nodes)]
    return any(name and not name.startswith("node_") for name in names)


def find_engine_on_gpus(
    start: Callable[[], None], address: str | None, engine: str, gpus: float | None, probe: Callable[[str], str]
) -> str | None:
    """The engine that can use the cluster's GPUs, or this machine's.

    Args:
        start: what `ray_session` gave; Ray on this machine is started only if there is a GPU.
        address: the cluster.
        engine: the engine that is wanted, or "auto".
        gpus: GPUs of one actor, if configured.
        probe: runs on a GPU and returns the engine that sees it, or nothing.

    Returns:
        The engine; empty if the GPUs are of no use to it; None if there is no GPU now.
    """
    import ray

    if not (ray.is_initialized() or cluster_address(address)) and not _gpus_of_this_machine():
        return None
    start()
    reserved = gpus or 1
    if not any(node["Alive"] and node["Resources"].get("GPU", 0) >= reserved for node in ray.nodes()):
        return None
    found = str(ray.get(ray.remote(num_gpus=reserved, num_cpus=0)(probe).remote(engine)))
    if not found and not gpus:
        log.warning("The cluster has GPUs, but %s CPUs are used.", unseen_gpus(engine))
    return found


def unseen_gpus(engine: str) -> str:
    """The second half of a sentence about GPUs: which engine does not see them, and what to install."""
    if engine == "tensorflow":
        return "TensorFlow does not see them; install tlbatch[gpu] and NVIDIA's driver on the workers."
    what = "JAX does not see" if engine == "jax" else "neither JAX nor TensorFlow sees"
    return f"{what} them; install tlbatch[gpu-jax] and NVIDIA's driver (580 or newer) on the workers."


def _gpus_of_this_machine() -> int:
    """How many GPUs Ray would find here; 1 if only a running Ray can tell."""
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        return int(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())
    except (ImportError, AttributeError):
        return 1


def configure_ray_data() -> None:
    """Set Ray Data's options for this process."""
    import ray.data

    with contextlib.suppress(ImportError):
        from ray.data._internal.execution import streaming_executor_state

        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = _LOOP_SECONDS
    context = ray.data.DataContext.get_current()
    # Ray Data's progress bars and operator log are for its developers; tlbatch prints its own progress.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The images of an object stay in one block, however many they are: Ray would cut it at 192 MiB.
    context.target_max_block_size = None
    # An error that ends a run is also raised, and becomes one sentence.
    logging.getLogger("ray.data").setLevel(logging.INFO if log.isEnabledFor(logging.INFO) else logging.CRITICAL)


def map_blocks(dataset: Any, actor: type, arguments: tuple[object, ...], pool: ActorPool) -> Any:
    """A Ray Dataset whose blocks pass through a pool of actors, each block as a whole.

    `map_batches` refuses whole blocks as batches if a GPU is asked for; the private function that it calls does not.
    """
    import ray.data

    apply = getattr(dataset, "map_batches_internal", dataset.map_batches)
    return apply(
        actor,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.least,
            max_size=pool.actors,
            max_concurrent_calls_per_actor=pool.blocks_at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )


def blocks_of_rows(table: pa.Table) -> Any:
    """A Ray Dataset with a block for each row of a table, cut by a task while the blocks are used.

    Ray Data would give the task a processor, and the actors have them all. The first blocks are there before the task has a
    process, which takes a second or two.
    """
    import ray.data

    first, rest = table.slice(0, _FIRST_BLOCKS), table.slice(_FIRST_BLOCKS)
    dataset = ray.data.from_blocks([rest]).repartition(target_num_rows_per_block=1)
    try:
        dataset._logical_plan.dag.ray_remote_args.update(num_cpus=0)
    except AttributeError:
        return ray.data.from_blocks(_rows_of(table))
    return ray.data.from_blocks(_rows_of(first)).union(dataset)


def _rows_of(table: pa.Table) -> list[pa.Table]:
    return [table.slice(row, 1) for row in range(table.num_rows)]


def finished_blocks(dataset: Any) -> Iterator[pa.Table]:
    """Execute a Ray Dataset; gives its blocks, small tables, as they are finished. A block that was lost since is left out.

    `iter_batches` starts threads that outlive an interrupted loop; a thread that releases a block after Ray has ended makes Ray
    end the process without a message. The private iterator over bundles has no threads.
    """
    import ray

    bundles = getattr(dataset, "iter_internal_ref_bundles", None)
    if bundles is None:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        return
    for bundle in bundles():
        with contextlib.suppress(ray.exceptions.ObjectLostError):  # its machine is gone; what it did before counts all the same
            yield from ray.get(bundle.block_refs)
