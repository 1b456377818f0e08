"""The same pictures in every kind of store get the same answers."""

import csv
import gzip
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from support.paths import PHOTOS
from support.shards import parquet_of, tar_of, tfrecord_of, zip_of
from support.tables import outcome

import tlbatch
from tlbatch.errors import CountsError, ErrorKind, LabelsError, StoreError
from tlbatch.images.listing import Selection, list_store
from tlbatch.output.parts import stage_part
from tlbatch.output.verify import verify
from tlbatch.storage.resolve import resolve


@pytest.fixture
def images(request) -> Path:
    """A folder of loose images: 200 real photographs, small made ones where those are not at hand."""
    return request.getfixturevalue("photos" if PHOTOS.is_dir() else "store")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg")
    }


def write_forms(folder: Path, loose: Path) -> dict[str, Path]:
    """The same images in all forms a store may have."""
    content = bytes_of(loose)
    halves = [dict(list(content.items())[::2]), dict(list(content.items())[1::2])]
    for form, write, ending in (
        ("tar", tar_of, ".tar"),
        ("tar.gz", lambda half: gzip.compress(tar_of(half), 1), ".tar.gz"),
        ("parquet", lambda half: parquet_of(half, row_group_size=7), ".parquet"),
        ("tfrecord", tfrecord_of, ".tfrecord"),
        ("zip", zip_of, ".zip"),
    ):
        (folder / form).mkdir(parents=True)
        for number, half in enumerate(halves):
            (folder / form / f"shard-{number}{ending}").write_bytes(write(half))
    addresses = {"uri": [f"{loose}/{key}" for key in content], "key": list(content)}
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([addresses, *zip(*addresses.values(), strict=True)])
    pq.write_table(pa.table(addresses), folder / "list.parquet")
    (folder / "list.txt").write_text("".join(f"{loose}/{key}\n" for key in content))
    forms = {form: folder / form for form in ("tar", "tar.gz", "parquet", "tfrecord", "zip")}
    return {"loose": loose, **forms, **{name: folder / name for name in ("list.csv", "list.parquet", "list.txt")}}


@pytest.mark.sampled(1)
def test_label_and_score_of_each_key_are_the_same_in_every_form(images, bundle_url, tmp_path, ray_here):
    count, answers = len(bytes_of(images)), {}
    for form, location in write_forms(tmp_path / "forms", images).items():
        output = str(tmp_path / f"out-{form}")
        report = tlbatch.classify(images=str(location), bundle=bundle_url, output=output)
        assert (report["listed"], report["predicted"]) == (count, count), (form, report["failed_by_kind"])
        assert verify(output)["ok"]
        table = tlbatch.read_predictions(output).set_index("key").sort_index()
        answers[form] = table[["label", "score", "width", "height"]].rename(index=lambda key: key.removeprefix(f"{images}/"))
        assert answers[form].equals(answers["loose"]), form


@pytest.mark.sampled(1)
def test_the_format_can_be_told(store, bundle_url, tmp_path, ray_here):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "archive").write_bytes(tar_of(bytes_of(store)))
    output = str(tmp_path / "out")
    report = tlbatch.classify(images=str(tmp_path / "s"), bundle=bundle_url, output=output, format="tar")
    assert report["predicted"] == 60
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "5f3a").write_bytes((store / "red" / "0000.jpg").read_bytes())
    (tmp_path / "t" / "notes").write_text("hello")
    report = tlbatch.classify(images=str(tmp_path / "t"), bundle=bundle_url, output=output + "2", format="images")
    assert (report["predicted"], report["failed_by_kind"]) == (1, {"not_an_image": 1})


