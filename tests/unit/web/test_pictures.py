"""Pictures of rows: loose images and those in shards, and the bounded folder of small ones."""

import io
import os
import tarfile

import pyarrow as pa
import pytest
from PIL import Image
from support.pictures import COLORS, encoded, noisy

from tlbatch.errors import ErrorKind, Failure
from tlbatch.output.run import begin_run
from tlbatch.schema import MANIFEST_SCHEMA
from tlbatch.storage.resolve import resolve
from tlbatch.web import pictures as pictures_module
from tlbatch.web.pictures import SMALL, PictureCache, Pictures


def size_of(picture: bytes | Failure) -> tuple[int, int]:
    assert isinstance(picture, bytes), picture
    return Image.open(io.BytesIO(picture)).size


@pytest.fixture
def shard(tmp_path):
    """A tar with twelve pictures, two of which have the same name."""
    path = tmp_path / "store" / "shard.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            info = tarfile.TarInfo(f"{min(number, 10)}.jpg")
            data = encoded(noisy(COLORS["red"], number, (30 + number, 20)))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def pictures(tmp_path, shard):
    """The pictures of a run over a loose image and the shard."""
    (shard.parent / "wide.jpg").write_bytes(encoded(noisy(COLORS["blue"], 1, (3_000, 500))))
    listed = [
        {"uri": str(path), "key": path.name, "size": path.stat().st_size, "etag": None, "format": kind}
        for path, kind in ((shard, "tar"), (shard.parent / "wide.jpg", "image"))
    ]
    spec = {"images": str(shard.parent), "predictions": True}
    facts = {"spec": spec, "bundle": "b" * 64, "skipped": 0}
    run = begin_run(resolve(str(tmp_path / "out")), "r1", pa.Table.from_pylist(listed, MANIFEST_SCHEMA), facts)
    return Pictures([run], {}, PictureCache(tmp_path / "cache"))


def row(path, key: str, index: int, **more) -> dict:
    return {"uri": str(path), "key": key, "etag": None, "index": index, "run_id": "r1", "width": 0, "height": 0, **more}


def test_a_loose_image_is_small_and_as_large_as_it_is(pictures, shard):
    wide = row(shard.parent / "wide.jpg", "wide.jpg", 0, width=3_000, height=500)
    assert size_of(pictures.small(wide)) == (SMALL, round(SMALL / 6))
    assert size_of(pictures.whole(wide)) == (2_048, 341)
    narrow = row(shard, "3.jpg", 3, width=33, height=20)
    assert size_of(pictures.whole(narrow)) == (33, 20)
    assert max(size_of(pictures.whole({**narrow, "width": None, "height": None}))) == 1_024, "an old table has no sizes"


def test_the_rows_of_a_page_cost_one_pass_through_their_shard(pictures, shard, monkeypatch):
    passes = []
    before = pictures_module._Store.members
    monkeypatch.setattr(pictures_module._Store, "members", lambda *given: passes.append(len(given[2])) or before(*given))
    shown = [row(shard, f"{number}.jpg", number) for number in (7, 2, 5)]
    pictures.expect(shown)
    sizes = [size_of(pictures.small(one)) for one in shown]
    assert passes == [3]
    assert sizes == [(SMALL, round(SMALL * 20 / (30 + number))) for number in (7, 2, 5)]
    assert [size_of(pictures.small(one)) for one in shown] == sizes
    assert passes == [3]


def test_images_of_one_name_are_told_apart_by_their_place(pictures, shard):
    first, second = (pictures.small(row(shard, "10.jpg", number)) for number in (10, 11))
    assert (size_of(first)[1], size_of(second)[1]) == (round(SMALL * 20 / 40), round(SMALL * 20 / 41))
    assert size_of(pictures.small(row(shard, "10.jpg", None))) == size_of(first), "an old table has no places"


def test_what_is_gone_or_broken_has_a_reason(pictures, shard):
    gone = pictures.small(row(shard.parent / "none.jpg", "none.jpg", 0))
    assert isinstance(gone, Failure)
    assert gone.kind is ErrorKind.NOT_FOUND
    missing = pictures.whole(row(shard, "no such member", 0))
    assert (missing.kind, missing.message) == (ErrorKind.NOT_FOUND, "the shard does not have this image any more")
    (shard.parent / "text.jpg").write_bytes(b"no image")
    assert pictures.small(row(shard.parent / "text.jpg", "text.jpg", 0)).kind is ErrorKind.NOT_AN_IMAGE
    changed = row(shard.parent / "wide.jpg", "wide.jpg", 0, etag="0-0-0-0")
    assert pictures.whole(changed).kind is ErrorKind.CHANGED


def test_the_folder_is_the_users_and_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "_MEASURED_EVERY", 2)
    cache = PictureCache(tmp_path / "cache", most=1_000)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    for number in range(9):
        cache.put(str(number), bytes(200))
        os.utime(tmp_path / "cache" / str(number), (number, number))
    assert cache.get("0") is None
    assert cache.get("8") == bytes(200)
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 1_000
    assert kept == sorted(map(str, range(9 - len(kept), 9))), "the oldest go first"


def test_a_full_disk_costs_only_the_cache(tmp_path, monkeypatch):
    cache = PictureCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    cache.put("a", b"picture")
    assert cache.get("a") is None
