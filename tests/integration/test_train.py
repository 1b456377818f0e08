"""Labelled images become a bundle, and the base is the same network before and after."""

import csv
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from support.pictures import encoded, noisy, write_store

import tlbatch
from tlbatch.commands.splits import split_classes
from tlbatch.errors import LabelsError, TlbatchError
from tlbatch.images.label_files import read_labels
from tlbatch.model.bases import BASES, build_network, weights_digest
from tlbatch.model.bundle import load_bundle
from tlbatch.schema import sha256
from tlbatch.storage.resolve import resolve


def test_the_base_is_bit_identical_after_training(trained, weights):
    model = keras.saving.load_model(Path(trained["bundle"], "model.keras"), compile=False)
    before = build_network(BASES["MobileNetV2"], 96, Path(weights).read_bytes())
    inside = next(layer for layer in model.layers if isinstance(layer, keras.Model) and len(layer.layers) > 100)
    recorded = load_bundle(trained["bundle"]).facts["base"]["weights_digest"]
    assert weights_digest(inside) == weights_digest(before) == recorded


def test_a_bundle_holds_what_the_design_says(trained):
    bundle = load_bundle(trained["bundle"])
    assert {"model.keras", "head.keras", "openvino/model.xml", "openvino/model.bin", "probes.npz", "card.html"} <= set(
        bundle.facts["files"]
    )
    assert bundle.labels == ["blue", "green", "red"]
    assert bundle.size == (96, 96)
    assert bundle.features_length == 192 + 384 + 576 + 960 + 1280
    assert len(bundle.depths) == 5
    assert bundle.facts["base"]["name"] == "MobileNetV2"
    assert {"keras", "tensorflow"} <= set(bundle.facts["versions"])
    assert bundle.facts["metrics"]["accuracy"] >= 0.9
    assert all(sha256(Path(trained["bundle"], name).read_bytes()) == digest for name, digest in bundle.facts["files"].items())


def test_the_result_says_how_it_went(trained):
    assert trained["images"] == {"train": 39, "validation": 9, "test": 12}
    assert trained["accuracy"] == trained["metrics"]["accuracy"] >= 0.9
    assert trained["failed"] == 0
    assert np.array(trained["metrics"]["confusion"]).sum() == 12


@pytest.mark.sampled(1)
def test_one_split_gives_one_head_which_says_how_good_it_is(store, bundle_url, tmp_path):
    features = str(tmp_path / "features")
    tlbatch.extract(images=str(store), bundle=bundle_url, output=features, report=False)
    first = tlbatch.train(features=features, bundle=str(tmp_path / "first"))
    assert (first["head"], first["epochs"]) == ("convex", None)
    held_out = first["held_out"]
    assert held_out["images"] == first["images"]["train"] + first["images"]["validation"] == 48
    assert held_out["interval"][0] <= held_out["accuracy"] <= held_out["interval"][1]
    assert "48 held-out images" in (tmp_path / "first" / "card.html").read_text()
    known = {"features": features, "labels": str(tmp_path / "first" / "split.csv")}
    others = [tlbatch.train(**known, seed=seed, bundle=str(tmp_path / str(seed))) for seed in (1, 2)]
    heads = [load_bundle(one["bundle"]).probes()["scores"] for one in (first, *others)]
    assert all(np.array_equal(heads[0], scores) for scores in heads[1:])
    by_adam = tlbatch.train(**known, head="sgd", epochs=3, bundle=str(tmp_path / "adam"))
    assert (by_adam["head"], by_adam["epochs"]) == ("sgd", 3)
    assert by_adam["held_out"]["images"] == first["images"]["validation"]


def test_only_the_bundle_is_left(trained):
    assert not Path(trained["bundle"], ".training").exists()


