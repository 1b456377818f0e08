"""Runs that are disturbed on purpose, with seeds: all complete, and publish what an undisturbed run publishes.

`make chaos` runs all of them, `make test` a sample. `TLBATCH_CHAOS` is how many.
"""

import os

import pytest
from support.s3_server import BUCKET, filesystem, options

import tlbatch
from tlbatch.output.verify import verify
from tlbatch.schema import PREDICTIONS

FAULT_RUNS = int(os.environ.get("TLBATCH_CHAOS", "1"))

#: A bad night: shares of requests, of every kind.
BAD_NIGHT = {
    "slow_down": 0.05,
    "internal_error": 0.01,
    "reset_before": 0.005,
    "reset_after": 0.01,
    "truncate": 0.002,
    "flip_bit": 0.002,
    "stall": 0.0005,
}


@pytest.fixture(scope="module")
def fault_store(s3_server, store, bundle_url) -> str:
    """Pictures and the bundle in a bucket."""
    fs = filesystem(s3_server.endpoint)
    fs.put(f"{store}/", f"{BUCKET}/chaos/store/", recursive=True)
    fs.put(f"{bundle_url}/", f"{BUCKET}/chaos/bundle/", recursive=True)
    return f"s3://{BUCKET}/chaos"


def classify(url: str, name: str, endpoint: str) -> dict:
    return tlbatch.classify(
        images=f"{url}/store",
        bundle=f"{url}/bundle",
        output=f"{url}/out-{name}",
        run_id="one",
        rows_per_task=10,
        storage_options=options(endpoint),
    )


def published(fs, url: str, name: str) -> dict[str, bytes]:
    """Every published file of a run's tables."""
    found = fs.find(f"{url}/out-{name}/runs/one")
    return {key.split("/one/")[1]: fs.cat(key) for key in found if key.endswith(".parquet")}


@pytest.fixture(scope="module")
def undisturbed(s3_server, fault_store, ray_here) -> dict[str, bytes]:
    """What a quiet run publishes."""
    assert classify(fault_store, "quiet", s3_server.endpoint)["failed"] == 0
    return published(filesystem(s3_server.endpoint), fault_store, "quiet")


@pytest.mark.parametrize("seed", range(FAULT_RUNS))
def test_a_bad_night_of_the_network_changes_nothing(seed, faulty, s3_server, fault_store, undisturbed):
    proxy = faulty(seed, **BAD_NIGHT)
    report = classify(fault_store, str(seed), proxy.endpoint)
    faults = {name: count for name, count in proxy.counts().items() if name.startswith("fault")}
    print(f"seed {seed}: {sum(faults.values())} faults: {faults}")
    assert sum(faults.values()) >= 3
    assert (report["listed"], report["predicted"], report["failed"]) == (60, 60, 0), report["failed_by_kind"]
    fs = filesystem(s3_server.endpoint)
    assert published(fs, fault_store, str(seed)) == undisturbed
    assert verify(f"{fault_store}/out-{seed}", options(s3_server.endpoint))["ok"]
    table = tlbatch.read_predictions(f"{fault_store}/out-{seed}", storage_options=options(s3_server.endpoint))
    assert (len(table), table["key"].nunique(), list(table.columns)) == (60, 60, PREDICTIONS.names)
