"""How numbers become pixels is recorded in the bundle, and training, extraction and classification follow it."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import deep
from support.pictures import encoded
from support.tiny import tiny_base, tiny_bundle

import tlbatch
from tlbatch.config import ReportConfig, TrainConfig
from tlbatch.errors import ConfigError, OutputError
from tlbatch.model.bundle import load_bundle
from tlbatch.output.run import read_table_runs
from tlbatch.report.run_report import write_report
from tlbatch.report.thumbnails import load_thumbnails
from tlbatch.schema import UNRECORDED_RULES, PixelRules
from tlbatch.storage.resolve import resolve


@pytest.fixture
def images(tmp_path) -> Path:
    """Blue as 8 bits, as 10 and 14 bits in 16, and as numbers of a wide colour space."""
    folder = tmp_path / "images"
    folder.mkdir()
    blue = np.full((40, 40, 3), (20, 40, 240), np.uint64)
    plain = Image.fromarray(blue.astype(np.uint8))
    (folder / "eight.png").write_bytes(encoded(plain, "PNG"))
    (folder / "ten.tif").write_bytes(deep.tiff(blue * 1023 // 255, 16, 2))
    (folder / "fourteen.png").write_bytes(deep.png((blue * 16_383 // 255).astype(np.uint16)))
    (folder / "wide.png").write_bytes(encoded(plain, "PNG", icc_profile=deep.WIDE))
    return folder


def scores(images: Path, output: Path, rules: PixelRules) -> tuple[dict[str, float], dict]:
    bundle = tiny_bundle(output.with_suffix(".bundle"), frozen=replace(tiny_base(), rules=rules))
    report = tlbatch.classify(images=str(images), bundle=bundle.location.url, output=str(output))
    table = tlbatch.read_predictions(str(output))
    assert report["failed"] == 0
    return dict(zip(table["key"], table["score"], strict=True)), report


@pytest.mark.sampled(1)
def test_a_run_follows_the_rules_of_its_bundle_and_says_how_it_scaled(images, tmp_path, ray_here):
    auto, report = scores(images, tmp_path / "auto", PixelRules())
    assert auto["ten.tif"] == pytest.approx(auto["eight.png"], abs=0.02)
    assert report["white_levels"] == {"1023": 1, "65535": 1}
    page = Path(write_report(ReportConfig(output=report["output"]))["report"]).read_text()
    assert "Images of more than 8 bits: 1 with 1,023 as white, 1 with 65,535 as white." in page

    told, report = scores(images, tmp_path / "told", PixelRules(16_383))
    assert told["fourteen.png"] == pytest.approx(told["eight.png"], abs=0.02)
    assert abs(auto["fourteen.png"] - told["fourteen.png"]) > 0.02
    assert report["white_levels"] == {"16383": 2}
    name = (str(images / "fourteen.png"), "fourteen.png")
    shown = load_thumbnails(read_table_runs(resolve(report["output"])), [name], {}, side=32)[name]
    with Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))) as small:
        assert np.asarray(small)[..., 2].min() > 200, "the report shows what the model was given"

    old, _ = scores(images, tmp_path / "old", UNRECORDED_RULES)
    assert old["wide.png"] == old["eight.png"], "a bundle without recorded rules ignores profiles"
    assert auto["wide.png"] != auto["eight.png"]


def test_a_bundle_without_rules_keeps_its_digests(tmp_path):
    old = replace(tiny_base(), rules=UNRECORDED_RULES)
    assert set(old.facts["input"]) == {"size", "resize", "interpolation", "color"}
    assert old.digest != tiny_base().digest
    assert load_bundle(tiny_bundle(tmp_path / "old", frozen=old).location.url).pixel_rules == UNRECORDED_RULES
    told = replace(tiny_base(), rules=PixelRules(4095))
    assert load_bundle(tiny_bundle(tmp_path / "told", frozen=told).location.url).pixel_rules == PixelRules(4095)


@pytest.mark.sampled(1)
def test_a_store_of_features_has_one_rule(images, tmp_path, weights, ray_here):
    settings = {"images": str(images), "base": "MobileNetV2", "size": 96, "weights": weights, "output": str(tmp_path / "out")}
    tlbatch.extract(**settings, white_level=16_383)
    with pytest.raises(OutputError, match=r"white_level 16383\.0, .*; this command has .* white_level auto"):
        tlbatch.extract(**settings)


@pytest.mark.parametrize("level", ["0", "-1", "bright"])
def test_a_white_level_is_a_number_above_zero_or_auto(level):
    with pytest.raises(ConfigError, match="white_level"):
        tlbatch.train(images="x", bundle="y", white_level=level)
    assert TrainConfig(images="x", bundle="y", white_level="4095").white_level == 4095
