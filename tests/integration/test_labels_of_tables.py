"""Two images of one name, in a list and in two shards: labels, corrections and measures belong to one image each."""

import csv
import io
import tarfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from support.pictures import COLORS, encoded, noisy, write_store

import tlbatch
from tlbatch.errors import ConfigError, LabelsError

pytestmark = pytest.mark.usefixtures("ray_here")


def write_tar(path: Path, color: str, count: int, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = encoded(noisy(COLORS[color], first + number))
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def twins(tiny_url, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """A table of six red and six green images with the same six keys, and of two shards with the same members."""
    folder = tmp_path_factory.mktemp("twins")
    store = write_store(folder / "store", 6)
    paths = [path for color in ("red", "green") for path in sorted((store / color).iterdir())]
    write_tar(folder / "a.tar", "red", 4, 100)
    write_tar(folder / "b.tar", "blue", 4, 200)
    rows = [*((str(path), path.name) for path in paths), *((str(folder / name), name) for name in ("a.tar", "b.tar"))]
    pd.DataFrame(rows, columns=["uri", "key"]).to_csv(folder / "list.csv", index=False)
    tlbatch.classify(images=str(folder / "list.csv"), bundle=tiny_url, output=str(folder / "out"), features=True)
    return folder / "out", tlbatch.read_predictions(str(folder / "out"), ["uri", "key", "label"])


def split_of(bundle: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((bundle / "split.csv").read_text().splitlines()))


@pytest.mark.sampled(1)
def test_labels_by_address_train_their_own_image(twins, tmp_path):
    output, table = twins
    loose = table[~table["uri"].str.endswith(".tar")]
    loose[["uri", "label"]].to_csv(tmp_path / "l.csv", index=False)
    tlbatch.train(features=str(output), labels=str(tmp_path / "l.csv"), bundle=str(tmp_path / "b"), epochs=2)
    rows = split_of(tmp_path / "b")
    assert Counter(row["label"] for row in rows) == {"red": 6, "green": 6}
    assert {(row["uri"], row["key"], row["label"]) for row in rows} == set(loose.itertuples(index=False, name=None))
    assert tlbatch.evaluate(str(output), str(tmp_path / "b" / "split.csv"))["images"] == 12


@pytest.mark.parametrize("way", ["train", "evaluate", "report", "review"])
def test_a_key_of_two_images_is_refused_everywhere(twins, tmp_path, way):
    output, table = twins
    table[["key", "label"]].drop_duplicates("key").to_csv(tmp_path / "l.csv", index=False)
    labels = str(tmp_path / "l.csv")
    use = {
        "train": lambda: tlbatch.train(features=str(output), labels=labels, bundle=str(tmp_path / "b")),
        "evaluate": lambda: tlbatch.evaluate(str(output), labels),
        "report": lambda: tlbatch.load_report(str(output), labels=labels),
        "review": lambda: tlbatch.review(output=str(output), labels=labels, to=str(tmp_path / "r")),
    }
    with pytest.raises(LabelsError, match=r"10 names in .*l.csv fit several images each; '0000.jpg' fits 2 images"):
        use[way]()


def test_labels_by_both_names_reach_one_shard(twins, tmp_path):
    output, table = twins
    members = table[table["uri"].str.endswith(".tar")]
    members.to_csv(tmp_path / "l.csv", index=False)
    result = tlbatch.evaluate(str(output), str(tmp_path / "l.csv"))
    assert (result["accuracy"], result["images"], result["missing"]) == (1.0, 8, 0)


@pytest.mark.sampled(1)
def test_labels_for_one_of_two_shards_are_refused_or_said_by_both_names(twins, tmp_path, weights):
    """From the images, where only reading the shards shows their members."""
    output, table = twins
    settings = {"images": str(output.parent / "list.csv"), "size": 32, "weights": "random", "epochs": 1}
    table = table[table["key"].str.len() == 5]
    table[["key", "label"]].drop_duplicates("key").to_csv(tmp_path / "l.csv", index=False)
    with pytest.raises(LabelsError, match=r"4 names in .* fit several images each"):
        tlbatch.train(**settings, labels=str(tmp_path / "l.csv"), bundle=str(tmp_path / "b"))
    table.to_csv(tmp_path / "l.csv", index=False)
    tlbatch.train(**settings, labels=str(tmp_path / "l.csv"), bundle=str(tmp_path / "b"))
    assert {tuple(row[name] for name in ("uri", "key", "label")) for row in split_of(tmp_path / "b")} == set(
        table.itertuples(index=False, name=None)
    )


def test_what_review_writes_goes_with_labels_by_address(twins, tmp_path):
    output, table = twins
    loose = table[~table["uri"].str.endswith(".tar")]
    loose[["uri", "label"]].iloc[1:].to_csv(tmp_path / "l.csv", index=False)
    files = [str(tmp_path / "l.csv"), str(tmp_path / "r" / "labels.csv")]
    result = tlbatch.review(output=str(output), budget=4, labels=files[0], to=str(tmp_path / "r"), near_duplicate=1.0)
    sheet = pd.read_csv(result["labels"], dtype=str)
    assert list(sheet.columns[:3]) == ["uri", "key", "label"]
    assert not set(sheet["uri"]) & set(loose["uri"].iloc[1:])
    assert "withdrawn" in Path(result["sheet"]).read_text()
    sheet.assign(label=sheet["suggested"]).to_csv(files[1], index=False)
    trained = tlbatch.train(features=str(output), labels=files, bundle=str(tmp_path / "b"), epochs=2)
    assert sum(trained["images"].values()) == 11 + 4


def test_what_a_reader_of_labels_would_not_expect_is_said(twins, tmp_path, caplog):
    """A label taken back, a class spelled in two ways, a part without a class, a label that the model does not have."""
    output, table = twins
    loose = table[~table["uri"].str.endswith(".tar")].sort_values(["label", "uri"])  # six green, six red
    parts = ["train"] * 4 + ["validation", "train"] + ["train", "train", "train", "validation", "test", "train"]
    spelled = loose.assign(label=["Red" if number in (7, 8, 11) else name for number, name in enumerate(loose["label"])])
    spelled.assign(split=parts).to_csv(tmp_path / "l.csv", index=False)
    loose.iloc[6:7].assign(label="withdrawn").to_csv(tmp_path / "fix.csv", index=False)
    files = [str(tmp_path / "l.csv"), str(tmp_path / "fix.csv")]
    with pytest.raises(LabelsError, match="The class 'red' has 2 images"):
        tlbatch.train(features=str(output), labels=files, bundle=str(tmp_path / "b"), epochs=2)
    assert "1 images are left out of" in caplog.text
    assert "the classes 'Red' (3 images) and 'red' (2 images), which differ only in case" in caplog.text
    caplog.clear()
    tlbatch.train(features=str(output), labels=files[0], bundle=str(tmp_path / "b"), epochs=2)
    assert "2 classes have no image in the part test: Red, green" in caplog.text
    caplog.clear()
    loose.assign(label="One").to_csv(tmp_path / "l.csv", index=False)
    assert tlbatch.evaluate(str(output), str(tmp_path / "l.csv"))["accuracy"] == 0
    assert "among its best ones: 'One' (12 images); the table has" in caplog.text


@pytest.mark.sampled(1)
def test_what_training_does_not_use_is_said(tmp_path, caplog):
    store = write_store(tmp_path / "store", 3)
    (store / "sheep").mkdir()
    (store / "notes.txt").write_text("none")
    for number in range(2):
        (store / f"{number}.jpg").write_bytes(encoded(noisy(COLORS["red"], 300 + number)))
    result = tlbatch.train(images=str(store), size=32, weights="random", epochs=1, bundle=str(tmp_path / "b"))
    assert (result["labels"], result["unlabelled"], result["skipped_by_kind"]) == (["blue", "green", "red"], 2, {".txt": 1})
    assert "2 images or shards of" in caplog.text
    assert "1 folders of" in caplog.text
    assert "have no image and do not become classes: sheep" in caplog.text


def test_a_setting_of_images_does_nothing_with_features(tmp_path):
    with pytest.raises(ConfigError, match="exclude: with features no image is read"):
        tlbatch.train(features=str(tmp_path), exclude="*.png", bundle=str(tmp_path / "b"))


def test_names_without_folder_and_suffix_train_and_measure(tiny_url, tmp_path):
    store = write_store(tmp_path / "store", 6)
    tlbatch.classify(images=str(store), bundle=tiny_url, output=str(tmp_path / "out"), features=True)
    paths = sorted(path for path in store.rglob("*") if path.is_file())
    rows = [(f"pets/{path.parent.name}/{path.stem}", path.parent.name) for path in paths]
    pd.DataFrame(rows, columns=["id", "breed"]).to_csv(tmp_path / "labels.csv", index=False)
    given = {"labels": str(tmp_path / "labels.csv"), "labels_columns": "id,breed"}
    trained = tlbatch.train(features=str(tmp_path / "out"), bundle=str(tmp_path / "bundle"), **given)
    assert sum(trained["images"].values()) == len(rows)
    for columns in ("id,breed", ["id", "breed"]):
        measured = tlbatch.evaluate(output=str(tmp_path / "out"), labels=given["labels"], labels_columns=columns)
        assert (measured["images"], measured["missing"]) == (len(rows), 0)
