"""A bundle is what it says it is, and every engine gives what Keras gives."""

import json
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

import fsspec
import keras
import numpy as np
import pytest

from tlbatch.commands import classify
from tlbatch.config import RunConfig
from tlbatch.errors import BundleError, ConfigError
from tlbatch.execution.actors import Classifier
from tlbatch.execution.classify_rows import job_of
from tlbatch.execution.sizing import ExecutionPlan
from tlbatch.images.listing import Selection, list_store
from tlbatch.model import engines
from tlbatch.model.bundle import BUNDLE, load_bundle, require_bundle_place
from tlbatch.model.engines import calls_at_once, choose, load_engine, load_head
from tlbatch.model.head import build_head
from tlbatch.schema import sha256
from tlbatch.storage.resolve import resolve


@pytest.fixture
def copy(bundle_url, tmp_path):
    """The trained bundle in a place where it may be spoiled."""
    return shutil.copytree(bundle_url, tmp_path / "copy")


def test_the_model_takes_uint8_and_gives_features_and_scores(keras_model, bundle_url, pixels):
    assert keras_model.inputs[0].dtype == "uint8"
    given = keras_model(pixels)
    assert given["features"].shape == (21, 1280)
    assert np.asarray(given["scores"]).sum(axis=1) == pytest.approx(np.ones(21), abs=1e-5)
    head = keras.saving.load_model(Path(bundle_url, "head.keras"), compile=False)
    assert np.asarray(head(given["features"])) == pytest.approx(np.asarray(given["scores"]), abs=1e-6)


def test_nothing_in_the_bundle_runs_code_when_loaded(bundle_url):
    for name in ("model.keras", "head.keras"):
        with zipfile.ZipFile(Path(bundle_url, name)) as archive:
            config = archive.read("config.json").decode()
        assert "Lambda" not in config
        assert "registered_name" not in config or '"registered_name": "Custom' not in config


@pytest.mark.parametrize("engine", ["openvino", "tensorflow"])
@pytest.mark.parametrize("batch_size", [8, 32])
def test_engines_agree_with_keras(bundle_url, keras_model, pixels, engine, batch_size):
    given = load_engine(load_bundle(bundle_url), engine, threads=2, batch_size=batch_size).predict(pixels)
    expected = keras_model(pixels)
    assert given.scores == pytest.approx(np.asarray(expected["scores"]), abs=1e-5)
    assert given.features == pytest.approx(np.asarray(expected["features"]), abs=1e-3)
    assert (given.scores.argmax(1) == np.asarray(expected["scores"]).argmax(1)).all()


def test_an_images_scores_do_not_depend_on_its_neighbours_nor_on_threads(bundle_url, pixels):
    """Bit for bit: this is what lets the same inputs give the same files whatever the batch size."""
    bundle = load_bundle(bundle_url)
    reference = load_engine(bundle, "openvino", threads=2, batch_size=16).predict(pixels)
    order = np.random.default_rng(2).permutation(len(pixels))
    for threads, batch_size in ((1, 16), (2, 5), (3, 64), (2, 1), (2, engines.OPENVINO_BATCH)):
        given = load_engine(bundle, "openvino", threads=threads, batch_size=batch_size).predict(pixels[order])
        assert np.array_equal(given.scores, reference.scores[order]), (threads, batch_size)
        assert np.array_equal(given.features, reference.features[order]), (threads, batch_size)


def test_an_engine_that_refused_images_takes_the_next_ones(bundle_url, pixels):
    engine = load_engine(load_bundle(bundle_url), "openvino", threads=2, batch_size=2)
    expected = engine.predict(pixels).scores
    working = list(engine._requests)

    class Refusing:
        def start_async(self, inputs):
            raise RuntimeError("refused while the batch before is under way")

    engine._requests[1] = Refusing()
    with pytest.raises(RuntimeError, match="refused"):
        engine.predict(pixels)
    engine._requests[:] = working
    assert np.array_equal(engine.predict(pixels).scores, expected)
    assert engine.predict(pixels[:0]).scores.shape == (0, expected.shape[1])


def test_auto_is_openvino_on_a_cpu_and_jax_on_a_gpu(bundle_url):
    bundle = load_bundle(bundle_url)
    assert choose(bundle, "auto", gpu=False) == "openvino"
    assert choose(bundle, "auto", gpu=True) == "jax"
    assert [calls_at_once(engine) for engine in ("jax", "openvino", "tensorflow")] == [2, 1, 1]


