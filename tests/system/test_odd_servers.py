"""Servers that answer otherwise than Amazon's: what they do not keep is found out, and never believed."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.pictures import COLORS, encoded, noisy
from support.s3_server import options
from support.shards import WRITERS

import tlbatch
from tlbatch.errors import ChangedError, ErrorKind
from tlbatch.images.listing import Selection, list_store
from tlbatch.images.reader import Reader
from tlbatch.storage import retry
from tlbatch.storage.location import PROBE
from tlbatch.storage.range_file import RangeFile, open_range_file
from tlbatch.storage.resolve import resolve

#: Through obstore, and through s3fs, which is asked where obstore does not know an option.
WAYS = {"obstore": {}, "s3fs": {"default_block_size": 1 << 20}}


@pytest.fixture
def client(odd):
    import botocore.session

    return botocore.session.get_session().create_client("s3")


@pytest.fixture
def bucket(client, request):
    """A bucket of the test's own."""
    name = f"odd-{abs(hash(request.node.name))}"
    client.create_bucket(Bucket=name)
    return resolve(f"s3://{name}")


def picture(label: str, number: int = 1) -> bytes:
    return encoded(noisy(COLORS[label], number))


@pytest.mark.parametrize("way", WAYS)
def test_another_version_than_the_listed_one_is_not_read_whether_the_server_looks_or_not(odd, bucket, way):
    odd.ignored = {"GET If-Match"}
    one = resolve(f"{bucket.url}/a.jpg", WAYS[way])
    one.write(picture("red"))
    (listed,) = list_store(one, Selection()).manifest.to_pylist()
    assert Reader(WAYS[way]).image(listed) == picture("red")
    assert one.fetch(1, 3, listed["etag"]) == picture("red")[1:3]
    one.write(picture("blue"))
    for start, end in ((0, None), (1, 3)):
        with pytest.raises(ChangedError, match="was replaced after it was listed"):
            one.fetch(start, end, listed["etag"])
    failure = Reader(WAYS[way]).image({**listed, "size": len(picture("blue"))})
    assert (failure.kind, failure.attempts) == (ErrorKind.CHANGED, 1)


def test_a_shard_of_a_list_without_etags_is_read_in_one_version(odd, bucket, monkeypatch):
    odd.ignored = {"GET If-Match"}
    monkeypatch.setattr(RangeFile, "_PIECE", 1 << 16)
    shard = bucket.join("a.tar")
    first, second = (WRITERS["tar"]({f"{number}.jpg": bytes([version]) * 300_000 for number in range(9)}) for version in (1, 2))
    shard.write(first)
    row = {"uri": shard.url, "key": "a.tar", "size": None, "etag": None, "format": "tar"}
    members = Reader({}).members(row)
    assert next(members).data == bytes([1]) * 300_000
    shard.write(second)
    assert list(members)[-1].data.kind is ErrorKind.CHANGED


@pytest.mark.parametrize(
    ("ignored", "said"),
    [
        (set(), ""),
        ({"PUT If-None-Match"}, "If-None-Match on PUT. Make sure only one run at a time"),
        ({"PUT If-Match"}, "If-Match on PUT. Make sure only one run at a time"),
        ({"GET If-Match"}, "If-Match on GET. The etag of each object"),
        ({"PUT If-Match", "GET If-Match"}, "If-Match on PUT, If-Match on GET. Make sure"),
    ],
)
def test_each_condition_is_probed_and_the_warning_names_those_that_are_ignored(odd, bucket, caplog, ignored, said):
    odd.ignored = ignored
    one = bucket.join("out", "lease.json")
    assert one.create(b"1")
    assert not one.create(b"2")
    assert one.swap(b"2", b"1")
    assert not one.swap(b"3", b"1")
    assert one.read() == b"2"
    assert bucket.join("out").names() == ["lease.json"], "the probe is gone"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(said)
    assert all(f"{bucket.url} does not keep conditions: it ignores {said}" in warning for warning in warnings)


def test_two_probes_at_once_find_what_one_finds(odd, bucket):
    from tlbatch.storage.conditions import Conditions, S3Attempts, probe

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: probe(S3Attempts(bucket._call, bucket.url[5:], PROBE)), range(20)))
    assert found == {Conditions(True, True, True)}


def test_an_object_that_is_gone_is_not_replaced(odd, bucket, monkeypatch):
    """Amazon and moto answer a PUT with If-Match for an object that does not exist with 404."""
    one = bucket.join("latest.json")
    one.write(b"1")
    monkeypatch.setattr(type(one), "read", lambda self: one.unlink() or b"1")
    assert not one.swap(b"2", b"1")


def test_a_conflict_is_asked_again_and_only_412_decides(odd, bucket, monkeypatch):
    one = bucket.join("lease.json")
    odd.conflicts = ["lease.json", PROBE, "lease.json"]
    assert one.create(b"1")
    assert odd.conflicts == []
    odd.conflicts = ["lease.json"]
    assert one.swap(b"2", b"1")
    odd.conflicts = ["lease.json"]
    assert not one.create(b"3")
    assert one.read() == b"2"
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.3)
    odd.conflicts = ["always"]
    with pytest.raises(OSError, match="ConditionalRequestConflict"):
        one.swap(b"3", b"2")


BULK = ["501 NotImplemented", "405 MethodNotAllowed", "404 NoSuchKey", "400 MissingContentMD5", "500 InternalError", "nothing"]


@pytest.mark.parametrize("bulk", BULK)
def test_a_folder_is_removed_object_by_object_where_deleteobjects_is_not_known(odd, bucket, bulk):
    odd.bulk = bulk
    for name in ("a", "a/1", "a/2/3", "ab"):
        bucket.join(name).write(b"x")
    bucket.join("a").delete()
    assert [info.key for info in bucket.contents()] == ["ab"]
    bucket.join("a").delete()


