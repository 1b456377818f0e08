"""Features of a base, with predictions and without."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import tlbatch
from tlbatch import schema
from tlbatch.errors import BundleError, OutputError
from tlbatch.images.decode import decode
from tlbatch.model.bundle import load_bundle
from tlbatch.schema import NEW_RULES, PixelRules

pytestmark = pytest.mark.usefixtures("ray_here")


def test_features_are_those_of_the_base(store, bundle_url, keras_model, tmp_path):
    settings = {"features": True, "features_dtype": "float32", "max_images": 10}
    report = tlbatch.classify(images=str(store), bundle=bundle_url, output=str(tmp_path / "out"), **settings)
    table = pq.read_table(next((tmp_path / "out").rglob("features/*.parquet")))
    assert table.schema.equals(schema.features_schema(1280, "float32"), check_metadata=True)
    pixels = np.stack([decode(Path(uri).read_bytes(), (96, 96), rules=NEW_RULES).array for uri in table["uri"].to_pylist()])
    values = np.stack(table["features"].to_numpy(zero_copy_only=False))
    assert values == pytest.approx(np.asarray(keras_model(pixels)["features"]), abs=1e-3)
    assert report["listed"] == 10
    assert set(table["base"].to_pylist()) == {load_bundle(bundle_url).base_digest}


@pytest.mark.sampled(1)
def test_extract_of_a_named_base_writes_features_only_and_continues(store, weights, tmp_path):
    settings = {"images": str(store), "base": "MobileNetV2", "size": 64, "weights": weights, "output": str(tmp_path / "out")}
    report = tlbatch.extract(**settings, max_images=8)
    assert report["predicted"] == 8
    assert not list((tmp_path / "out").rglob("predictions"))
    assert pq.read_table(next((tmp_path / "out").rglob("features/*.parquet"))).num_rows == 8
    checked = tlbatch.verify(str(tmp_path / "out"))
    assert (checked["ok"], checked["listed"], checked["predicted"]) == (True, 8, 8)
    assert tlbatch.extract(**settings, max_images=8)["already_done"]
    with pytest.raises(OutputError, match="was begun with MobileNetV2 at 64 pixels"):
        tlbatch.extract(**{**settings, "size": 96}, max_images=8)
    with pytest.raises(BundleError, match="has no head"):
        tlbatch.classify(images=str(store), bundle=str(tmp_path / "out" / "base"), output=str(tmp_path / "elsewhere"))


@pytest.mark.sampled(1)
def test_features_that_pillow_resized_go_on_with_pillow(store, weights, tmp_path, monkeypatch):
    """And so do heads that are trained on them."""
    base = {"base": "MobileNetV2", "size": 64, "weights": weights}
    with monkeypatch.context() as patch:
        patch.setattr("tlbatch.commands.extract.NEW_RULES", PixelRules())
        tlbatch.extract(images=str(store), **base, output=str(tmp_path / "old"), max_images=30)
    tlbatch.extract(images=str(store), **base, output=str(tmp_path / "old"))
    tlbatch.extract(images=str(store), **base, output=str(tmp_path / "new"))
    old, new = (load_bundle(str(tmp_path / name / "base")) for name in ("old", "new"))
    assert (old.pixel_rules, new.pixel_rules) == (PixelRules(), NEW_RULES)
    assert old.base_digest != new.base_digest
    for name, bundle in (("old", old), ("new", new)):
        head = {"features": str(tmp_path / name), "bundle": str(tmp_path / f"head-{name}"), "epochs": 1}
        trained = tlbatch.train(**head, **base, white_level="auto")
        assert load_bundle(trained["bundle"]).base_digest == bundle.base_digest


def test_extract_writes_nothing_into_a_folder_of_somebody_elses(store, weights, tmp_path):
    (tmp_path / "mine.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="holds no tlbatch runs"):
        tlbatch.extract(images=str(store), base="MobileNetV2", size=64, weights=weights, output=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jpg"]
