"""Cluster and amount of work -> actors."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from tlbatch.config import RunConfig
from tlbatch.errors import ConfigError
from tlbatch.execution.actors import Classifier, DecodingActor, PredictingActor
from tlbatch.execution.resources import ClusterResources
from tlbatch.execution.sizing import cut_blocks, parallelism_of, plan_for, work_of

LAPTOP = [{"CPU": 2.0}]
FARM = [{"CPU": 16.0}] * 3
GPUS = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 32.0}]


def plan(nodes, images=1_000_000, *, grows=False, **settings):
    return plan_for(RunConfig(images="a", bundle="b", output="c", **settings), images, ClusterResources(nodes, grows))


def pools(found):
    return [(kind, round(pool.cpus, 3), pool.gpus, pool.least, pool.actors) for kind, pool in found.pools]


@pytest.mark.parametrize(
    ("nodes", "settings", "expected", "threads"),
    [
        (LAPTOP, {}, [(Classifier, 2, 0, 1, 1)], (2, 2)),
        (FARM, {}, [(Classifier, 4, 0, 12, 12)], (4, 4)),
        (FARM, {"num_cpus": 8, "concurrency": 5}, [(Classifier, 8, 0, 5, 5)], (8, 8)),
        (FARM, {"plan": "split"}, [(DecodingActor, 2, 0, 12, 12), (PredictingActor, 2, 0, 12, 12)], (2, 2)),
        (
            LAPTOP,
            {"plan": "split", "num_cpus": 1},
            [(DecodingActor, 0.5, 0, 2, 2), (PredictingActor, 0.5, 0, 2, 2)],
            (1, 1),
        ),
        (GPUS, {"num_gpus": 1}, [(DecodingActor, 4, 0, 14, 14), (PredictingActor, 0, 1, 1, 3)], (4, 1)),
        (GPUS, {"num_gpus": 0.5}, [(DecodingActor, 4, 0, 14, 14), (PredictingActor, 0, 0.5, 1, 6)], (4, 1)),
        (GPUS, {"num_gpus": 2, "concurrency": 4}, [(DecodingActor, 4, 0, 14, 14), (PredictingActor, 0, 2, 1, 1)], (4, 1)),
        (GPUS, {"num_gpus": 1, "plan": "fused"}, [(Classifier, 4, 1, 3, 3)], (4, 4)),
    ],
)
def test_actors_follow_from_the_machines(nodes, settings, expected, threads):
    found = plan(nodes, **settings)
    assert pools(found) == expected
    assert (found.decode_threads, found.predict_threads) == threads
    assert found.rows_per_task == 512


@pytest.mark.parametrize("settings", [{}, {"plan": "split"}, {"num_gpus": 1}, {"num_gpus": 1, "plan": "fused"}])
@pytest.mark.parametrize("images", [1, 5, 100, 3_000])
def test_little_work_is_shared_out_and_no_actor_is_without_any(images, settings):
    found = plan(GPUS, images, **settings)
    tasks = -(-images // found.rows_per_task)
    assert all(1 <= pool.least <= pool.actors <= tasks for _, pool in found.pools)


def test_who_has_a_gpu_writes_one_block_beside_the_one_it_predicts():
    job = SimpleNamespace(requests=8, decode_threads=4, engine="tensorflow")
    rows = pa.table({"format": ["image", "image"]})
    shards = pa.table({"format": ["image", "tar"]})
    split, fused = plan(GPUS, num_gpus=1), plan(FARM)
    assert parallelism_of(job, split, rows) == {"list": 1, "fetch": 14 * 8, "decode": 14 * 4, "predict": 3, "write": 3 * 3}
    assert parallelism_of(job, fused, shards) == {"list": 1, "fetch": 12 * 2, "decode": 12 * 4, "predict": 12, "write": 12 * 2}
    job.engine = "jax"  # whose actor has two calls under way
    assert parallelism_of(job, split, rows)["predict"] == 2 * 3


def test_pools_grow_with_machines_that_are_started_for_the_work():
    assert pools(plan([{"CPU": 0.0}], grows=True)) == [(Classifier, 1, 0, 1, 64)]
    assert pools(plan(FARM, grows=True)) == [(Classifier, 4, 0, 12, 64)]
    assert pools(plan(FARM, grows=True, concurrency=20)) == [(Classifier, 4, 0, 12, 20)]
    assert pools(plan([{"CPU": 0.0}], 600, grows=True, num_cpus=8))[0][3:] == (1, 2), "no more than there is work for"
    split = pools(plan([{"CPU": 0.0}], grows=True, num_gpus=1, num_cpus=4))
    assert split == [(DecodingActor, 4, 0, 1, 64), (PredictingActor, 0, 1, 1, 64)]


def test_what_no_machine_has_is_a_sentence():
    with pytest.raises(ConfigError, match=r"needs 2 CPUs and 1 GPUs, but no machine has them \(2 CPUs and 0 GPUs\)"):
        plan(LAPTOP, num_gpus=1)


@pytest.mark.parametrize(("images", "blocks"), [(0, [0]), (1, [1]), (64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])])
def test_images_alone_are_cut_by_their_number(images, blocks):
    rows = pa.table({"format": pa.array(["image"] * images, pa.string()), "size": pa.array([None] * images, pa.int64())})
    weights = work_of(rows, 64)
    assert weights.tolist() == [1] * images
    assert [block.num_rows for block in cut_blocks(rows, weights, 64)] == blocks


def test_an_object_is_in_one_block_and_a_shard_counts_by_its_bytes():
    rows = pa.table(
        {"format": ["image", "tar", "image", "image", "tar", "image"], "size": pa.array([1, 2**30, 1, 1, None, 1], pa.int64())}
    )
    weights = work_of(rows, 64)
    assert weights.tolist() == [1, 1024, 1, 1, 64, 1]
    blocks = list(cut_blocks(rows, weights, 64))
    assert [block.num_rows for block in blocks] == [2, 3, 1]
    assert pa.concat_tables(blocks).equals(rows)
