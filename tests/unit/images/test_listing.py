"""A store becomes a manifest: sorted, complete, skipped objects counted."""

import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.shards import parquet_of, tar_of, tfrecord_of

from tlbatch.errors import StoreError
from tlbatch.images import contents, tar
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
        (["**/*.png", "**/b.*"], [], ["a/2.png", "b.JPG"]),
        ([], ["**/a/", "**/?.t*"], ["b.JPG", "c.webp", "e.gif", "f.bmp"]),
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


@pytest.mark.parametrize("link", ["store", "output", "run in the output", "above the output"])
def test_an_output_that_links_lead_to_is_not_listed(tmp_path, link):
    (tmp_path / "data" / "out" / "runs" / "r").mkdir(parents=True)
    (tmp_path / "data" / "out" / "runs" / "r" / "part.jpg").write_bytes(b"x")
    store = tmp_path / ("data" if link == "store" else "images")
    store.mkdir(exist_ok=True)
    (store / "a.jpg").write_bytes(b"x")
    if link == "store":
        (tmp_path / "current").symlink_to(store)
        store = tmp_path / "current"
    else:
        targets = {"output": "out", "run in the output": "out/runs/r", "above the output": ""}
        (store / "link").symlink_to(tmp_path / "data" / targets[link])
    listing = list_store(resolve(str(store)), Selection(), avoid=resolve(str(tmp_path / "data" / "out")))
    assert listing.manifest["key"].to_pylist() == ["a.jpg"]


def test_a_store_inside_the_output_is_listed(tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "a.jpg").write_bytes(b"x")
    listing = list_store(resolve(str(tmp_path / "out" / "images")), Selection(), avoid=resolve(str(tmp_path / "out")))
    assert listing.manifest["key"].to_pylist() == ["a.jpg"]


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


def store_of(folder, *keys):
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(b"x")
    return resolve(str(folder))


def keys_of(listing):
    return listing.manifest["key"].to_pylist()


def test_litter_is_skipped_and_counted_by_kind(tmp_path):
    litter = (
        "@eaDir/1.jpg/XL.jpg",
        "a/@eaDir/1.jpg/S.jpg",
        "#recycle/1.jpg",
        "a/._1.jpg",
        ".git/1.jpg",
        ".git/2.jpg",
        "Thumbs.db",
    )
    listing = list_store(store_of(tmp_path, "a/1.jpg", *litter), Selection(kind="images"))
    assert keys_of(listing) == ["a/1.jpg"]
    # A hidden folder is not opened, and counts as one.
    assert listing.skipped_by_kind == {"@eaDir": 2, "recycle bin": 1, "._*": 1, "hidden": 1, "desktop file": 1}
    assert listing.skipped == 6


def test_outputs_of_tlbatch_are_no_images_whatever_their_runs_are_called(tmp_path):
    run = "runs/20261122T211455Z-bec8e5/predictions/part-00000.parquet"
    own = ("o/latest.json", f"o/{run}", "p/latest.json", "p/runs/may/run.json", "p/runs/may/predictions/part-00000.parquet")
    listing = list_store(store_of(tmp_path, "1.jpg", "runs/2026/1.jpg", *own), Selection())
    assert keys_of(listing) == ["1.jpg", "runs/2026/1.jpg"]
    assert listing.skipped_by_kind["output of tlbatch"] == 2


@pytest.fixture
def opened(monkeypatch):
    """The folders that are opened; one whose name has `closed` in it cannot be."""
    listdir, found = os.listdir, []

    def watch(path):
        found.append(os.path.basename(path))
        if "closed" in os.path.basename(path):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", watch)
    return found


def test_a_folder_that_is_shut_is_named_and_costs_nothing_else(tmp_path, opened, caplog):
    listing = list_store(store_of(tmp_path, "a/1.jpg", "closed/2.jpg", "b/closed/3.jpg", "z.jpg"), Selection())
    assert keys_of(listing) == ["a/1.jpg", "z.jpg"]
    assert listing.unreadable == ("b/closed/", "closed/")
    assert listing.skipped_by_kind == {"folder that cannot be opened": 2}
    assert "b/closed/, closed/" in caplog.text
    with pytest.raises(StoreError, match="No permission to read the store"):
        list_store(resolve(str(tmp_path / "closed")), Selection())


@pytest.mark.parametrize("glob", ["closed/*", "closed/", "*/closed/*", "c*/", "**/closed/**"])
def test_an_excluded_folder_is_not_opened(tmp_path, opened, glob):
    listing = list_store(
        store_of(tmp_path, "a/1.jpg", "closed/2.jpg", "b/closed/3.jpg", "lost+found/4.jpg"), Selection((), [glob])
    )
    closed = {"*/closed/*": {"b/closed/"}, "**/closed/**": {"closed/", "b/closed/"}}.get(glob, {"closed/"})
    assert not closed & set(listing.unreadable)
    assert listing.skipped_by_kind["excluded"] == len(closed)
    assert "lost+found" not in opened


