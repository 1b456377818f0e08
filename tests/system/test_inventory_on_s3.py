"""An inventory that S3 writes of a bucket gives what listing the bucket gives, without a LIST request."""

import random
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support import inventories
from support.command import run_here
from support.inventories import ALL_VERSIONS, KINDS, table_of, write_inventory
from support.odd_s3 import OddS3
from support.pictures import COLORS, encoded, noisy
from support.s3_server import BUCKET as WEED
from support.s3_server import filesystem

import tlbatch
from tlbatch.commands.classify import classify
from tlbatch.commands.list_images import list_images
from tlbatch.commands.plan import plan
from tlbatch.config import ReportConfig, RunConfig
from tlbatch.errors import ManyDeletedError, StoreError
from tlbatch.output.run import read_output
from tlbatch.report.run_report import write_report
from tlbatch.schema import to_parquet
from tlbatch.storage.resolve import resolve

BUCKET, DESTINATION = "photos", "inventories"
#: Keys that are written in another way in CSV files, and what is skipped.
ODD = ("a b+c%20.jpg", 'q"uo,te.png', "ü/🐱.jpg", "a//b.jpg", "%2F.jpg", "a&<b>.webp", "=1+1.gif", "tab\t.jpg")
SKIPPED = ("notes.txt", "x/.hidden.jpg", "x/Thumbs.db", "folder/", "x/y/")


class Bucket:
    """A bucket, and inventories of it in another one."""

    def __init__(self, client, odd: OddS3) -> None:
        self.client, self.odd = client, odd

    def put(self, *keys: str, data: bytes = b"x", **settings) -> None:
        for key in keys:
            self.client.put_object(Bucket=BUCKET, Key=key, Body=b"" if key.endswith("/") else data, **settings)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket=BUCKET, Key=key)

    def objects(self) -> list[dict]:
        """What an inventory says of each object, in no order."""
        found = self.client.list_objects_v2(Bucket=BUCKET)["Contents"]
        rows = [
            {"key": one["Key"], "size": one["Size"], "e_tag": one["ETag"].strip('"'), "storage_class": one["StorageClass"]}
            for one in found
        ]
        random.Random(1).shuffle(rows)
        return rows

    def inventory(self, kind: str = "Parquet", rows: list[dict] | None = None, fields=inventories.FIELDS, **changes) -> str:
        """The address of an inventory with three data files."""
        rows = self.objects() if rows is None else rows
        tables = [table_of(BUCKET, rows[start::3], fields) for start in range(3)]
        return write_inventory(self.put_beside, tables, kind, BUCKET, DESTINATION, **changes)

    def put_beside(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=DESTINATION, Key=key, Body=data)

    def lists(self, bucket: str = BUCKET) -> int:
        """The number of LIST requests so far."""
        listings = ("list-type=", "prefix=", "delimiter=", "versions", "max-keys=")
        return sum(
            method == "GET" and path.strip("/") == bucket and (not query or any(word in query for word in listings))
            for method, path, query in self.odd.asked
        )

    def heads(self) -> list[str]:
        """The objects that were asked for with HEAD."""
        return sorted(
            path.removeprefix(f"/{BUCKET}/") for method, path, _ in self.odd.asked if method == "HEAD" and "." in path
        )


@pytest.fixture
def bucket(odd):
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    for name in (BUCKET, DESTINATION):
        client.create_bucket(Bucket=name)
    yield Bucket(client, odd)
    for name in (BUCKET, DESTINATION):
        for one in client.list_objects_v2(Bucket=name).get("Contents", ()):
            client.delete_object(Bucket=name, Key=one["Key"])
        client.delete_bucket(Bucket=name)


def listing(images: str, output: str = "/tmp/nowhere", **settings):
    config = RunConfig(images=images, bundle="b", output=output, **settings)
    return list_images(config, resolve(config.output))


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_of_an_inventory_is_that_of_a_listing(bucket, kind):
    bucket.put(*ODD, *SKIPPED, *(f"c/{number:03d}.jpg" for number in range(50)))
    bucket.put("with content/", "empty.jpg")
    bucket.client.put_object(Bucket=BUCKET, Key="content/", Body=b"x")
    bucket.put("old/1.jpg", "old/2.tar", StorageClass="GLACIER")
    listed, address = listing(f"s3://{BUCKET}"), bucket.inventory(kind)
    bucket.odd.asked.clear()
    found = listing(address)
    assert (bucket.lists(), bucket.lists(DESTINATION)) == (0, 0)
    assert to_parquet(found.manifest) == to_parquet(listed.manifest)
    assert (
        found.skipped_by_kind
        == listed.skipped_by_kind
        == {"hidden": 1, "desktop file": 1, ".txt": 1, "name that ends with a slash": 1}
    )
    assert set(ODD) <= set(found.manifest["key"].to_pylist())
    facts = found.check.inventory.facts
    assert facts == {"of": "s3://photos", "manifest": address, "created": "2026-11-28T01:00:00Z", "objects": 68}


