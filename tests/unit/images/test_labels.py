"""Folders are classes, or parts above classes; a label belongs to one image, by address, by key or by both."""

import unicodedata

import pyarrow as pa
import pytest

from tlbatch.errors import LabelsError
from tlbatch.images.label_files import read_labels
from tlbatch.images.labels import LabelRow, Labels, labels_from_folders
from tlbatch.storage.resolve import resolve


def images(*keys: str, uri: str = "s/{}") -> list[tuple[str, str]]:
    return [(uri.format(key), key) for key in keys]


def files_of(folder, *texts: str, many: bool = False) -> Labels:
    """Labels files with these rows; the first row is the header."""
    for number, text in enumerate(texts):
        (folder / f"{number}.csv").write_text(text)
    return read_labels([resolve(str(folder / f"{number}.csv")) for number in range(len(texts))], many=many)


def labels_of(labels: Labels, *keys: str) -> dict[str, tuple[str, ...]]:
    return {key: names for (_, key), names in labels.of_images(images(*keys)).labels.items()}


def test_folders_are_classes():
    found = images("cat/1.jpg", "dog/train/2.jpg", "3.jpg", "train/4.jpg")
    labels = labels_from_folders(found, "s")
    assert [(row.key, row.label) for row in labels.rows] == [
        ("cat/1.jpg", "cat"),
        ("dog/train/2.jpg", "dog"),
        ("train/4.jpg", "train"),
    ]
    assert not labels.has_splits
    with pytest.raises(LabelsError, match="has no folders named after classes"):
        labels_from_folders(images("3.jpg"), "s")


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        (("train", "val", "test"), ("train", "validation", "test")),
        (("Training", "valid", "testing"), ("train", "validation", "test")),
        (("training_set", "test_set"), ("train", "test")),
        (("TrainData", "eval-images", "testset"), ("train", "validation", "test")),
        (("train", "dev"), ("train", "validation")),
        (("train",), (None,)),
    ],
)
def test_folders_of_parts_are_no_classes(folders, parts, caplog):
    labels = labels_from_folders(images(*(f"{part}/{label}/a/1.jpg" for part in folders for label in ("cat", "dog"))), "s")
    assert {row.label for row in labels.rows} == {"cat", "dog"}
    assert [row.split for row in labels.rows] == [part for part in parts for _ in range(2)]
    assert "are taken as parts of the data set, and the folders below them as the classes: cat, dog" in caplog.text


def test_images_of_a_part_without_a_class_are_left_out_or_refused(caplog):
    labels = labels_from_folders(images("train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg", "test/2.jpg"), "s")
    assert len(labels.rows) == 2
    assert "2 images lie in no class and are left out" in caplog.text
    with pytest.raises(LabelsError, match="test and train of s look like the parts of a data set and not like classes"):
        labels_from_folders(images("train/1.jpg", "test/1.jpg"), "s")


def test_names_match_in_either_unicode_form():
    composed, decomposed = (unicodedata.normalize(form, "Müller.jpg") for form in ("NFC", "NFD"))
    for ours, theirs in ((composed, decomposed), (decomposed, composed)):
        labels = Labels(((LabelRow(None, ours, "x"), LabelRow(None, "a.jpg", "y"), LabelRow(None, "gone.jpg", "z")),))
        assert theirs in labels.keys.to_pylist()
        assert labels_of(labels, theirs, "a.jpg") == {theirs: ("x",), "a.jpg": ("y",)}
    dotted = Labels(((LabelRow(None, f"./{composed}", "x"), LabelRow(None, "b.jpg", "y")),))
    assert labels_of(dotted, decomposed, "./b.jpg") == {decomposed: ("x",), "./b.jpg": ("y",)}
    both = Labels(((LabelRow(None, composed, "x"), LabelRow(None, decomposed, "y")),))
    assert labels_of(both, composed, decomposed) == {composed: ("x",), decomposed: ("y",)}