def test_a_pattern_of_names_opens_every_folder(tmp_path, opened):
    list_store(store_of(tmp_path, "a/1.jpg", "b/2.png"), Selection((), ["*.png", "b/*.png"]))
    assert opened[1:] == ["a", "b"]


def test_images_in_a_folder_without_permission_to_enter_have_rows(tmp_path, monkeypatch):
    location, stat = store_of(tmp_path, "a/1.jpg", "b/2.jpg", "b/note.txt"), os.stat

    def refuse(path, **how):
        if "/b/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", refuse)
    listing = list_store(location, Selection())
    assert listing.manifest.select(["key", "size"]).to_pylist() == [
        {"key": "a/1.jpg", "size": 1},
        {"key": "b/2.jpg", "size": None},
    ]


def test_links_that_lead_nowhere_are_objects_or_counted(tmp_path):
    location = store_of(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path)
    listing = list_store(location, Selection())
    assert listing.manifest["key"].to_pylist() == ["1.jpg", "2.jpg"]
    assert listing.skipped_by_kind == {"broken link": 2}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            ("d.lance/_versions/1.manifest", "d.lance/data/a.lance"),
            "Lance data set. tlbatch does not read this layout; write its",
        ),
        (("index.json", "shard.00000.mds.zstd"), "MDS data set"),
        (("index.json", "chunk-0-0.bin"), "LitData data set"),
        (("index.json", "chunk-0-1.zstd.bin"), "LitData data set"),
        (("t/.hoodie/hoodie.properties",), "Hudi table"),
        (("t/_delta_log/00000000000000000000.json",), "Delta table"),
        (("t/metadata/v1.metadata.json", "t/metadata/snap-1-1-a.avro"), "Iceberg table"),
        (("data-00000-of-00001.arrow", "state.json"), "to_parquet()"),
        (("a.h5",), "HDF5"),
        (("x.array_record-00000-of-00002", "x.array_record-00001-of-00002"), "as TFRecord (TFDS: `file_format='tfrecord'`)"),
    ],
)
def test_layouts_of_others_are_named(tmp_path, keys, sentence, caplog):
    store_of(tmp_path, *keys)
    with pytest.raises(StoreError) as caught:
        list_store(resolve(str(tmp_path)), Selection())
    assert sentence in str(caught.value)
    assert "--include" not in str(caught.value)
    store_of(tmp_path, "1.jpg")
    assert keys_of(list_store(resolve(str(tmp_path)), Selection())) == ["1.jpg"]
    assert (sentence in caplog.text) == (keys != ("a.h5",)), "common files beside images mean nothing"


def judged(location, *include, **settings):
    listing = list_store(location, Selection(include, **settings), locate=resolve)
    return {row["key"]: row["format"] for row in listing.manifest.to_pylist()}, listing.skipped_by_kind


def test_include_says_which_objects_and_never_what_they_are(tmp_path):
    content = {"a.shard": tar_of({"1.jpg": b"x"}), "b.pq": parquet_of({"1.jpg": b"x"}), "c.rec0": tfrecord_of({"1.jpg": b"x"})}
    content |= {"d.img": b"\xff\xd8\xff", "e.jpg": b"x", "f.tar": b"x", "g": gzip.compress(content["a.shard"]), "h.img": b"y"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    found, _ = judged(resolve(str(tmp_path)), "*")
    shards = {"a.shard": "tar", "b.pq": "parquet", "c.rec0": "tfrecord", "f.tar": "tar", "g": "tar"}
    assert found == {**shards, "d.img": "image", "e.jpg": "image", "h.img": "image"}
    assert judged(resolve(str(tmp_path / "a.shard"))) == ({"a.shard": "tar"}, {})


def test_shards_of_an_unknown_format_are_one_kind(tmp_path):
    names = [f"x.{kind}-{number:05d}-of-00020" for kind in ("array_record", "bagz") for number in range(20)]
    listing = list_store(store_of(tmp_path, "1.jpg", *names), Selection())
    assert listing.skipped_by_kind == {"ArrayRecord or Riegeli files": 20, ".bagz": 20}
    for name in names:
        (tmp_path / name).write_bytes(b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f" + bytes(56))
    found, _ = judged(resolve(str(tmp_path)), "*-of-*")
    assert set(found.values()) == {"tfrecord"}, "whose reader names what it is"


def test_parquet_that_describes_what_is_beside_it_is_skipped(tmp_path):
    rows = {"file_name": ["1.jpg"], "box": [{"at": [1, 2]}]}
    vector = pa.fixed_shape_tensor(pa.float32(), [4])
    tables = {
        "metadata": rows,
        "00000": rows,
        "digests": {**rows, "sha256": [b"\x12" * 32], "geometry": [b"\1\1\0\0\0" + bytes(16)]},
        "vectors": {**rows, "clip": pa.ExtensionArray.from_storage(vector, pa.array([[0.0] * 4], vector.storage_type))},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    location, every = resolve(str(tmp_path)), sorted(f"{name}.parquet" for name in tables)
    alone, kinds = judged(location)
    assert (sorted(alone), kinds) == (every, {}), "each has a row that says what it lacks"
    (tmp_path / "00000.tar").write_bytes(b"x")
    assert judged(location) == ({"00000.tar": "tar"}, {"Parquet without images": 4})
    assert "metadata.parquet" in judged(location, kind="parquet")[0]
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"images": [[{"bytes": b"x", "path": "p"}]]}), tmp_path / "nested.parquet")
    assert sorted(judged(location)[0]) == ["00000.tar", "nested.parquet", "torn.parquet"]