@pytest.mark.parametrize("kind", KINDS)
def test_older_versions_and_deleted_objects_are_left_out(bucket, kind):
    rows = [
        {"key": "1.jpg", "version_id": "b", "size": 2, "e_tag": "new"},
        {"key": "1.jpg", "version_id": "a", "is_latest": False, "size": 1, "e_tag": "old"},
        {"key": "2.jpg", "version_id": "d", "is_delete_marker": True},
        {"key": "2.jpg", "version_id": "c", "is_latest": False, "size": 3, "e_tag": "gone"},
        {"key": "3.jpg", "size": 4, "e_tag": '"quoted"', "storage_class": "DEEP_ARCHIVE"},
    ]
    found = listing(bucket.inventory(kind, rows, ALL_VERSIONS)).manifest.to_pylist()
    kept = [(row["key"], row["size"], row["etag"], row["format"]) for row in found]
    assert kept == [("1.jpg", 2, "new", "image"), ("3.jpg", 4, "quoted", "archived")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_inventory_does_not_tell_is_null(bucket, kind):
    bucket.put("a.jpg", "b/", "b/c.jpg", "d.jpg")
    found = listing(bucket.inventory(kind, fields=("bucket", "key"))).manifest
    assert found["key"].to_pylist() == ["a.jpg", "b/c.jpg", "d.jpg"]
    assert (found["size"].null_count, found["etag"].null_count) == (3, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"include": ["*.dat"]},
        {"exclude": ["a/", "*.png"]},
        {"max_images": 3},
        {"format": "tar", "include": ["*.jpg"]},
        {"output": f"s3://{BUCKET}/b"},
    ],
    ids=str,
)
def test_settings_of_a_listing_hold_for_an_inventory(bucket, settings):
    bucket.put(*(f"{folder}/{number}.{end}" for folder in "abc" for number in range(4) for end in ("jpg", "png", "dat")))
    bucket.put("d/runs/mine/run.json", "d/runs/mine/a.jpg")
    listed, found = listing(f"s3://{BUCKET}", **settings), listing(bucket.inventory(), **settings)
    assert to_parquet(found.manifest) == to_parquet(listed.manifest)