def test_of_two_files_the_later_one_counts_and_the_part_of_the_earlier_one_stays(tmp_path):
    labels = files_of(tmp_path, "key,label,split\na,cat,train\nb,cat,test\n", "key,label\nb,dog\nc,dog\n")
    found = labels.of_images(images("a", "b", "c"))
    assert list(found.labels.values()) == [("cat",), ("dog",), ("dog",)]
    assert found.splits == {("s/a", "a"): "train", ("s/b", "b"): "test"}
    moved = files_of(tmp_path, "key,label,split\na,cat,train\nb,cat,test\n", "key,label,split\nb,dog,train\n")
    assert moved.of_images(images("a", "b")).moved == 1


def test_files_by_address_and_by_key_go_together(tmp_path):
    labels = files_of(tmp_path, "uri,label\ns/a,cat\ns/b,cat\n", "key,label\nb,dog\n", "uri,key,label\ns/c,c,dog\ns/x,c,cat\n")
    assert labels_of(labels, "a", "b", "c") == {"a": ("cat",), "b": ("dog",), "c": ("dog",)}
    assert labels.of_images(images("a", "b", "c")).missing == {"'c' of 's/x'": "cat"}


def test_a_label_by_key_that_fits_two_images_is_refused(tmp_path):
    twins = [*images("a.jpg", "b.jpg", uri="cats/{}"), *images("a.jpg", "c.jpg", uri="dogs/{}")]
    labels = files_of(tmp_path, "key,label\na.jpg,cat\nb.jpg,cat\n")
    with pytest.raises(
        LabelsError, match=r"1 names in .* fit several images each; 'a.jpg' fits 2 images: in cats/a.jpg and dogs"
    ):
        labels.of_images(twins)
    by_both = files_of(tmp_path, "uri,key,label\ncats/a.jpg,a.jpg,cat\ndogs/a.jpg,a.jpg,dog\n")
    assert by_both.of_images(twins).labels == {("cats/a.jpg", "a.jpg"): ("cat",), ("dogs/a.jpg", "a.jpg"): ("dog",)}
    shard = images("1.jpg", "2.jpg", uri="a.tar")
    with pytest.raises(LabelsError, match=r"'a.tar' fits 2 images: in a.tar"):
        files_of(tmp_path, "uri,label\na.tar,cat\n").of_images(shard)
    with pytest.raises(LabelsError, match="cannot be told apart"):
        files_of(tmp_path, "uri,key,label\na.tar,1.jpg,cat\n").of_images([*shard, ("a.tar", "1.jpg")])


def test_one_file_gives_one_label_by_whatever_name(tmp_path):
    with pytest.raises(LabelsError, match="gives 'a' two labels"):
        files_of(tmp_path, "key,label\na,cat\na,dog\n")
    with pytest.raises(LabelsError, match="gives 'a' two labels"):
        files_of(tmp_path, "uri,key,label\ns/a,,cat\n,a,dog\n").of_images(images("a"))
    assert labels_of(files_of(tmp_path, "key,label\na,cat\na,dog\nb,-\n", many=True), "a", "b") == {
        "a": ("cat", "dog"),
        "b": (),
    }


@pytest.mark.parametrize("word", ["withdrawn", " Withdrawn ", "-", "- "])
def test_a_label_can_be_taken_back(tmp_path, word):
    labels = files_of(tmp_path, "key,label\na,cat\nb,cat\n", f"key,label\na,{word}\n")
    assert labels_of(labels, "a", "b") == {"b": ("cat",)}
    assert labels.of_images(images("a", "b")).withdrawn == {("s/a", "a")}
    again = files_of(tmp_path, "key,label\na,cat\n", f"key,label\na,{word}\n", "key,label\na,dog\n")
    assert labels_of(again, "a") == {"a": ("dog",)}