def test_parquet_with_images_is_read_whatever_is_beside_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_of({"1.jpg": b"x"}))
    pq.write_table(pa.table({"picture": [b"\xff\xd8\xff", None]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"key": ["1.jpg"], "label": ["cat"]}), tmp_path / "labels.parquet")
    shards = {"a.parquet": "parquet", "b.parquet": "parquet"}
    assert judged(resolve(str(tmp_path))) == (shards, {"Parquet without images": 1})
    (tmp_path / "a.tar").write_bytes(b"x")
    assert judged(resolve(str(tmp_path))) == ({**shards, "a.tar": "tar"}, {"Parquet without images": 1})


@pytest.mark.parametrize("name", ["annotations.tar.gz", "annotations.tar"])
def test_a_tar_without_images_is_skipped_where_others_are(tmp_path, monkeypatch, name):
    pack = gzip.compress if name.endswith(".gz") else bytes
    texts = {f"Annotations/{number}.xml": bytes(3000) for number in range(100)}
    (tmp_path / name).write_bytes(pack(tar_of(texts)))
    location = resolve(str(tmp_path))
    assert judged(location)[0] == {name: "tar"}, "alone, its row says what it has"
    (tmp_path / "images.tar").write_bytes(tar_of({"1.json": b"{}", "1.jpg": b"x"}))
    assert judged(location) == ({"images.tar": "tar"}, {"tar without images": 1})
    (tmp_path / name).write_bytes(pack(tar_of({**texts, "Images/1.jpg": b"x"})))  # images come last
    assert sorted(judged(location)[0]) == sorted([name, "images.tar"])
    whole = pack(tar_of(texts))
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert sorted(judged(location)[0]) == sorted([name, "images.tar"]), "its row says where it is torn"
    (tmp_path / name).write_bytes(pack(tar_of(texts)))
    assert sorted(judged(location, image_field="xml")[0]) == sorted([name, "images.tar"])
    monkeypatch.setattr(tar, "_MOST_LOOKED_INTO", 10_000)
    assert sorted(judged(location)[0]) == sorted([name, "images.tar"]), "too long to tell"


def test_of_many_shards_with_names_like_each_other_some_are_looked_into(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(contents, "may_hold_images", lambda kind, file, field: looked.append(kind) or b"yes" in file.read())
    keys = [f"{folder}/{number:05d}.parquet" for folder in ("images", "texts", "both") for number in range(300)]
    for key in keys:
        good = key.startswith("images") or (key.startswith("both") and int(key[-9:-8]) % 2)
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"yes" if good else b"no")
    found, kinds = judged(resolve(str(tmp_path)))
    assert (len(found), kinds) == (450, {"Parquet without images": 450})
    assert len(looked) == 16 + 16 + 300
    looked.clear()
    judged(resolve(str(tmp_path / "both")))
    assert not looked, "a store of shards that are all alike"


def test_a_document_is_neither_an_image_nor_a_list(tmp_path):
    (tmp_path / "inventory.json").write_text(
        '{"sourceBucket": "b", "fileFormat": "CSV", "fileSchema": "Bucket, Key", "files": []}'
    )
    with pytest.raises(StoreError, match="seems to be the manifest of an S3 Inventory: name it"):
        judged(resolve(str(tmp_path / "inventory.json")))
    (tmp_path / "manifest.json").write_text('{"files": ["a.jpg"]}')
    with pytest.raises(StoreError, match="is a JSON document, not an image, a shard or a list"):
        judged(resolve(str(tmp_path / "manifest.json")))


def test_a_list_may_have_a_byte_order_mark(tmp_path):
    store_of(tmp_path, "a b.jpg", "2.jpg")
    (tmp_path / "list.txt").write_bytes("a b.jpg\r\n2.jpg\r\n".encode("utf-8-sig"))
    listing = list_store(resolve(str(tmp_path / "list.txt")), Selection())
    assert listing.manifest["uri"].to_pylist() == [f"{tmp_path}/2.jpg", f"{tmp_path}/a b.jpg"]
    (tmp_path / "list.txt").write_bytes("a b.jpg\r\n".encode("utf-16"))
    with pytest.raises(StoreError, match="is in UTF-16; save it as UTF-8"):
        list_store(resolve(str(tmp_path / "list.txt")), Selection())