def test_the_split_is_recorded_and_can_be_evaluated(trained):
    rows = list(csv.DictReader(Path(trained["bundle"], "split.csv").read_text().splitlines()))
    assert len(rows) == 60
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_a_split_is_stratified_seeded_and_leaves_no_part_empty():
    classes = np.repeat([0, 1, 2], [100, 10, 3])
    part_of = split_classes(classes, 0.15, 0.2, 7)
    counts = [[int(((part_of == part) & (classes == label)).sum()) for part in range(3)] for label in range(3)]
    assert counts == [[65, 15, 20], [6, 2, 2], [1, 1, 1]]
    assert np.array_equal(part_of, split_classes(classes, 0.15, 0.2, 7))
    assert not np.array_equal(part_of, split_classes(classes, 0.15, 0.2, 8))


@pytest.mark.sampled(1)
def test_training_from_a_labels_file_with_images_that_cannot_be_read(tmp_path, weights, ray_here, caplog):
    store = write_store(tmp_path / "store", 6)
    (store / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    labels = tmp_path / "labels.csv"
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    rows = [{"key": key, "label": f"0{'rgb'.index(key[0]) if key[0] in 'rg' else 2}"} for key in keys]
    pd.DataFrame([*rows, {"key": "nowhere.jpg", "label": "00"}]).to_csv(labels, index=False)
    result = tlbatch.train(
        images=str(store), labels=str(labels), size=64, weights=weights, bundle=str(tmp_path / "b"), epochs=2
    )
    assert result["labels"] == ["00", "01", "02"]  # text, not numbers
    assert result["failed"] == 1
    assert sum(result["images"].values()) == 18
    assert "red/broken.jpg cannot be used for training: truncated" in caplog.text
    assert "1 labels belong to no image" in caplog.text


@pytest.mark.sampled(1)
def test_a_row_that_stands_twice_counts_once(tmp_path, store, weights, ray_here):
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))[::4]
    rows = [f"{key},{key.split('/')[0]}" for key in [*keys, keys[0]]]
    labels = write_csv(tmp_path / "l.csv", "\n".join(["key,label", *rows]) + "\n")
    result = tlbatch.train(images=str(store), labels=labels, size=64, weights=weights, bundle=str(tmp_path / "b"), epochs=1)
    assert sum(result["images"].values()) == len(keys)