def test_an_empty_cell_changes_nothing_and_is_counted(tmp_path):
    labels = files_of(tmp_path, "key,label\na,cat\n", "key,label\na,\nb,\nc,dog\n")
    found = labels.of_images(images("a", "b", "c"))
    assert [key for _, key in found.labels] == ["a", "c"]
    assert found.unanswered == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("key,label,label\na,cat,cat\n", "has the column label twice"),
        ("key,key,label\na,a,cat\n", "has the column key twice"),
        ("key,label\na,cat,dog\n", "neither CSV nor Parquet: row 1 has 3 columns instead of 2"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(tmp_path, text, sentence):
    with pytest.raises(LabelsError, match=sentence):
        files_of(tmp_path, text)


@pytest.mark.parametrize(
    "data",
    [
        "key, label\nä.jpg, cat\n".encode(),
        "\ufeffkey;label\r\nä.jpg;cat\r\n".encode(),
        "key\tlabel\nä.jpg\tcat\n".encode("utf-16"),
        'id,breed,note\n"ä.jpg",cat,"a\nb"\n'.encode("cp1252"),
        "Filename;Class\nä.jpg;cat\n".encode(),
    ],
)
def test_files_as_spreadsheets_and_others_write_them(tmp_path, data):
    (tmp_path / "l.csv").write_bytes(data)
    assert labels_of(read_labels([resolve(str(tmp_path / "l.csv"))]), "ä.jpg") == {"ä.jpg": ("cat",)}


def test_a_label_without_an_image_is_left_out_aloud(tmp_path, caplog):
    assert labels_of(files_of(tmp_path, "key,label\n,cat\na,dog\n"), "a") == {"a": ("dog",)}
    assert "1 rows of" in caplog.text
    assert "have a label and no name of an image" in caplog.text


def test_a_column_is_taken_by_another_name_only_without_doubt(tmp_path, caplog):
    with pytest.raises(LabelsError, match="has no column key"):
        files_of(tmp_path, "file,path,label\na,b,cat\n")
    assert labels_of(files_of(tmp_path, "key,file,label,class\na,b,cat,dog\n"), "a") == {"a": ("cat",)}
    assert labels_of(files_of(tmp_path, "file,label\na,cat\n"), "a") == {"a": ("cat",)}
    assert "The column file of" in caplog.text


def test_a_column_that_nobody_reads_may_stand_twice(tmp_path):
    assert labels_of(files_of(tmp_path, "key,label,note,note\na,cat,x,y\n"), "a") == {"a": ("cat",)}


def test_columns_may_be_named_by_the_user(tmp_path):
    (tmp_path / "l.csv").write_text("id;label;breed\n1;x;pug\n2;y;beagle\n")
    labels = read_labels([resolve(str(tmp_path / "l.csv"))], columns=["id", "breed"])
    assert [(row.key, row.label) for row in labels.rows] == [("1", "pug"), ("2", "beagle")]
    for wrong in (["id", "race"], ["id"], ["id", "id"], ["id", "label", "breed"]):
        with pytest.raises(LabelsError, match="labels_columns: write the column of names and the column of labels"):
            read_labels([resolve(str(tmp_path / "l.csv"))], columns=wrong)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["1", "2"], ["1.jpg", "2.jpg"]),
        (["pets/a/1.jpg", "pets/b/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["1.jpg", "2.jpg"], ["train/1.jpg", "train/x/2.jpg"]),
        (["pets/1", "pets/2.5"], ["1.jpg", "2.5.png"]),
        (["x/1", "x/2"], ["y/x/1.jpg", "y/x/2.jpg"]),
    ],
)
def test_names_fit_keys_but_for_the_suffix_and_folders_before_them(names, keys, tmp_path, caplog):
    labels = files_of(tmp_path, "key,label\n" + "".join(f"{name},{number}\n" for number, name in enumerate(names)))
    assert labels_of(labels.fitted_to(pa.array([*keys, "other.jpg"])), *keys) == {key: (str(n),) for n, key in enumerate(keys)}
    assert f"the first: {names[0]} is {keys[0]}" in caplog.text


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["1"], ["1.jpg", "1.png"]),  # which of both?
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.jpg"], ["b/1.jpg"]),
        (["a/1.jpg", "b/1.jpg"], ["1.jpg"]),  # which of both?
        (["11.jpg"], ["1.jpg"]),
        (["a.jpg", "1.jpg"], ["a.jpg", "x/1.jpg"]),  # one name is a key as it stands, so all are meant to be
    ],
)
def test_names_that_may_mean_another_image_are_left_alone(names, keys, tmp_path, caplog):
    labels = files_of(tmp_path, "key,label\n" + "".join(f"{name},x\n" for name in names))
    assert labels.fitted_to(pa.array(keys)) is labels
    assert not caplog.text
