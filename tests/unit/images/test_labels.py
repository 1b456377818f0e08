"""Folders are classes, or parts above classes; names match in either Unicode form."""

import unicodedata

import pytest

from tlbatch.errors import LabelsError
from tlbatch.images.labels import Labels, labels_from_folders, with_names_of


def test_folders_are_classes():
    labels = labels_from_folders(["cat/1.jpg", "dog/train/2.jpg", "3.jpg", "train/4.jpg"], "s")
    assert labels.pairs == (("cat/1.jpg", "cat"), ("dog/train/2.jpg", "dog"), ("train/4.jpg", "train"))
    assert labels.splits is None
    with pytest.raises(LabelsError, match="has no folders named after classes"):
        labels_from_folders(["3.jpg"], "s")


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        (("train", "val", "test"), ("train", "validation", "test")),
        (("Training", "valid", "testing"), ("train", "validation", "test")),
        (("train", "dev"), ("train", "validation")),
        (("train",), None),
    ],
)
def test_folders_of_parts_are_no_classes(folders, parts, caplog):
    labels = labels_from_folders([f"{folder}/{label}/a/1.jpg" for folder in folders for label in ("cat", "dog")], "s")
    assert {label for _, label in labels.pairs} == {"cat", "dog"}
    assert labels.splits == (parts and tuple(part for part in parts for _ in range(2)))
    assert "are taken as parts of the data set, and the folders below them as the classes: cat, dog" in caplog.text


def test_images_of_a_part_without_a_class_are_left_out_or_refused(caplog):
    labels = labels_from_folders(["train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg", "test/2.jpg"], "s")
    assert len(labels.pairs) == 2
    assert "2 images lie in no class and are left out" in caplog.text
    with pytest.raises(LabelsError, match="test and train of s look like the parts of a data set and not like classes"):
        labels_from_folders(["train/1.jpg", "test/1.jpg"], "s")


def test_names_match_in_either_unicode_form():
    composed, decomposed = (unicodedata.normalize(form, "Müller.jpg") for form in ("NFC", "NFD"))
    for ours, theirs in ((composed, decomposed), (decomposed, composed)):
        labels = with_names_of([theirs, "a.jpg"], Labels("key", ((ours, "x"), ("a.jpg", "y"), ("gone.jpg", "z"))))
        assert labels.pairs == ((theirs, "x"), ("a.jpg", "y"), ("gone.jpg", "z"))
    both = Labels("key", ((composed, "x"), (decomposed, "y")))
    assert with_names_of([composed, decomposed], both) is both