def test_the_images_of_a_shard_stay_together_however_many(store, bundle_url, tmp_path, ray_here):
    """Ray cuts blocks at a size; a part with half of a shard would lose the other half."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "all.tar").write_bytes(tar_of(bytes_of(store)))
    ray.data.DataContext.get_current().target_max_block_size = 1024
    report = tlbatch.classify(images=str(tmp_path / "s"), bundle=bundle_url, output=str(tmp_path / "out"), features=True)
    assert report["predicted"] == 60
    assert ray.data.DataContext.get_current().target_max_block_size is None


def test_a_part_with_half_of_an_object_is_not_staged(tmp_path):
    rows = outcome([0, 1, 2]).set_column(outcome([0]).column_names.index("images"), "images", pa.array([1, 2, 1], pa.int32()))
    with pytest.raises(CountsError, match="some images of an object and not all"):
        stage_part(resolve(str(tmp_path)), rows)
    assert not resolve(str(tmp_path)).names()


def test_torn_and_empty_shards_cost_one_row_each(store, bundle_url, tmp_path, ray_here):
    whole = tar_of(bytes_of(store))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "s" / "b.tar").write_bytes(whole)
    (tmp_path / "s" / "c.tar").write_bytes(tar_of({}))
    (tmp_path / "s" / "d.parquet").write_bytes(b"PAR1 nothing")
    output = str(tmp_path / "out")
    report = tlbatch.classify(images=str(tmp_path / "s"), bundle=bundle_url, output=output)
    errors = tlbatch.read_errors(output).set_index("key")
    assert errors["kind"].to_dict() == {"a.tar": "truncated", "c.tar": "empty", "d.parquet": "truncated"}
    table = tlbatch.read_predictions(output)
    counts = table.groupby("uri").size()
    assert counts[f"{tmp_path}/s/b.tar"] == 60
    assert 20 < counts[f"{tmp_path}/s/a.tar"] < 40
    assert report["listed"] == len(table) + 3
    assert report["objects"] == 4
    assert verify(output)["ok"]


def test_names_that_occur_twice_stay_two_rows(store, bundle_url, tmp_path, ray_here):
    data = (store / "red" / "0000.jpg").read_bytes()
    archive = tar_of({"a.jpg": data})
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "one.tar").write_bytes(archive[: -(-(512 + len(data)) // 512) * 512] + archive)
    (tmp_path / "s" / "two.tar").write_bytes(archive)
    output = str(tmp_path / "out")
    assert tlbatch.classify(images=str(tmp_path / "s"), bundle=bundle_url, output=output)["predicted"] == 3
    assert tlbatch.read_predictions(output)["key"].tolist() == ["a.jpg"] * 3
    assert verify(output)["ok"]


@pytest.mark.sampled(1)
def test_training_on_a_shard_with_a_labels_file(store, weights, tmp_path, ray_here):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "all.tar").write_bytes(tar_of(bytes_of(store)))
    labels = tmp_path / "labels.csv"
    labels.write_text("key,label\n" + "".join(f"{key},{key.split('/')[0]}\n" for key in bytes_of(store) if "0001" not in key))
    settings = {"base": "MobileNetV2", "size": 64, "weights": weights, "epochs": 2}
    trained = tlbatch.train(images=str(tmp_path / "s"), labels=str(labels), bundle=str(tmp_path / "b"), **settings)
    assert (sum(trained["images"].values()), trained["labels"]) == (57, ["blue", "green", "red"])
    with pytest.raises(LabelsError, match="shards, which have no class folders; give --labels"):
        tlbatch.train(images=str(tmp_path / "s"), bundle=str(tmp_path / "b2"), **settings)


def test_a_list_may_tell_sizes_and_versions_and_relative_paths(store, tmp_path):
    (tmp_path / "list.csv").write_text("uri,size,etag\nred/1.jpg,7,abc\ns3://bucket/x y.jpg,8,\n/abs/2.tar,,\n")
    rows = list_store(resolve(str(tmp_path / "list.csv")), Selection()).manifest.to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("/abs/2.tar", "/abs/2.tar", None, None, "tar"),
        (f"{tmp_path}/red/1.jpg", "red/1.jpg", 7, "abc", "image"),
        ("s3://bucket/x y.jpg", "s3://bucket/x y.jpg", 8, None, "image"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("list.csv", "url,key\na,b\n", "has no column uri; its columns are url, key"),
        ("list.csv", "uri,key\na\n", "is not a CSV file"),
        ("list.txt", "\n\n", "contains no images"),
        ("list.parquet", "PAR1 torn", "cannot be parsed"),
        ("list.csv", "uri,key\n,a\n", "1 rows without a uri"),
        ("list.csv", "uri,size,uri\na,1,b\n", "has the column uri twice; keep one of them"),
    ],
)
def test_a_list_that_is_none_says_why(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(StoreError, match=sentence):
        list_store(resolve(str(tmp_path / name)), Selection())


def test_what_is_on_a_list_and_nowhere_else_is_a_failed_image(store, bundle_url, tmp_path, ray_here):
    (tmp_path / "list.txt").write_text(f"{store}/red/0000.jpg\n{store}/red/gone.jpg\n")
    output = str(tmp_path / "out")
    report = tlbatch.classify(images=str(tmp_path / "list.txt"), bundle=bundle_url, output=output)
    assert (report["predicted"], report["failed_by_kind"]) == (1, {ErrorKind.NOT_FOUND: 1})


def test_an_image_with_too_many_bytes_is_not_read(store, bundle_url, tmp_path, ray_here):
    report = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"), max_bytes=10)
    assert report["failed_by_kind"] == {"too_large": 60}


def test_a_list_of_web_addresses(store, bundle_url, tmp_path, ray_here):
    """Any protocol of fsspec will do: here plain HTTP, whose server cannot list."""
    handler = partial(QuietHandler, directory=str(store))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        names = ["red/0000.jpg", "blue/0001.jpg", "green/gone.jpg"]
        (tmp_path / "list.txt").write_text("".join(f"{root}/{name}\n" for name in names))
        output = str(tmp_path / "out")
        report = tlbatch.classify(images=str(tmp_path / "list.txt"), bundle=bundle_url, output=output)
        server.shutdown()
    assert (report["predicted"], report["failed_by_kind"]) == (2, {"not_found": 1})
    assert tlbatch.read_predictions(output)["label"].tolist() == ["blue", "red"]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, *_):
        pass