@pytest.mark.parametrize(
    ("asked", "gpus", "found", "becomes"),
    [
        ("auto", None, None, ("auto", 0)),  # no GPU: the CPU's engine
        ("auto", None, "", ("auto", 0)),  # GPUs that nothing sees
        ("auto", None, "jax", ("jax", 1)),
        ("tensorflow", None, "tensorflow", ("tensorflow", 1)),
        ("auto", 0.5, "tensorflow", ("tensorflow", 0.5)),
        ("auto", 1, None, ("auto", 1)),  # none now: an autoscaler may start one
        ("jax", 1, "never asked", ("jax", 1)),
        ("openvino", None, "never asked", ("openvino", 0)),
        ("auto", 0, "never asked", ("auto", 0)),
    ],
)
def test_the_engine_on_gpus_follows_from_what_is_wanted_and_what_is_there(monkeypatch, asked, gpus, found, becomes):
    monkeypatch.setattr(
        classify, "find_engine_on_gpus", lambda *_: pytest.fail("it was asked") if found == "never asked" else found
    )
    config = RunConfig(images="i", bundle="b", output="o", engine=asked, num_gpus=gpus)
    given = classify._with_gpus(config, [], lambda: None)
    assert (given.engine, given.num_gpus) == becomes


def test_reserved_gpus_that_nothing_sees_are_a_sentence(monkeypatch):
    monkeypatch.setattr(classify, "find_engine_on_gpus", lambda *_: "")
    config = RunConfig(images="i", bundle="b", output="o", num_gpus=1)
    with pytest.raises(ConfigError, match=r"neither JAX nor TensorFlow sees them; install tlbatch\[gpu-jax\]"):
        classify._with_gpus(config, [], lambda: None)


def test_a_bundle_without_openvino_falls_back_or_says_so(copy):
    facts = json.loads((copy / BUNDLE).read_text())
    facts["files"] = {name: digest for name, digest in facts["files"].items() if not name.startswith("openvino")}
    (copy / BUNDLE).write_text(json.dumps(facts))
    bundle = load_bundle(str(copy))
    assert choose(bundle, "auto", gpu=False) == "tensorflow"
    with pytest.raises(ConfigError, match="no OpenVINO model"):
        choose(bundle, "openvino", gpu=False)


@pytest.mark.parametrize("name", ["model.keras", "openvino/model.bin", "probes.npz"])
def test_one_flipped_bit_is_found(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"damaged: {name} differs"):
        load_engine(load_bundle(str(copy)))


def test_a_missing_file_is_named(copy):
    (copy / "model.keras").unlink()
    with pytest.raises(BundleError, match=r"incomplete: .*model.keras is missing"):
        load_engine(load_bundle(str(copy)))


def test_scores_that_are_off_stop_the_actor(copy):
    """A model that is whole but not the one that was measured: the self-test refuses it."""
    with np.load(copy / "probes.npz") as file:
        probes = dict(file)
    probes["scores"] = np.roll(probes["scores"], 1, axis=1)
    np.savez(copy / "probes.npz", **probes)
    facts = json.loads((copy / BUNDLE).read_text())
    facts["files"]["probes.npz"] = sha256((copy / "probes.npz").read_bytes())
    (copy / BUNDLE).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="fails its self-test on openvino: its scores differ from those of the probes by"):
        load_engine(load_bundle(str(copy)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no bundle at"),
        (b"{", "its bundle.json is not JSON with a format_version"),
        (b"[]", "its bundle.json is not JSON with a format_version"),
        (b'{"format_version": 1}', "base in its bundle.json is invalid: Field required"),
        (b'{"format_version": 99}', "has format 99; this tlbatch reads formats 1 to 2"),
    ],
)
def test_what_is_no_bundle_is_a_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / BUNDLE).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        load_bundle(str(tmp_path))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["../other", "/other", "openvino/../../other", "model.keras/../x", "other.py"])
def test_a_bundle_names_no_file_outside_its_folder(copy, name):
    facts = json.loads((copy / BUNDLE).read_text())
    facts["files"][name] = "0" * 64
    (copy / BUNDLE).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=r"its bundle\.json lists files that a bundle does not have"):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("input", "size"), [96], "input.size in its bundle.json is invalid"),
        (("input", "size"), ["96", "96"], "input.size.0 in its bundle.json is invalid"),
        (("input", "size"), [96.0, True], "input.size.0 in its bundle.json is invalid"),
        (("label_thresholds",), [0.5], "its bundle.json is invalid: there are 3 labels and 1 thresholds"),
        (("input", "size"), [96, 1 << 40], "input.size.1 in its bundle.json is invalid"),
        (
            ("input", "interpolation"),
            "sinc",
            "input.interpolation in its bundle.json is invalid: this tlbatch does not know 'sinc'",
        ),
        (("input", "jpeg"), "x" * 999, "input.jpeg in its bundle.json is invalid: this tlbatch does not know 'xxx"),
        (("input", "resize"), ["crop"], "input.resize in its bundle.json is invalid"),
        (("features_length",), "1280", "features_length in its bundle.json is invalid"),
        (("features_length",), 1 << 40, "features_length in its bundle.json is invalid"),
        (("labels",), [1, 2, 3], "labels.0 in its bundle.json is invalid"),
        (("abstain_threshold",), float("nan"), "abstain_threshold in its bundle.json is invalid"),
        (("files", "model.keras"), "../etc", "files.model.keras in its bundle.json is invalid"),
        (("files", "two\nlines"), "", "files.two\\nlines in its bundle.json is invalid"),
        (("base",), None, "base in its bundle.json is invalid"),
    ],
)
def test_facts_that_will_not_do_are_named(copy, path, value, sentence):
    facts = inside = json.loads((copy / BUNDLE).read_text())
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    (copy / BUNDLE).write_text(json.dumps(facts))
    with pytest.raises(BundleError) as caught:
        load_bundle(str(copy))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("load", [load_engine, load_head])
