"""Copies of a picture stay in one part; without copies the split is what it was."""

import numpy as np
import pytest

from tlbatch.commands.splits import (
    complete_parts,
    enough_pictures,
    find_copies,
    find_near_copies,
    separate_copies,
    split_classes,
    split_pictures,
    tell_of_near_copies,
)
from tlbatch.commands.training_set import TrainingSet, find_labelled, split_set
from tlbatch.config import TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.labels import names_of


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_copies_have_equal_features(random):
    values = random.random((6, 8)).astype(np.float32)
    values[4] = values[1]
    values[[2, 5]] = 0.0  # says nothing: two black pictures may be different ones
    assert find_copies(values).tolist() == [0, 1, 2, 3, 1, 5]


def test_without_copies_the_split_is_by_class_alone(random):
    classes = random.integers(0, 3, 60)
    values = random.normal(0, 1, (60, 40)).astype(np.float32)
    assert np.array_equal(split_pictures(classes, values, 0.15, 0.2, 7), split_classes(classes, 0.15, 0.2, 7))


@pytest.mark.parametrize("many", [False, True], ids=["one label", "many labels"])
def test_copies_are_in_one_part_and_every_class_in_every_part(random, many):
    classes = np.repeat(np.arange(3), 20)
    pictures = np.where(random.random(60) < 0.4, np.arange(60) // 20 * 20, np.arange(60))
    given = np.eye(3)[classes] if many else classes
    values = random.normal(0, 1, (60, 40)).astype(np.float32)[pictures]
    part_of = split_pictures(given, values + random.normal(0, 0.05, (60, 40)).astype(np.float32), 0.15, 0.2, 0)
    for picture in np.unique(pictures):
        assert len(set(part_of[pictures == picture])) == 1
    assert set(part_of) == {0, 1, 2}


def test_a_group_of_most_images_is_trained_on_and_the_test_part_has_others(random):
    """Of a base with random weights, half of the solar cells are one group of near-copies, and all of it was the test part."""
    classes = np.arange(100) % 2
    values = random.normal(0, 1, (100, 40)).astype(np.float32)
    values[:60] = values[0] + random.normal(0, 0.02, (60, 40))
    for seed in range(20):
        part_of = split_pictures(classes, values, 0.15, 0.2, seed)
        assert set(part_of[:60]) == {0}
        assert [set(part_of[60:][classes[60:] == label]) for label in (0, 1)] == [{0, 1, 2}] * 2
        given = complete_parts(np.zeros(100, np.int64), classes, find_near_copies(values), 0.15, 0.2, seed)
        assert set(given[:60]) == {0}
        assert set(given[60:]) == {0, 1, 2}


def test_a_class_of_three_pictures_has_one_in_each_part_however_many_images_they_have(random):
    classes, pictures = np.repeat([0, 1], 30), np.repeat([0, 10, 20, 30, 40, 50], 10)
    values = random.normal(0, 1, (60, 40)).astype(np.float32)[pictures]
    assert sorted(split_pictures(classes, values, 0.15, 0.2, 0)[::10]) == [0, 0, 1, 1, 2, 2]


def test_a_class_of_too_few_pictures_is_split_all_the_same(caplog):
    values = np.random.default_rng(0).normal(0, 1, (8, 20)).astype(np.float32)[[0, 0, 0, 0, 4, 5, 6, 7]]
    part_of = split_pictures(np.array([0] * 4 + [1] * 4), values, 0.15, 0.2, 0)
    assert set(part_of[:4]) == set(part_of[4:]) == {0, 1, 2}
    assert "fewer than 3 different pictures, so near-copies of them" in caplog.text
    assert "fewer than 3 different pictures, so copies of them" in caplog.text


def test_near_copies_are_one_picture_also_in_a_row(random):
    values = random.normal(0, 1, (40, 60)).astype(np.float32)
    values[7] = values[3] * 1.02 + random.normal(0, 0.05, 60)
    values[21] = values[7] + random.normal(0, 0.05, 60)
    values[30] = values[12]
    values[[33, 34]] = 0.5  # says nothing
    found = find_near_copies(values)
    expected = np.arange(40)
    expected[[7, 21, 30]] = 3, 3, 12
    assert found.tolist() == expected.tolist()


def test_near_copies_in_given_parts_stay_and_are_told_of(caplog):
    tell_of_near_copies(np.array([0, 2, 1]), np.array([0, 0, 2]), list("abc"))
    assert "1 labelled images are nearly the same as pictures in another part (the first: b and a)" in caplog.text


def test_copies_in_given_parts_move_to_the_part_that_is_used_last(caplog):
    part_of, pictures = np.array([0, 1, 2, 0, 0, 1]), np.array([0, 1, 0, 3, 1, 5])
    assert separate_copies(part_of, pictures, list("abcdef")).tolist() == [2, 1, 2, 0, 1, 1]
    assert "2 labelled images are copies of pictures in another part (the first: a, of c)" in caplog.text
    caplog.clear()
    assert separate_copies(part_of, np.arange(6), list("abcdef")).tolist() == part_of.tolist()
    assert not caplog.text


def test_missing_parts_are_drawn_from_training_images(random):
    classes = np.repeat([0, 1], 20)
    given = np.where(random.random(40) < 0.2, 1, 0)
    completed = complete_parts(given, classes, np.arange(40), 0.15, 0.2, 0)
    assert set(completed) == {0, 1, 2}
    assert np.array_equal(completed == 1, given == 1), "what was given stays"
    assert {(2, 0), (2, 1)} <= set(zip(completed.tolist(), classes.tolist(), strict=True))
    whole = np.arange(40) % 3
    assert np.array_equal(complete_parts(whole, classes, np.arange(40), 0.15, 0.2, 0), whole)


def test_missing_parts_are_drawn_by_picture():
    classes, pictures = np.repeat([0, 1], 20), np.arange(40) // 4 * 4
    given = np.where(np.arange(40) == 2, 1, 0)
    completed = complete_parts(given, classes, pictures, 0.15, 0.2, 0)
    assert {(2, 0), (2, 1)} <= set(zip(completed.tolist(), classes.tolist(), strict=True))
    assert all(len(set(completed[pictures == first].tolist())) == 1 for first in np.unique(pictures)[1:])
    assert set(completed[:4]) == {0, 1}, "a picture that is in a given part is not drawn"
    every = np.where(np.arange(40) % 4 == 2, 1, 0)
    torn = complete_parts(every, classes, pictures, 0.15, 0.2, 0)
    assert np.array_equal(torn == 1, every == 1)
    assert {(2, 0), (2, 1)} <= set(zip(torn.tolist(), classes.tolist(), strict=True)), "unless there are no others"


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("train", "test")])
def test_folders_of_parts_give_parts_and_copies_stay_in_one(tmp_path, folders, caplog):
    keys = [f"{folder}/{label}/{number}.jpg" for folder in folders for label in ("cat", "dog") for number in range(4)]
    for key in keys:
        (tmp_path / "s" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / key).write_bytes(b"x")
    config = TrainConfig(images=str(tmp_path / "s"), bundle=str(tmp_path / "b"))
    found = find_labelled(config, None)
    names = names_of(found.listing.manifest)
    labelled = found.labels.of_images(names)
    assert set(labelled.labels.values()) == {("cat",), ("dog",)}
    values = np.random.default_rng(0).normal(0, 1, (len(keys), 20)).astype(np.float32)
    listed = found.listing.manifest["key"].to_pylist()
    values[listed.index("train/cat/0.jpg")] = values[listed.index("test/cat/3.jpg")]  # a copy under another name
    classes = np.array([int("dog" in key) for key in listed])
    features = TrainingSet(tuple(names), values, classes, ("cat", "dog"), labelled.splits, 0, len(listed), values)
    split = split_set(features, config)
    rows = dict(line.split(",")[::2] for line in split.file.decode().splitlines()[1:])
    assert rows["test/cat/3.jpg"] == rows["train/cat/0.jpg"] == "test"
    assert all(rows[key] == "test" for key in listed if key.startswith("test/"))
    assert all(len(split.parts[name].classes) == len(split.names[name]) > 0 for name in ("train", "validation", "test"))
    assert (
        "1 labelled images are copies of pictures in another part (the first: train/cat/0.jpg, of test/cat/3.jpg)"
        in caplog.text
    )


