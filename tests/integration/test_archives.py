"""Archives as people make them: each image has its place, what is skipped is counted, and every verb keeps both."""

import zipfile
from collections import Counter
from pathlib import Path

import pytest
from support.golden import picture
from support.shards import tar_of, tfrecord_of, zip_of

import tlbatch
from tlbatch.commands.training_set import find_labelled
from tlbatch.config import TrainConfig


@pytest.fixture
def archives(tmp_path) -> Path:
    """A zip, a tar in which a name repeats, a TFRecord of TFDS, and a loose image."""
    folder = tmp_path / "store"
    folder.mkdir()
    torn = {
        "images/0.png": picture(0),
        "images/1.png": b"\x89PNG\r\n\x1a\nbroken",
        "images/2.png": picture(2),
        "images/0.txt": b"x",
    }
    (folder / "a.zip").write_bytes(zip_of({**torn, "__MACOSX/images/._0.png": b"\0\5\x16\7"}, zipfile.ZIP_STORED))
    samples = tar_of({"x.png": picture(3), "x.seg.png": picture(4)}), tar_of({"x.png": picture(5), "x.json": b"{}"})
    first = samples[0].rstrip(b"\0")
    (folder / "b.tar").write_bytes(first + bytes(-len(first) % 512) + samples[1])
    (folder / "c-train.tfrecord-00000-of-00001").write_bytes(tfrecord_of({"t/1.png": picture(6), "t/2.png": picture(7)}))
    (folder / "d.png").write_bytes(picture(8))
    return folder


SKIPPED = {"sidecars": 2, "excluded": 1}
GOOD = [
    *(("images/0.png", 0), ("images/2.png", 2), ("x.png", 0), ("x.png", 1)),
    *(("t/1.png", 0), ("t/2.png", 1), ("d.png", 0)),
]


def rows(output: Path) -> list[tuple[str, int]]:
    """The name and the place of each image of the table."""
    table = tlbatch.read_predictions(str(output)).sort_values("uri", kind="stable")
    assert not table.duplicated(["uri", "index"]).any()
    return list(zip(table["key"], table["index"], strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("plan", ["fused", "split"])
def test_places_and_counts_stay_through_every_verb(archives, tiny_bundles, tmp_path, plan, ray_here):
    settings = {"images": str(archives), "bundle": tiny_bundles["a"], "exclude": "*.seg.png", "features": True, "plan": plan}
    output = tmp_path / "out"
    report = tlbatch.classify(output=str(output), incremental=True, **settings)
    assert (report["listed"], report["predicted"], report["failed"]) == (8, 7, 1)
    assert SKIPPED.items() <= report["skipped_in_shards"].items()
    assert sum(report["skipped_in_shards"].values()) == 4
    assert rows(output) == GOOD
    (failed,) = tlbatch.read_errors(str(output)).to_dict("records")
    assert (failed["key"], failed["index"]) == ("images/1.png", 1)

    (archives / "e.zip").write_bytes(zip_of({"e.png": picture(9), "e.xml": b""}))
    report = tlbatch.classify(output=str(output), incremental=True, **settings)
    assert (report["listed"], report["skipped_in_shards"]) == (1, {"sidecars": 1})
    with_more = [*GOOD, ("e.png", 0)]
    assert Counter(rows(output)) == Counter(with_more)
    tlbatch.rescore(features=str(output), bundle=tiny_bundles["b"], output=str(tmp_path / "rescored"))
    assert Counter(rows(tmp_path / "rescored")) == Counter(with_more)
    tlbatch.compact(output=str(output))
    assert Counter(rows(output)) == Counter(with_more)
    for one in (output, tmp_path / "rescored"):
        assert tlbatch.verify(str(one))["ok"]
        (failed,) = tlbatch.read_errors(str(one)).to_dict("records")
        assert (failed["key"], failed["index"]) == ("images/1.png", 1)


def test_the_extension_of_a_sample_is_chosen(archives, tiny_url, tmp_path, ray_here):
    tlbatch.classify(images=str(archives / "b.tar"), bundle=tiny_url, output=str(tmp_path / "out"), image_field="seg.png")
    assert rows(tmp_path / "out") == [("x.seg.png", 0)]
    (archives / "no-suffix").write_bytes((archives / "a.zip").read_bytes())
    report = tlbatch.classify(images=str(archives / "no-suffix"), bundle=tiny_url, output=str(tmp_path / "told"), format="zip")
    assert (report["predicted"], report["failed"]) == (2, 1)


def test_class_folders_are_trained_on_without_the_archive_they_came_in(tmp_path):
    contents = {f"{label}/{number}.png": picture(3 * number + place) for place, label in enumerate("ab") for number in range(6)}
    for name, data in contents.items():
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).write_bytes(data)
    (tmp_path / "store" / "all.zip").write_bytes(zip_of(contents))
    found = find_labelled(TrainConfig(images=str(tmp_path / "store"), bundle=str(tmp_path / "bundle")), None)
    assert sorted(found.listing.manifest["key"].to_pylist()) == sorted(contents)
    assert {row.key for row in found.labels.rows} == set(contents)