def test_the_checksum_of_the_manifest_is_compared(bucket):
    bucket.put("1.jpg")
    address = bucket.inventory()
    key = address.removeprefix(f"s3://{DESTINATION}/").replace("manifest.json", "manifest.checksum")
    bucket.put_beside(key, b"0" * 32)
    with pytest.raises(StoreError, match=r"inventory .* is damaged: its MD5 is [0-9a-f]{32}, and manifest.checksum says '0000"):
        listing(address)
    bucket.client.delete_object(Bucket=DESTINATION, Key=key)
    assert listing(address).manifest.num_rows == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged or truncated: its MD5 is"),
        (lambda data: data[: len(data) // 2], "(shorter than the inventory says|damaged or truncated)"),
        (lambda data: None, "does not exist"),
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_a_damaged_data_file_ends_the_listing(bucket, kind, damage, sentence):
    bucket.put("1.jpg")
    address = bucket.inventory(kind)
    files = bucket.client.list_objects_v2(Bucket=DESTINATION, Prefix=f"inventory/{BUCKET}/daily/data/")["Contents"]
    key = files[0]["Key"]
    data = damage(bucket.client.get_object(Bucket=DESTINATION, Key=key)["Body"].read())
    if data is None:
        bucket.client.delete_object(Bucket=DESTINATION, Key=key)
    else:
        bucket.put_beside(key, data)
    with pytest.raises(StoreError, match=rf"The data file s3://{DESTINATION}/{key} of the inventory {address} .*{sentence}"):
        listing(address)


@pytest.mark.parametrize("kind", KINDS)
def test_an_inventory_without_keys_or_of_another_format_is_refused(bucket, kind):
    bucket.put("1.jpg")
    with pytest.raises(StoreError, match=r"has no column Key; its columns are [Bb]ucket, [Ss]ize"):
        listing(bucket.inventory(kind, fields=("bucket", "size")) if kind != "CSV" else _without_keys(bucket))
    other = next(one for one in KINDS if one != kind)
    with pytest.raises(StoreError, match=f"cannot be parsed as {other}|has no column"):
        listing(bucket.inventory(kind, fileFormat=other))


def _without_keys(bucket) -> str:
    return bucket.inventory("CSV", fileSchema="Bucket, Size")


def test_a_copy_of_the_manifest_is_enough(bucket, tmp_path):
    bucket.put("1.jpg", "2.jpg")
    address = bucket.inventory()
    data = bucket.client.get_object(Bucket=DESTINATION, Key=address.removeprefix(f"s3://{DESTINATION}/"))["Body"].read()
    (tmp_path / "manifest.json").write_bytes(data)
    assert listing(str(tmp_path / "manifest.json")).manifest["uri"].to_pylist() == ["s3://photos/1.jpg", "s3://photos/2.jpg"]


def test_a_bucket_that_does_not_exist_is_said_so(bucket):
    with pytest.raises(StoreError, match="is of s3://no-such-bucket, and there is no such bucket"):
        listing(bucket.inventory(rows=[{"key": "1.jpg"}], sourceBucket="no-such-bucket"))


def picture(number: int) -> bytes:
    return encoded(noisy(COLORS["red"], number))


class Nights:
    """A table that is made of listings and inventories of one bucket."""

    def __init__(self, bucket: Bucket, bundle: str, output: str) -> None:
        self.bucket, self.bundle, self.output = bucket, bundle, output

    def config(self, images: str, **settings) -> RunConfig:
        given = {"images": images, "bundle": self.bundle, "output": self.output, "incremental": True, "concurrency": 1}
        return RunConfig(**{**given, "storage_options": {"endpoint_url": self.bucket.odd.endpoint}, **settings})

    def night(self, images: str, **settings) -> dict:
        self.bucket.odd.asked.clear()
        return classify(self.config(images, **settings))

    def rows(self) -> list[tuple]:
        """The table: key, version and, of an image that failed, why."""
        found = [(row["key"], row["etag"], "") for row in tlbatch.read_predictions(self.output).to_dict("records")]
        found += [(row["key"], row["etag"], row["kind"]) for row in tlbatch.read_errors(self.output).to_dict("records")]
        return sorted(found)


@pytest.fixture
def nights(bucket, bundle_url, ray_here, tmp_path):
    return Nights(bucket, bundle_url, str(tmp_path / "out"))


@pytest.mark.sampled(1)
def test_an_inventory_is_believed_only_as_far_as_the_store_agrees(nights, bucket):
    """What is newer than the inventory stays as it is in the table; only what the store says is gone leaves it."""
    for number, key in enumerate(("changed", "changed-since", "gone", "gone-since", "same")):
        bucket.put(f"{key}.jpg", data=picture(number))
    before = bucket.objects()
    bucket.put("changed-since.jpg", data=picture(10))
    bucket.put("new-since.jpg", data=picture(11))
    nights.night(f"s3://{BUCKET}")
    bucket.delete("gone.jpg", "gone-since.jpg")
    bucket.put("changed.jpg", data=picture(12))
    bucket.put("new.jpg", data=picture(13))
    now = {row["key"]: row for row in bucket.objects()}
    kept = [row for row in before if row["key"] in ("changed-since.jpg", "gone-since.jpg", "same.jpg")]
    address = bucket.inventory(
        rows=[*kept, now["changed.jpg"], now["new.jpg"], {"key": "gone-before.jpg", "size": 1, "e_tag": "e"}]
    )

    report = nights.night(address)
    assert bucket.lists() == 0
    assert bucket.heads() == ["changed-since.jpg", "changed.jpg", "gone.jpg", "new-since.jpg"]
    assert report["counts"] == {"new": 2, "changed": 1, "retry": 0, "stale": 0, "unchanged": 3, "deleted": 1}
    assert (report["inventory"]["of"], report["inventory"]["objects"]) == (f"s3://{BUCKET}", 6)
    gone = next(row["e_tag"] for row in before if row["key"] == "gone-since.jpg")
    assert nights.rows() == sorted(
        [
            *((key, row["e_tag"], "") for key, row in now.items()),
            ("gone-since.jpg", gone, ""),
            ("gone-before.jpg", "e", "not_found"),
        ]
    )

    report = nights.night(f"s3://{BUCKET}")
    assert "inventory" not in report
    assert nights.rows() == sorted((key, row["e_tag"], "") for key, row in now.items())
    assert nights.night(bucket.inventory("CSV"))["already_done"]


def test_an_inventory_can_begin_a_table(nights, bucket):
    bucket.put(*(f"{number}.jpg" for number in range(3)), data=picture(1))
    report = nights.night(bucket.inventory("ORC"), incremental=False)
    assert bucket.lists() == 0
    assert (report["predicted"], report["failed"], report["inventory"]["objects"]) == (3, 0, 3)
    assert read_output(resolve(nights.output)).newest.facts["spec"]["images"] == f"s3://{BUCKET}"
    page = write_report(ReportConfig(output=nights.output, storage_options={"endpoint_url": bucket.odd.endpoint}))["report"]
    assert "Images: s3://photos (its inventory of 2026-11-28T01:00:00Z, with 3 objects)." in Path(page).read_text()
    assert nights.night(bucket.inventory(), incremental=False)["already_done"]
    assert nights.night(f"s3://{BUCKET}")["already_done"]


def test_what_the_selection_leaves_out_leaves_the_table_unasked(nights, bucket):
    bucket.put("a/1.jpg", "b/1.jpg", "b/2.jpg", data=picture(1))
    nights.night(f"s3://{BUCKET}")
    report = nights.night(bucket.inventory(), exclude=["b/"])
    assert (report["counts"]["deleted"], bucket.heads()) == (2, [])
    assert [key for key, *_ in nights.rows()] == ["a/1.jpg"]


@pytest.mark.sampled(1)
def test_many_deleted_objects_stop_a_run_and_those_that_are_there_do_not(nights, bucket):
    many = [f"{number:02d}.jpg" for number in range(30)]
    bucket.put(*many, data=picture(1))
    nights.night(f"s3://{BUCKET}")
    address = bucket.inventory(rows=[row for row in bucket.objects() if row["key"] < "05"])
    assert nights.night(address)["already_done"], "the inventory may be of a prefix, or older"
    assert bucket.heads() == many[5:]
    bucket.delete(*many[5:])
    with pytest.raises(ManyDeletedError, match="25 of the table's 30 objects are no longer in the store"):
        nights.night(address)
    found = plan(nights.config(address))
    assert (found["counts"]["deleted"], found["inventory"]["objects"]) == (25, 5)
    assert "25 of the table's 30 objects" in found["refused"]
    assert nights.night(address, allow_deletes=True)["counts"]["deleted"] == 25


def test_a_store_that_does_not_say_what_exists_keeps_the_table(nights, bucket, caplog):
    bucket.put("1.jpg", "2.jpg", data=picture(1))
    nights.night(f"s3://{BUCKET}")
    address = bucket.inventory(rows=[row for row in bucket.objects() if row["key"] == "1.jpg"])
    bucket.delete("2.jpg")
    bucket.odd.denied = {"HEAD"}
    assert nights.night(address)["already_done"]
    assert "Some objects of the table are not in the inventory of s3://photos" in caplog.text
    assert [key for key, *_ in nights.rows()] == ["1.jpg", "2.jpg"]


def test_the_command_says_how_old_the_inventory_is(nights, bucket):
    bucket.put("1.jpg", data=picture(1))
    address = bucket.inventory(created=datetime.now(UTC) - timedelta(hours=19, minutes=5))
    settings = ["--set", f"storage_options={{endpoint_url: '{bucket.odd.endpoint}'}}", "--set", "concurrency=1"]
    common = ["--images", address, "--bundle", nights.bundle, "--output", nights.output, *settings]
    for command in ("classify", "plan"):
        done = run_here(command, *common, "--incremental")
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"The inventory of s3://photos is of \d{4}-\d\d-\d\d \d\d:\d\d UTC \(19 hours old\), 1 objects\.", done.stdout
        )


@pytest.mark.sampled(1)
def test_a_bit_that_flips_on_the_way_costs_another_download(s3_server, faulty):
    fs = filesystem(s3_server.endpoint)
    folder = f"{WEED}/of-a-bucket"
    rows = [{"key": f"{number}.jpg", "size": 1, "e_tag": "e"} for number in range(100)]

    def put(key: str, data: bytes) -> None:
        fs.pipe_file(f"{folder}/{key}", data)

    address = write_inventory(put, [table_of(WEED, rows)], "Parquet", WEED, folder)
    proxy = faulty(3, flip_bit=0.4, truncate=0.2)
    config = RunConfig(images=address, bundle="b", output="/tmp/nowhere", storage_options={"endpoint_url": proxy.endpoint})
    found = []
    for _ in range(8):
        with suppress(StoreError):
            found.append(list_images(config, resolve(config.output)).manifest.num_rows)
    assert set(found) == {100}
    assert len(found) > 2
    assert proxy.counts()["fault flip_bit"] > 2