@pytest.mark.sampled(1)
def test_one_cannot_train_on_nothing_but_broken_images(tmp_path, weights, ray_here):
    for label in ("a", "b"):
        (tmp_path / "s" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "s" / label / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(LabelsError, match="No labelled image of"):
        tlbatch.train(images=str(tmp_path / "s"), size=64, weights=weights, bundle=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.mark.sampled(1)
def test_a_split_of_the_labels_files_own_is_kept(tmp_path, weights, ray_here):
    """What its author set aside is measured on, and never trained on."""
    store = write_store(tmp_path / "store", 5)
    keys = sorted(str(path.relative_to(store)) for path in store.rglob("*.jpg"))
    parts = ["train", "test", None, "validation", "train"] * 3
    frame = pd.DataFrame({"key": keys, "label": [key.split("/")[0] for key in keys], "split": parts})
    frame.to_csv(tmp_path / "l.csv", index=False)
    settings = {"images": str(store), "labels": str(tmp_path / "l.csv"), "size": 64, "weights": weights, "epochs": 2}
    result = tlbatch.train(**settings, bundle=str(tmp_path / "b"))
    assert result["images"] == {"train": 9, "validation": 3, "test": 3}
    rows = csv.DictReader((tmp_path / "b" / "split.csv").read_text().splitlines())
    assert {row["key"] for row in rows if row["split"] == "test"} == {key for key in keys if key.endswith("0001.jpg")}
    frame.replace("validation", "dev").to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(LabelsError, match="has the split 'dev'; write train, validation or test"):
        tlbatch.train(**settings, bundle=str(tmp_path / "b2"))
    frame.replace("validation", "train").to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(LabelsError, match="no image of 'validation'"):
        tlbatch.train(**settings, bundle=str(tmp_path / "b2"))


@pytest.mark.sampled(1)
def test_a_training_that_was_killed_while_saving_can_be_run_again(tmp_path, store, weights, ray_here):
    (tmp_path / "b" / ".training").mkdir(parents=True)
    (tmp_path / "b" / "model.keras").write_bytes(b"half")
    (tmp_path / "b" / ".head.keras.x.tmp").write_bytes(b"half")
    result = tlbatch.train(images=str(store), size=64, weights=weights, bundle=str(tmp_path / "b"), epochs=1)
    assert load_bundle(result["bundle"]).labels == ["blue", "green", "red"]


def write_csv(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,label\na,b\n", "has no column key (or uri); its columns are name, label"),
        ("key,kind\na,b\n", "has no column label; its columns are key, kind"),
        ("key,label\n", "has no row with a label"),
        ("key,label\na,x\na,y\n", "gives 'a' two labels"),
        ('key,label\n"a,b\nc,d\n', "neither CSV nor Parquet"),
        ("key,label\nnope.jpg,x\n", "No label of"),
        ("key,label\nred/0000.jpg,x\nred/0001.jpg,x\nred/0002.jpg,x\n", "has only the class 'x'"),
        ("key,label\nred/0000.jpg,x\nred/0001.jpg,x\nred/0002.jpg,x\nblue/0000.jpg,y\n", "The class 'y' has 1 image;"),
    ],
)
def test_labels_that_cannot_be_used_are_a_sentence_and_write_nothing(tmp_path, store, weights, text, sentence):
    with pytest.raises(LabelsError) as caught:
        tlbatch.train(
            images=str(store), labels=write_csv(tmp_path / "l.csv", text), weights=weights, bundle=str(tmp_path / "bundle")
        )
    assert sentence in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_labels_may_be_parquet_and_may_name_uris(tmp_path, store):
    frame = pd.DataFrame({"uri": [str(store / "red" / "0000.jpg")], "label": [3], "split": ["test"]})
    frame.to_parquet(tmp_path / "l.parquet")
    labels = read_labels([resolve(str(tmp_path / "l.parquet"))])
    assert labels.rows == ((str(store / "red" / "0000.jpg"), None, "3", "test"),)
    assert labels.of_split("test").rows == labels.rows
    with pytest.raises(LabelsError, match="no images of split 'train'; its splits are test"):
        labels.of_split("train")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"base": "MobileNetV9"}, "there is no 'MobileNetV9' in keras.applications"),
        ({"weights": "/nowhere.h5"}, "weights: there is no file /nowhere.h5"),
        ({"weights": "best"}, "weights: write imagenet, random, or a .h5"),
        ({"images": "/nowhere"}, "The store /nowhere does not exist"),
        ({"labels": "/nowhere.csv"}, "There is no labels file at /nowhere.csv"),
    ],
)
def test_other_mistakes_are_sentences_too(tmp_path, store, weights, settings, sentence):
    given = {"images": str(store), "weights": weights, "bundle": str(tmp_path / "bundle"), **settings}
    with pytest.raises(TlbatchError) as caught:
        tlbatch.train(**given)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "bundle").exists()


def test_a_folder_without_classes_says_what_it_wants(tmp_path, weights):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "1.jpg").write_bytes(encoded(noisy((1, 2, 3), 0)))
    with pytest.raises(LabelsError, match="has no folders named after classes, and no labels file was given"):
        tlbatch.train(images=str(tmp_path / "s"), weights=weights, bundle=str(tmp_path / "bundle"))


def test_a_folder_that_is_no_bundle_is_not_overwritten(tmp_path, store, weights):
    (tmp_path / "precious").write_bytes(b"x")
    with pytest.raises(TlbatchError, match="contains files that do not belong to a bundle"):
        tlbatch.train(images=str(store), weights=weights, bundle=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
