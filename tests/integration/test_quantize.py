"""A base in int8: another base, whose features are the same bits wherever it runs, and which is kept only if it is accurate."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tlbatch
from tlbatch.commands import plan
from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import choose, load_engine, load_head
from tlbatch.model.frozen import frozen_base_of
from tlbatch.model.openvino import BIN, XML, cut_base
from tlbatch.model.quantize import quantize_to_int8
from tlbatch.schema import sha256

#: Prints a digest of the features that a bundle's engine computes, whose probes are tested before.
FEATURES = """
import hashlib, sys
import numpy as np
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine

pixels = np.random.default_rng(2).integers(0, 256, (200, 96, 96, 3), np.uint8)
print(hashlib.sha256(load_engine(load_bundle(sys.argv[1])).predict(pixels).features.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, store, weights, ray_here) -> dict:
    """What `train --quantize int8` returned for the three colors."""
    bundle, quick = tmp_path_factory.mktemp("int8") / "bundle", {"epochs": 12, "learning_rate": 0.01}
    return tlbatch.train(images=str(store), size=96, weights=weights, quantize="int8", bundle=str(bundle), **quick)


def test_int8_is_another_base_with_probes_of_its_own(quantized, trained):
    found, bundle, other = quantized["quantized"], load_bundle(quantized["bundle"]), load_bundle(trained["bundle"])
    assert found["kept"]
    assert found["images"] == 9  # those of early stopping
    assert found["calibrated_on"] == quantized["images"]["train"]
    assert found["int8"]["accuracy"] >= 0.95
    assert min(found[kind]["images_per_second"] for kind in ("float32", "int8")) > 0
    assert found["int8"]["megabytes"] < found["float32"]["megabytes"]
    assert bundle.facts["base"]["weights_digest"] == other.facts["base"]["weights_digest"]
    assert bundle.base_digest != other.base_digest
    probes = bundle.probes()
    assert np.array_equal(load_engine(bundle).predict(probes["pixels"]).features, probes["features"])
    float32 = load_engine(other).predict(probes["pixels"]).features
    assert 0 < np.abs(float32 - probes["features"]).max() < 6
    assert "on the same 9 held-out images" in Path(quantized["bundle"], "card.html").read_text()


def test_equal_images_make_equal_bytes_without_a_word(trained, pixels, capfd):
    before, base = logging.getLoggerClass(), cut_base(load_bundle(trained["bundle"]).folder / XML)
    capfd.readouterr()
    first, second = (quantize_to_int8(base, pixels[:4]) for _ in range(2))
    assert first == second
    assert len(first[BIN]) < len(base[BIN]) / 3
    assert capfd.readouterr().out == ""
    assert logging.getLoggerClass() is before, "NNCF replaces it"


def test_features_do_not_depend_on_threads_and_batches(quantized, pixels):
    bundle = load_bundle(quantized["bundle"])
    wanted = load_engine(bundle).predict(pixels).features
    for threads, batch in ((1, 1), (1, 16), (2, 4), (2, 7), (4, 3)):
        found = load_engine(bundle, threads=threads, batch_size=batch).predict(pixels).features
        assert np.array_equal(found, wanted), (threads, batch)


def features_under(isa: str, bundle: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    command = [sys.executable, "-c", FEATURES, bundle]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_features_are_the_same_bits_with_each_set_of_instructions(quantized):
    """A processor that has less than is named uses what it has."""
    done = [features_under(isa, quantized["bundle"]) for isa in ("", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")]
    assert all(one.returncode == 0 for one in done), done[0].stderr[-2000:]
    assert len({one.stdout for one in done}) == 1
    amx = features_under("AVX512_CORE_AMX", quantized["bundle"])  # only who asks for it gets it, and only if it is there
    if "amx_int8" in Path("/proc/cpuinfo").read_text():
        assert "computes some features differently with AMX" in amx.stderr
    else:
        assert amx.stdout == done[0].stdout


def test_the_environment_of_a_process_stays_as_it_is():
    code = "import os; from tlbatch.model.openvino import import_openvino as f; f(); print('ONEDNN_MAX_CPU_ISA' in os.environ)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_processor_with_other_features_is_refused(quantized):
    done = features_under("SSE41", quantized["bundle"])
    assert done.returncode != 0
    assert "its base is in int8, and" in done.stderr
    assert "It runs on x86 processors with AVX2 or more" in done.stderr


@pytest.mark.sampled(1)
def test_classify_goes_on_to_the_bit_and_a_new_head_is_trained_on_its_features(quantized, store, tmp_path):
    common = {
        "images": str(store),
        "bundle": quantized["bundle"],
        "features": True,
        "features_dtype": "float32",
        "report": False,
    }
    for name, batch in (("a", 3), ("b", 16)):
        run = tlbatch.classify(**common, output=str(tmp_path / name), batch_size=batch, run_id="r")
        assert (run["engine"], run["failed"], run["predicted"]) == ("openvino", 0, 60)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a/runs/r").rglob("part-*.parquet")]
    assert len(files) >= 2
    assert all((tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / one).read_bytes() for one in files)
    again = tlbatch.train(features=str(tmp_path / "a"), bundle=str(tmp_path / "head"), epochs=2)
    bundle, first = load_bundle(again["bundle"]), load_bundle(quantized["bundle"])
    assert bundle.base_digest == first.base_digest
    assert np.array_equal(load_engine(bundle).predict(first.probes()["pixels"]).features, first.probes()["features"])
    rescored = tlbatch.rescore(features=str(tmp_path / "a"), bundle=again["bundle"], output=str(tmp_path / "c"), report=False)
    assert rescored["predicted"] == 60
    assert frozen_base_of(bundle).digest == first.base_digest


def test_plan_says_when_int8_would_pay(quantized, trained, store, tmp_path, monkeypatch, ray_here):
    asked = {"images": str(store), "output": str(tmp_path / "out")}
    tlbatch.classify(**asked, bundle=trained["bundle"], report=False)
    assert "advice" not in tlbatch.plan(**asked, bundle=trained["bundle"]), "a short run waits for its start"
    bound = {"stage": "predict", "busy": 0.9, "remedy": ""}
    of_run = plan.read_report
    seconds = {"predict": 90.0, "decode": 10.0}
    monkeypatch.setattr(plan, "read_report", lambda run: {**of_run(run), "bottleneck": bound, "stage_seconds": seconds})
    advice = tlbatch.plan(**asked, bundle=trained["bundle"])["advice"]
    assert advice.endswith("with a base in int8 (train --quantize int8) it is about 1.8 times as fast.")
    assert "advice" not in tlbatch.plan(**asked, bundle=quantized["bundle"])


def test_it_runs_in_openvino_alone(quantized, trained, tmp_path):
    bundle = load_bundle(quantized["bundle"])
    assert choose(bundle, "auto", gpu=False) == "openvino"
    for engine, gpu in (("jax", False), ("tensorflow", False), ("auto", True)):
        with pytest.raises(
            ConfigError, match=r"is in int8, which runs in OpenVINO on CPUs; leave engine out and set num_gpus=0"
        ):
            load_engine(bundle, engine, gpu=gpu)
    with pytest.raises(ConfigError, match="is in int8"):
        load_head(bundle, "jax")
    with pytest.raises(BundleError, match="different bases"):
        tlbatch.classify(images="/nothing", bundle=[quantized["bundle"], trained["bundle"]], output=str(tmp_path))


def one_bit(probes: dict[str, np.ndarray]) -> None:
    probes["features"][0, 0] = np.nextafter(probes["features"][0, 0], np.float32(9))


def smaller(probes: dict[str, np.ndarray]) -> None:
    probes["pixels"] = probes["pixels"][:, :64, :64]


@pytest.mark.parametrize(
    ("change", "said"),
    [(one_bit, r"0\.0% of the probes' features differ on this processor"), (smaller, r"but its probes are \(64, 64, 3\)")],
)
def test_changed_probes_are_refused(quantized, tmp_path, change, said):
    """With all digests made anew."""
    bundle = load_bundle(quantized["bundle"])
    for name in bundle.facts["files"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((bundle.folder / name).read_bytes())
    with np.load(tmp_path / "probes.npz") as file:
        probes = dict(file)
    change(probes)
    np.savez_compressed(tmp_path / "probes.npz", **probes)
    files = {name: sha256((tmp_path / name).read_bytes()) for name in bundle.facts["files"]}
    (tmp_path / "bundle.json").write_text(json.dumps({**bundle.facts, "files": files}))
    with pytest.raises(BundleError, match=said):
        load_engine(load_bundle(str(tmp_path)))


@pytest.mark.sampled(1)
def test_the_plain_models_are_in_float32(quantized, tmp_path, pixels, caplog):
    import keras

    tlbatch.export_model(bundle=quantized["bundle"], model=str(tmp_path / "plain.keras"))
    assert "The exported model is in float32" in caplog.text
    scores = keras.saving.load_model(tmp_path / "plain.keras", compile=False).predict(pixels, verbose=0)
    assert scores.shape == (len(pixels), 3)
    tlbatch.export_model(bundle=quantized["bundle"], model=str(tmp_path / "plain.onnx"))


@pytest.mark.sampled(1)
def test_float32_stays_if_int8_costs_too_much(store, weights, ray_here, tmp_path, monkeypatch, caplog):
    from tlbatch.commands import quantizing

    monkeypatch.setattr(quantizing, "quantized_base", lambda frozen, pixels: frozen)
    monkeypatch.setattr(quantizing, "measured", lambda config, made, began: next(accuracies))
    accuracies = iter([Measured(0.9), Measured(0.6)])
    found = tlbatch.train(images=str(store), size=64, weights=weights, quantize="int8", bundle=str(tmp_path / "b"), epochs=2)
    assert not found["quantized"]["kept"]
    assert "30.0 points lower (60.0 % instead of 90.0 %), and 0.5 are allowed; the base stays in float32" in caplog.text
    bundle = load_bundle(found["bundle"])
    assert bundle.quantized is None
    assert bundle.facts["training"]["quantized"]["int8"]["accuracy"] == 0.6


class Measured:
    calibration_error, images_per_second, megabytes = 0.1, 100.0, 3.0

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy


@pytest.mark.sampled(1)
def test_extract_quantizes_a_named_base(store, weights, ray_here, tmp_path):
    base = {"images": str(store), "base": "MobileNetV2", "size": 64, "weights": weights, "output": str(tmp_path / "o")}
    base["features_of"] = "last"
    assert tlbatch.extract(**base, quantize="int8", report=False)["failed"] == 0
    bundle = load_bundle(str(tmp_path / "o/base"))
    assert bundle.quantized
    trained = tlbatch.train(features=str(tmp_path / "o"), bundle=str(tmp_path / "b"), epochs=2)
    assert load_bundle(trained["bundle"]).base_digest == bundle.base_digest
    with pytest.raises(tlbatch.errors.OutputError, match=r"features_of last, quantize int8; this command has .* quantize none"):
        tlbatch.extract(**base, report=False)


def test_without_nncf_one_sentence_says_so(store, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    for verb, more in ((tlbatch.train, {"bundle": str(tmp_path / "b")}), (tlbatch.extract, {"output": str(tmp_path / "o")})):
        with pytest.raises(ConfigError, match=r"needs the package nncf: install tlbatch\[quantize\]"):
            verb(images=str(store), weights=weights, quantize="int8", **more)
    assert list(tmp_path.iterdir()) == []
