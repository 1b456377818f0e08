"""Outputs that an earlier version made are continued, verified, rescored and compacted, and give the bytes it gave.

`tests/support/golden.py` made them. The bundle is exact (`tests/support/tiny.py`), so the bytes do not depend on the processor.
"""

from __future__ import annotations

import io
import json
import zipfile
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
from support.golden import BUCKET, Bucket, continued
from support.paths import GOLDEN

import tlbatch
from tlbatch.schema import to_parquet, unseal

pytestmark = pytest.mark.usefixtures("ray_here")

MADE = json.loads((GOLDEN / "made.json").read_text())
#: What differs from one command to the next in documents whose other fields follow from their inputs.
VARIES = {
    "run.json": {"began", "list_seconds", "versions", "resources", "schema_version"},
    "report.json": {"seconds", "images_per_second", "stage_seconds", "bottleneck"},
    "latest.json": {"updated", "schema_version"},
}
#: What versions since the golden one have added: keys of documents, and columns of tables by folder.
ADDED = {"skipped_by_kind", "skipped_in_shards", "white_levels", "pixel_rules"}
ADDED_COLUMNS = {"predictions": ["index"], "errors": ["index"], "features": ["index"]}


def read(name: str) -> dict[str, bytes]:
    """The objects of a golden file, by key."""
    with zipfile.ZipFile(GOLDEN / name) as archive:
        return {key: archive.read(key) for key in archive.namelist()}


@pytest.fixture(scope="module")
def bucket(s3_server) -> Bucket:
    """The golden outputs on a server, before they are continued."""
    found = Bucket(s3_server.endpoint)
    found.fs.mkdir(BUCKET)
    found.put(read("before.zip"))
    return found


@pytest.fixture(scope="module")
def after(bucket) -> tuple[dict[str, dict], dict[str, bytes]]:
    """What the commands returned, and every object after them."""
    return continued(bucket), bucket.contents()


def test_every_golden_output_verifies(bucket):
    outputs = {key.split("/")[1] for key in read("before.zip") if key.startswith("out/")}
    assert outputs == {"loose", "shards", "features", "heads", "nights", "plain", "unfinished"}
    for name in sorted(outputs):
        for folder in ("heads/a", "heads/b") if name == "heads" else (name,):
            found = tlbatch.verify(f"s3://{BUCKET}/out/{folder}", bucket.options)
            assert found["ok"], (folder, found["differences"])


def test_what_was_done_is_not_done_again_and_the_rest_is(after):
    reports, _ = after
    assert {name: bool(report.get("already_done")) for name, report in reports.items()} == MADE["already_done"]
    assert reports["unfinished"]["run_id"] == "run-1", "the unfinished run was continued"
    assert reports["out/nights run-4"]["counts"]["new"] == 1


def test_the_published_files_are_the_same_to_the_byte(after):
    _, objects = after
    wanted = read("before.zip") | read("after.zip")
    tables = [key for key in wanted if key.startswith("out/") and key.endswith(".parquet") and "/staged/" not in key]
    assert len(tables) > 50
    for key in tables:
        ours = without_added(key, objects[key], wanted[key])
        if version("pyarrow") == MADE["versions"]["pyarrow"]:
            assert ours == wanted[key], key
        else:  # another version writes other bytes for the same table
            assert table(ours).equals(table(wanted[key]), check_metadata=True), key
    assert {key for key in objects if key.startswith("out/") and "/staged/" in key} == set(), "nothing is left over"


def table(data: bytes):
    return pq.read_table(io.BytesIO(data))


def without_added(key: str, data: bytes, golden: bytes) -> bytes:
    """A file as the golden version would have written it: without columns that were added since, which are at the end."""
    found, added = table(data), ADDED_COLUMNS.get(key.split("/")[-2], [])
    if data == golden or found.column_names[-len(added) :] != added:
        return data
    return to_parquet(found.drop_columns(added).replace_schema_metadata(table(golden).schema.metadata))


def without_digests(name: str, document: dict) -> dict:
    """A document without digests of files that have more columns than the golden ones; nothing else of it is missing."""
    if name == "report.json":
        files = {path: {**facts, "sha256": ""} for path, facts in document["files"].items()}
        return {**document, "files": files}
    if name == "latest.json":
        return {**document, "runs": [entry["run_id"] for entry in document["runs"]]}
    return document


def test_rows_of_the_older_version_get_their_place(after):
    _, objects = after
    rescored = [data for key, data in objects.items() if key.startswith("out/rescored-shards/") and "/predictions/" in key]
    assert [table(data)["index"].to_pylist() for data in rescored] == [[0, 1, 2, 3, 0, 1, 2]]


def test_documents_say_the_same(after):
    _, objects = after
    wanted = read("before.zip") | read("after.zip")
    for key, data in wanted.items():
        name = key.rsplit("/", 1)[-1]
        if not key.startswith("out/") or name not in VARIES or "/staged/" in key:
            continue
        ours, theirs = unseal(objects[key]), unseal(data)
        assert ours is not None, key
        same = [one for one in ours if one in theirs or one not in ADDED]
        assert same == list(theirs), f"{key}: the same keys in the same order"
        if version("pyarrow") == MADE["versions"]["pyarrow"]:
            if objects[key] != data:
                ours, theirs = without_digests(name, ours), without_digests(name, theirs)
            kept = [one for one in same if one not in VARIES[name]]
            assert {one: ours[one] for one in kept} == {one: theirs[one] for one in kept}, key


def test_every_table_verifies_afterwards(after, bucket):
    for name in ("loose", "heads/a", "heads/b", "nights", "plain", "unfinished", "rescored-features", "rescored-shards"):
        found = tlbatch.verify(f"s3://{BUCKET}/out/{name}", bucket.options)
        assert found["ok"], (name, found["differences"])
    assert tlbatch.status(f"s3://{BUCKET}/out/nights", bucket.options)["published"] == ["compacted"]