def test_folders_of_parts_without_one_for_training_are_a_sentence(tmp_path):
    for key in (f"{folder}/{label}/{number}.jpg" for folder in ("val", "test") for label in "ab" for number in range(3)):
        (tmp_path / "s" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / key).write_bytes(b"x")
    with pytest.raises(LabelsError, match="are parts of a data set, and none of them is for training"):
        find_labelled(TrainConfig(images=str(tmp_path / "s"), bundle=str(tmp_path / "b")), None)


def test_features_that_are_few_have_no_near_copies(random):
    values = random.normal(0, 1, (300, 2)).astype(np.float32)
    assert find_near_copies(values).tolist() == list(range(300))


@pytest.mark.parametrize(
    ("pictures", "enough"),
    [
        ([0, 1, 2, 3, 4, 5], True),
        ([0, 1, 1, 3, 4, 5], False),  # two pictures of the first class
        ([0, 1, 2, 0, 1, 2], False),  # no picture of the second class is its own
    ],
)
def test_every_class_needs_pictures_of_its_own(pictures, enough):
    assert enough_pictures(np.array([0, 0, 0, 1, 1, 1]), np.array(pictures), 3) is enough


def test_a_class_that_is_one_series_is_in_every_fold_all_the_same(random):
    from tlbatch.commands.fitting import _fold

    values = random.normal(0, 1, (60, 64)).astype(np.float32)
    values[:30] = values[0] + random.normal(0, 0.05, (30, 64))
    folds = _fold(values, np.repeat([0, 1], 30))
    assert np.bincount(folds[:30], minlength=5).tolist() == [6] * 5
    same = _fold(np.repeat(values[:1], 20, axis=0), np.repeat([0, 1], 10))
    assert len(np.unique(same)) == 5
