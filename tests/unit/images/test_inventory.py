"""The manifest of an inventory is recognised by its content, and its data files are read a piece at a time."""

import json
from urllib.parse import quote, quote_plus

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inventories import ALL_VERSIONS, KINDS, data_file, schema_text, table_of

from tlbatch.commands.list_images import store_of
from tlbatch.config import RunConfig
from tlbatch.errors import StoreError
from tlbatch.images import inventory
from tlbatch.images.inventory import Inventory, find_inventory
from tlbatch.storage.location import LISTED
from tlbatch.storage.resolve import resolve
from tlbatch.storage.temporary_rows import temporary_file

GOOD = {
    "sourceBucket": "photos",
    "destinationBucket": "arn:aws:s3:::inventories",
    "version": "2016-11-30",
    "creationTimestamp": "1514944800000",
    "fileFormat": "CSV",
    "fileSchema": "Bucket, Key, Size",
    "files": [{"key": "data/1.csv.gz", "size": 7, "MD5checksum": "F" * 32}],
}


def found(folder, document, name: str = "manifest.json") -> Inventory | None:
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return find_inventory(resolve(str(folder / name)), resolve)


def test_an_inventory_is_known_by_its_name_and_its_keys(tmp_path):
    one = found(tmp_path, GOOD)
    assert (one.url, one.destination, one.kind, one.files) == (
        "s3://photos",
        "inventories",
        "CSV",
        [("data/1.csv.gz", 7, "f" * 32)],
    )
    assert one.facts["created"] == "2018-01-03T02:00:00Z"
    assert found(tmp_path, GOOD, "other.json") is None
    for other in ("", "[]", "{", "[" * 100_000, '{"files": []}', "\ud83d".encode("utf-16", "surrogatepass").decode("latin-1")):
        assert found(tmp_path, other) is None
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for path in ("folder/manifest.json", "nowhere/manifest.json", "manifest.json/manifest.json"):
        assert find_inventory(resolve(str(tmp_path / path)), resolve) is None


def test_the_store_of_an_inventory_is_its_bucket(tmp_path):
    found(tmp_path, GOOD)
    config = RunConfig(images=str(tmp_path / "manifest.json"), bundle="b", output="o")
    assert store_of(config).url == "s3://photos"
    folder = config.model_copy(update={"images": f"{tmp_path}/manifest.json/"})
    assert store_of(folder).url == str(tmp_path / "manifest.json"), "a slash at its end means a folder"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fileFormat": "Avro"}, "has files of the format 'Avro'; the formats are CSV, ORC, Parquet"),
        ({"files": []}, "has no files: s3://photos was empty, or it was not completed"),
        ({"files": [{"key": "a", "size": 1}]}, "lacks 'MD5checksum' in its manifest"),
        ({"files": ["a"]}, "has a manifest of an unknown form"),
        ({"files": None}, "has a manifest of an unknown form"),
        ({"creationTimestamp": "yesterday"}, "has a manifest of an unknown form"),
        ({"creationTimestamp": "1" * 30}, "has a manifest of an unknown form"),
        ({"destinationBucket": None}, None),
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_used_is_said_so_in_a_sentence(tmp_path, changes, sentence):
    document = {**GOOD, **changes}
    if sentence is None:
        del document["destinationBucket"]
        sentence = "lacks 'destinationBucket' in its manifest"
    with pytest.raises(StoreError, match=f"^The inventory {tmp_path}/manifest.json {sentence}"):
        found(tmp_path, document)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.text(st.sampled_from("a/+% %2F&é🐱\n\"'"), max_size=8), max_size=8))
def test_keys_are_decoded_however_they_are_encoded(keys):
    for encode in (quote_plus, lambda key: quote_plus(key, safe="/"), quote, lambda key: quote(key, safe="").lower()):
        written = pa.array([encode(key) for key in keys], pa.string())
        expected = [key.lower() for key in keys] if encode("%") == "%25".lower() and encode("A") == "a" else keys
        assert inventory._decoded(written).to_pylist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_file_is_read_in_pieces(kind, monkeypatch):
    monkeypatch.setattr(inventory, "_PIECE", 100)
    monkeypatch.setattr(inventory, "_ROWS_AT_ONCE", 7)
    rows = [
        {"key": f"{number} %+.jpg", "size": number, "e_tag": str(number), "is_latest": number % 5 > 0} for number in range(100)
    ]
    table = table_of("photos", rows, ALL_VERSIONS)
    with temporary_file() as file:
        file.write(data_file(table, kind))
        file.flush()
        file.seek(0)
        pieces = list(inventory._READERS[kind](file, schema_text(table, kind)))
    assert len(pieces) > 10
    batches = [inventory._listed(piece) for piece in pieces]
    assert all(batch.schema == LISTED for batch in batches)
    kept = [(row["key"], row["size"], row["etag"]) for batch in batches for row in batch.to_pylist()]
    assert kept == [(row["key"], row["size"], row["e_tag"]) for row in rows if row["is_latest"]]
