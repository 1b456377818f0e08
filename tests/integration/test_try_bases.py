"""Several bases are tried on the labelled images, and the most accurate one that is fast enough becomes the bundle."""

from pathlib import Path

import pytest

import tlbatch
from tlbatch.commands.try_bases import candidates
from tlbatch.config import TrainConfig
from tlbatch.errors import ConfigError, UsageError
from tlbatch.model.bundle import load_bundle


@pytest.mark.sampled(1)
def test_the_most_accurate_base_is_kept_and_all_are_reported(store, weights, ray_here, tmp_path):
    entries = [f"MobileNetV2@96={weights}", "MobileNet@32=random", f"MobileNetV2@32={weights}"]
    found = tlbatch.train(images=str(store), try_bases=entries, budget="1h", bundle=str(tmp_path / "b"))
    tried = found["tried"]
    assert [(one["base"], one["size"]) for one in tried] == [("MobileNetV2", 96), ("MobileNet", 32), ("MobileNetV2", 32)]
    best = max(tried, key=lambda one: one["accuracy"])
    assert [one["chosen"] for one in tried] == [one is best for one in tried]
    bundle = load_bundle(found["bundle"])
    assert (bundle.facts["base"]["name"], bundle.size[0]) == (best["base"], best["size"])
    assert best["accuracy"] == found["held_out"]["accuracy"]
    assert all(one["megabytes"] > 1 and one["images_per_second"] > 0 for one in tried)
    assert found["left_out"] == []
    assert "Bases that were tried" in Path(found["bundle"], "card.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


@pytest.mark.sampled(1)
def test_no_base_is_begun_that_the_budget_does_not_allow(store, weights, ray_here, tmp_path):
    entries = f"MobileNetV2@32={weights},MobileNet@32=random"
    found = tlbatch.train(images=str(store), try_bases=entries, budget="1s", bundle=str(tmp_path / "b"))
    assert [one["base"] for one in found["tried"]] == ["MobileNetV2"], "the first one always runs"
    assert found["left_out"] == ["MobileNet@32"]
    with pytest.raises(ConfigError, match=r"no base reaches 1,000,000 images a second here: MobileNet at 32 pixels"):
        tlbatch.train(images=str(store), try_bases="MobileNet@32=random", min_speed=1e6, bundle=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"try_bases": "MobileNet V2"}, "try_bases: write NAME"),
        ({"try_bases": "MobileNetV9@32"}, "did you mean 'MobileNetV2'"),
        ({"try_bases": "VGG16@5"}, "a size is at least 32; found 'VGG16@5'"),
        ({"try_bases": "VGG16=/nowhere.h5"}, "there is no file"),
        ({"try_bases": "VGG16", "base": "VGG16"}, "base: with try_bases every base has its own"),
        ({"try_bases": "VGG16", "size": 32}, "size: with try_bases every base has its own"),
        ({"try_bases": "VGG16", "budget": "soon"}, "budget"),
        ({"budget": "10m"}, "budget: without try_bases this setting does nothing"),
        ({"min_speed": 5}, "min_speed: without try_bases this setting does nothing"),
    ],
)
def test_mistakes_are_told_before_any_image_is_read(settings, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        tlbatch.train(images="/no/images", bundle=str(tmp_path / "b"), **settings)
    assert not (tmp_path / "b").exists()


def test_entries_keep_the_other_settings():
    config = TrainConfig(images="i", bundle="b", weights="random", seed=4, try_bases="VGG16@64,ResNet50")
    small, usual = candidates(config)
    assert (small.base, small.size, usual.base, usual.size) == ("VGG16", 64, "ResNet50", None)
    assert {(one.weights, one.seed, one.try_bases) for one in (small, usual)} == {("random", 4, ())}
