"""What is known of a base in int8 without making one, and which images its ranges are taken from."""

import json
import sys
import zipfile

import numpy as np
import pytest
from support.paths import GOLDEN

from tlbatch.commands.sample_pixels import draw_by_class
from tlbatch.config import ExtractConfig, TrainConfig, load
from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import base_digest, load_bundle
from tlbatch.model.engines import choose
from tlbatch.model.quantize import require_nncf


@pytest.fixture
def tiny(tmp_path):
    """The contents of a bundle.json of before int8, and a function that writes others beside its files."""
    with zipfile.ZipFile(GOLDEN / "before.zip") as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("bundles/")])
    folder = next(path for path in sorted((tmp_path / "bundles").iterdir()) if (path / "bundle.json").exists())
    facts = json.loads((folder / "bundle.json").read_text())

    def with_base(**more):
        (folder / "bundle.json").write_text(json.dumps({**facts, "base": {**facts["base"], **more}}))
        return load_bundle(str(folder))

    return facts, with_base


def test_int8_has_a_digest_of_its_own_and_older_ones_stay(tiny):
    facts, with_base = tiny
    before = base_digest(facts)
    assert with_base().base_digest == before == with_base(quantized=None).base_digest
    digests = {with_base(quantized=letter * 64).base_digest for letter in "ab"}
    assert len(digests | {before}) == 3
    with pytest.raises(BundleError, match=r"base\.quantized in its bundle\.json is invalid"):
        with_base(quantized="int8")


def test_int8_is_offered_once(tiny):
    facts, with_base = tiny
    assert with_base().quantizable
    assert not with_base(quantized="a" * 64).quantizable
    facts["training"] = {"quantized": {"kept": False}}
    assert not with_base().quantizable, "training has found it too inaccurate"


def test_int8_is_for_cpus(tiny):
    bundle = tiny[1](quantized="a" * 64)
    assert choose(bundle, "auto", gpu=False) == choose(bundle, "openvino", gpu=False) == "openvino"
    for engine, gpu in (("jax", False), ("tensorflow", False), ("auto", True), ("openvino", True)):
        with pytest.raises(ConfigError, match="in int8, which runs in OpenVINO on CPUs; leave engine out and set num_gpus=0"):
            choose(bundle, engine, gpu=gpu)


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (TrainConfig, {"images": "i", "engine": "jax"}, "engine: a base in int8 runs in OpenVINO, not in jax"),
        (TrainConfig, {"images": "i", "num_gpus": 1}, "num_gpus: a base in int8 runs on CPUs"),
        (TrainConfig, {"features": "f"}, "quantize: stored features are those of their base; give quantize to extract"),
        (TrainConfig, {"images": "i", "quantize": "none", "quantize_loss": 1}, "quantize_loss: without quantize this setting"),
        (TrainConfig, {"images": "i", "quantize": "int4"}, "quantize"),
        (ExtractConfig, {"images": "i", "output": "o"}, "quantize: the base of a bundle stays as it is"),
        (ExtractConfig, {"images": "i", "output": "o", "bundle": "", "engine": "tensorflow"}, "runs in OpenVINO, not in tens"),
    ],
)
def test_what_does_not_go_with_int8_is_told(kind, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(kind, {"bundle": "b", "quantize": "int8", **settings})


def test_each_class_has_its_share_of_the_images():
    classes = np.repeat([0, 1, 2], [600, 300, 100])
    drawn = draw_by_class(classes, 100, 0)
    assert np.abs(np.bincount(classes[drawn]) - [60, 30, 10]).max() <= 1
    assert np.array_equal(drawn, draw_by_class(classes, 100, 0))
    assert not np.array_equal(drawn, draw_by_class(classes, 100, 1))
    assert np.array_equal(draw_by_class(classes, 2000, 0), np.arange(1000))
    several = np.eye(3, dtype=np.float32)[classes]
    assert np.abs(several[draw_by_class(several, 100, 0)].sum(axis=0) - [60, 30, 10]).max() <= 1


def test_nncf_is_needed_to_make_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ConfigError, match=r"needs the package nncf: install tlbatch\[quantize\]"):
        require_nncf()
