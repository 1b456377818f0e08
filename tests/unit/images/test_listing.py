"""A store becomes a manifest: sorted, complete, skipped objects counted."""

import os

import pytest

from tlbatch.errors import StoreError
from tlbatch.images.listing import Selection, list_store
from tlbatch.schema import MANIFEST_SCHEMA, from_parquet, to_parquet
from tlbatch.storage.resolve import resolve

KEYS = ["b.JPG", "a/1.jpeg", "a/2.png", "a/readme.txt", "c.webp", "noext", "d.tiff", "e.gif", "f.bmp"]


@pytest.fixture
def folder(tmp_path):
    for key in KEYS:
        path = tmp_path / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(key))
    return resolve(str(tmp_path / "store"))


def test_known_suffixes_are_taken_and_the_others_counted(folder):
    listing = list_store(folder, Selection())
    assert listing.manifest["key"].to_pylist() == ["a/1.jpeg", "a/2.png", "b.JPG", "c.webp", "d.tiff", "e.gif", "f.bmp"]
    assert listing.skipped == 2
    assert listing.manifest.schema == MANIFEST_SCHEMA
    assert listing.manifest["size"].to_pylist() == [len(key) for key in listing.manifest["key"].to_pylist()]


@pytest.mark.parametrize(
    ("include", "exclude", "keys"),
    [
        (["noext"], [], ["noext"]),
        (["a/*"], [], ["a/1.jpeg", "a/2.png", "a/readme.txt"]),
        (["*.png", "*.gif"], [], ["a/2.png", "e.gif"]),
        ([], ["a/*", "?.t*"], ["b.JPG", "c.webp", "e.gif", "f.bmp"]),
    ],
)
def test_globs(folder, include, exclude, keys):
    assert list_store(folder, Selection(include, exclude)).manifest["key"].to_pylist() == keys


def test_keys_are_sorted_as_bytes(tmp_path):
    keys = ["ä.jpg", "b.jpg", "B.jpg", "a.jpg", "a/x.jpg", "a-b.jpg", "🐱.jpg", "z.jpg"]
    for key in keys:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    listed = list_store(resolve(str(tmp_path)), Selection()).manifest["key"].to_pylist()
    assert listed == sorted(keys, key=str.encode)


def test_a_name_that_is_no_text_is_counted_and_costs_nothing_else(folder):
    (folder.path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    listing = list_store(folder, Selection())
    assert (listing.manifest.num_rows, listing.skipped) == (7, 3)


def test_an_output_inside_the_store_is_not_listed(folder):
    folder.join("out", "runs", "x.jpg").write(b"x")
    folder.join("outside.jpg").write(b"x")
    keys = list_store(folder, Selection(), avoid=folder.join("out")).manifest["key"].to_pylist()
    assert "outside.jpg" in keys
    assert not any(key.startswith("out/") for key in keys)


def test_one_image_is_a_store(folder):
    assert list_store(folder.join("c.webp"), Selection()).manifest["key"].to_pylist() == ["c.webp"]


def test_a_trial_takes_the_first_keys(folder):
    assert list_store(folder, Selection(), max_images=2).manifest["key"].to_pylist() == ["a/1.jpeg", "a/2.png"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "contains no images to classify: it is empty"),
        (
            lambda path: (path.mkdir(), (path / "a.txt").write_bytes(b"")),
            "1 other objects were skipped (1 .txt); use --include to take them",
        ),
    ],
)
def test_a_store_without_images_is_a_sentence(tmp_path, make, sentence):
    make(tmp_path / "s")
    with pytest.raises(StoreError) as caught:
        list_store(resolve(str(tmp_path / "s")), Selection())
    assert sentence in str(caught.value)


def test_the_manifest_survives_its_file_and_equal_ones_are_equal_bytes(folder):
    manifest = list_store(folder, Selection()).manifest
    again = list_store(folder, Selection()).manifest
    assert to_parquet(manifest) == to_parquet(again)
    assert from_parquet(to_parquet(manifest)).equals(manifest)