@pytest.mark.parametrize("uploads", ["501 NotImplemented", "404 NoSuchUpload"])
def test_a_server_that_does_not_list_uploads_has_none(odd, bucket, uploads):
    odd.uploads = uploads
    bucket.join("out", "a").write(b"x")
    assert list(bucket.join("out").uploads()) == []


def test_a_known_object_is_removed_with_one_request(odd, bucket):
    one = bucket.join("lease.json")
    one.write(b"1")
    odd.asked.clear()
    one.unlink()
    assert [how for how, _, _ in odd.asked] == ["DELETE"]
    one.unlink()
    assert bucket.names() == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranges", ["unmarked", "whole"])
def test_servers_that_answer_ranges_otherwise(odd, bucket, ranges, way, monkeypatch):
    """With the status of a whole object, or with the whole object."""
    odd.ranges = ranges
    images = {f"{number}.jpg": picture("green", number) for number in range(5)}
    for kind, write in WRITERS.items():
        shard = bucket.join(f"shard.{kind}")
        shard.write(write(images))
        row = {**list_store(shard, Selection(kind=kind)).manifest.to_pylist()[0], "format": kind}
        assert {one.key: one.data for one in Reader(WAYS[way]).members(row)} == images
        whole = shard.read()
        with open_range_file(resolve(shard.url, WAYS[way]), len(whole)) as file:
            assert file.read() == whole
        assert resolve(shard.url, WAYS[way]).fetch(100, 200) == whole[100:200]


@pytest.mark.parametrize("way", WAYS)
def test_of_a_server_without_ranges_a_large_shard_is_a_row_at_once(odd, bucket, way):
    odd.ranges = "whole"
    shard = bucket.join("large.tar")
    shard.write(WRITERS["tar"]({"1.jpg": picture("red"), "2.jpg": bytes(9 << 20)}))
    (row,) = list_store(shard, Selection()).manifest.to_pylist()
    began = time.monotonic()
    (member,) = Reader(WAYS[way]).members(row)
    assert (member.data.kind, member.data.transient) == (ErrorKind.UNSUPPORTED, False)
    assert "this store does not answer ranges" in member.data.message
    assert time.monotonic() - began < 5


SLASHES = {
    "/lead.jpg": "red",
    "lead.jpg": "blue",
    "/solo.jpg": "green",
    "both.jpg": "blue",
    "both.jpg/": "red",
    "end.jpg/": "red",
}


@pytest.mark.parametrize("way", WAYS)
def test_slashes_at_either_end_of_a_key(odd, bucket, client, way, tmp_path):
    for key, label in SLASHES.items():
        client.put_object(Bucket=bucket.url[5:], Key=key, Body=picture(label))
    client.put_object(Bucket=bucket.url[5:], Key="marker/", Body=b"")
    listing = list_store(resolve(bucket.url, WAYS[way]), Selection())
    assert listing.manifest["key"].to_pylist() == ["/lead.jpg", "/solo.jpg", "both.jpg", "lead.jpg"]
    assert listing.skipped_by_kind == {"name that ends with a slash": 2}
    reader = Reader(WAYS[way])
    for row in listing.manifest.to_pylist():
        assert reader.image(row) == picture(SLASHES[row["key"]])
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{bucket.url}/{key}\n" for key in SLASHES))
    for row in list_store(resolve(str(listed)), Selection()).manifest.to_pylist():
        assert reader.image(row) == picture(SLASHES[row["uri"].removeprefix(f"{bucket.url}/")]), row["uri"]


def test_what_a_killed_probe_leaves_is_skipped_and_removed_by_the_next_command(odd, bucket, bundle_url, ray_here):
    """And the whole of a run on a server without DeleteObjects, with a conflict at each conditional write."""
    odd.bulk, odd.conflicts = "501 NotImplemented", [PROBE, "/lease.json", "/plan", "/latest.json"]
    for label in COLORS:
        bucket.join("img", f"{label}.jpg").write(picture(label))
    output = bucket.join("out")
    output.join(PROBE).write(b"")
    output.join("lease.json.probe-0123456789ab").write(b"1")  # an earlier version's
    settings = {"storage_options": options(odd.endpoint)}
    report = tlbatch.classify(images=f"{bucket.url}/img", bundle=bundle_url, output=output.url, **settings)
    assert (report["predicted"], report["failed"]) == (3, 0)
    assert odd.conflicts == []
    assert output.names() == ["latest.json", "lease.json.probe-0123456789ab", "runs"]
    assert sorted(tlbatch.read_predictions(output.url)["label"]) == sorted(COLORS)
    assert [one["why"] for one in tlbatch.gc(output.url, older_than=0, remove=True)["leftovers"]] == ["interrupted write"]
    assert output.names() == ["latest.json", "runs"]


def test_a_role_that_may_not_delete_does_not_end_at_its_probe(odd, bucket):
    odd.denied = {"DELETE"}
    assert bucket.join("out", "lease.json").create(b"1")
    assert not bucket.join("out", "lease.json").create(b"2")


@pytest.mark.parametrize("way", WAYS)
def test_who_requests_pays_for_listings_and_objects(odd, bucket, way):
    bucket.join("i", "a.jpg").write(picture("red"))
    odd.reset()
    store = resolve(f"{bucket.url}/i", {**WAYS[way], "requester_pays": True})
    (listed,) = list_store(store, Selection()).manifest.to_pylist()
    assert Reader({**WAYS[way], "requester_pays": True}).image(listed) == picture("red")
    assert store.join("a.jpg").fetch(1, 3, listed["etag"]) == picture("red")[1:3]
    assert len(odd.payers) >= 3
    assert set(odd.payers) == {"requester"}
