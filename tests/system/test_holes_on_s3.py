"""A part of a bucket that is away for a while: nothing leaves the table, and nothing that was missed stays missing."""

import uuid

import pytest
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET, filesystem, options

import tlbatch
from tlbatch.commands.classify import classify
from tlbatch.config import RunConfig
from tlbatch.errors import ManyDeletedError
from tlbatch.images.listing import Selection, list_store
from tlbatch.storage.resolve import resolve


@pytest.fixture
def bucket(s3_server, bundle_url, tmp_path, ray_here):
    """A folder of a bucket with 30 images, its files, and the settings of its runs."""
    files, folder = filesystem(s3_server.endpoint), f"{BUCKET}/holes-{uuid.uuid4().hex[:8]}"
    store = {f"{folder}/{'ab'[number >= 4]}/{number:02d}.png": encoded(noisy(COLORS["red"], number)) for number in range(30)}
    settings = {"images": f"s3://{folder}", "bundle": bundle_url, "output": str(tmp_path / "out"), "incremental": True}
    files.pipe(store)
    yield files, store, {**settings, "max_failed_ratio": 1.0, "storage_options": options(s3_server.endpoint)}
    files.rm(folder, recursive=True)


def test_a_sync_that_deletes_and_puts_again_costs_no_image(bucket):
    """The objects are away while a run that has listed them reads, and back, the same, before the next."""
    files, store, settings = bucket
    listing = list_store(resolve(settings["images"], settings["storage_options"]), Selection())
    synced = {key: data for key, data in store.items() if "/b/" in key}
    files.rm(list(synced))
    report = classify(RunConfig(**settings), listing=listing)
    assert (report["predicted"], report["failed_by_kind"]) == (4, {"not_found": 26})
    files.pipe(synced)
    assert tlbatch.classify(**settings)["counts"]["retry"] == 26
    assert len(tlbatch.read_predictions(settings["output"])) == 30
    assert tlbatch.classify(**settings)["already_done"]


def test_a_prefix_that_is_lost_stops_the_run_and_the_table_stays(bucket):
    files, store, settings = bucket
    tlbatch.classify(**settings)
    lost = {key: data for key, data in store.items() if "/b/" in key}
    files.rm(list(lost))
    with pytest.raises(ManyDeletedError, match=r"26 of the table's 30 objects .* in b/ \(26\)"):
        tlbatch.classify(**settings)
    assert len(tlbatch.read_predictions(settings["output"])) == 30
    files.pipe(lost)
    assert tlbatch.classify(**settings)["already_done"], "it is back as it was"