def test_labels_that_the_scores_do_not_fit_stop_the_actor(copy, load):
    facts = json.loads((copy / BUNDLE).read_text())
    facts["labels"].append("one more")
    (copy / BUNDLE).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="has 4 scores, but its model gives 3"):
        load(load_bundle(str(copy)))


def test_probes_of_another_size_stop_the_actor(copy):
    facts = json.loads((copy / BUNDLE).read_text())
    facts["input"]["size"] = [64, 64]
    (copy / BUNDLE).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match=r"takes pixels of \(64, 64\), but its probes are \(96, 96, 3\)"):
        load_engine(load_bundle(str(copy)))


def test_a_cache_that_others_can_write_is_not_used(bundle_url, monkeypatch, tmp_path):
    """What is loaded is what was checked: nobody else may change it in between."""
    store = fsspec.filesystem("memory")
    store.put(f"{bundle_url}/", "/cached/bundle/", recursive=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = load_bundle("memory://cached/bundle").folder
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    folder.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"Other users can write to .*; remove it, or set TMPDIR to another folder"):
        load_bundle("memory://cached/bundle").require_whole()


def test_a_pinned_bundle_is_taken_and_no_other(copy):
    digest = sha256((copy / BUNDLE).read_bytes())
    pinned = load_bundle(f"{copy}#sha256={digest}")
    assert (pinned.digest, pinned.location.url, pinned.pinned) == (digest, str(copy), f"{copy}#sha256={digest}")
    with pytest.raises(BundleError, match=f"is not the pinned one: its bundle.json has the sha256 {digest}, not 000"):
        load_bundle(f"{copy}#sha256={'0' * 64}")
    with pytest.raises(BundleError, match=r"takes the 64 digits that `sha256sum bundle.json` prints; found 'abc'"):
        load_bundle(f"{copy}#sha256=abc")
    with pytest.raises(BundleError, match="a new bundle has no digest yet"):
        require_bundle_place(resolve(f"{copy}#sha256={digest}"))


def test_an_actor_takes_no_bundle_that_was_put_there_since(copy, store):
    """The command has looked at one, and when its actor starts there is another."""
    config = RunConfig(images=str(store), bundle=str(copy), output=str(copy.parent / "out"))
    facts = (copy / BUNDLE).read_bytes()
    manifest = list_store(resolve(str(store)), Selection()).manifest
    rows = manifest.append_column("row", [list(range(len(manifest)))])
    job = job_of(config, load_bundle(str(copy)).pinned, "openvino", ExecutionPlan([], 1, 1, 64), rows)
    (copy / BUNDLE).write_bytes(facts + b"\n")
    with pytest.raises(BundleError, match="is not the pinned one"):
        Classifier(job)


def test_the_head_is_dropout_and_a_softmax():
    head = build_head(16, 3)
    assert [type(layer).__name__ for layer in head.layers] == ["InputLayer", "Dropout", "Dense"]
    assert head.layers[1].rate == 0.2
