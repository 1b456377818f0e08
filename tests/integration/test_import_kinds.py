"""Classifiers of other kinds than float32, square, RGB and new: each gives its own scores as a bundle, or says why not."""

import csv
import functools
import http.server
import json
import re
import shutil
import threading
import zipfile

import h5py
import keras
import numpy as np
import pytest
from PIL import Image
from support.models import pixels, small_base, softmax, stacked, with_operations
from support.paths import ROOT
from support.pictures import encoded, noisy

import tlbatch
from tlbatch.errors import BundleError, ConfigError, WeightsError
from tlbatch.model.bundle import load_bundle
from tlbatch.model.engines import load_engine, load_head
from tlbatch.model.float32 import in_float32, precision

LABELS = ("red", "green", "blue")


def imported(tmp_path, model, suffix="keras", **settings) -> dict:
    path = tmp_path / f"model.{suffix}"
    if model is not None:
        model.save(path)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    given = {"model": str(path), "labels": str(tmp_path / "labels.txt"), "bundle": str(tmp_path / "bundle")}
    return tlbatch.import_model(**{**given, **settings})


def scores_of(result: dict, images: np.ndarray) -> np.ndarray:
    return load_engine(load_bundle(result["bundle"])).predict(images).scores


@pytest.fixture
def half():
    """Models are built in mixed precision."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    yield
    keras.mixed_precision.set_global_policy("float32")


def test_half_precision_becomes_float32_and_the_difference_is_said(tmp_path, half):
    model = stacked()
    result = imported(tmp_path, model, scale="[0,1]")
    assert result["precision"] == "mixed_float16"
    assert 0 < result["off_float32"] < 0.01
    scaled = pixels() / np.float32(255)
    given = scores_of(result, pixels())
    assert given == pytest.approx(np.asarray(in_float32(model)(scaled)), abs=1e-5)
    assert given == pytest.approx(np.asarray(model(scaled), np.float32), abs=0.01)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_int8_weights_are_multiplied_out(tmp_path):
    model = stacked()
    before = model.predict(pixels() / np.float32(255), verbose=0)
    model.quantize("int8")
    result = imported(tmp_path, model, scale="[0,1]")
    assert result["precision"] == "int8"
    assert scores_of(result, pixels()) == pytest.approx(before, abs=0.01)
    assert load_bundle(result["bundle"]).features_length == 16


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_another_quantisation_is_named(tmp_path):
    model = stacked()
    model.quantize("int4")
    with pytest.raises(WeightsError, match="quantised as int4; only int8"):
        imported(tmp_path, model, scale="[0,1]")
    assert not (tmp_path / "bundle").exists()


def test_a_model_in_float32_is_left_as_it_is(tmp_path):
    assert precision(stacked()) == "float32"


def shaped(height: int, width: int, channels: int = 3) -> keras.Model:
    keras.utils.set_random_seed(4)
    inputs = keras.Input((height, width, channels))
    maps = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(keras.layers.Rescaling(1 / 127.5, -1)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(keras.layers.GlobalAveragePooling2D()(maps)))


def test_images_that_are_not_square(tmp_path, ray_here):
    model = shaped(40, 60)
    result = imported(tmp_path, model)
    assert (result["size"], result["scale"]) == ([40, 60], "raw")
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert scores_of(result, images) == pytest.approx(model.predict(images.astype("float32"), verbose=0), abs=1e-5)
    store = tmp_path / "store"
    store.mkdir()
    for number, array in enumerate(images):
        Image.fromarray(array).save(store / f"{number}.png")
    tlbatch.classify(images=str(store), bundle=result["bundle"], output=str(tmp_path / "out"), features=True)
    table = tlbatch.read_predictions(str(tmp_path / "out")).sort_values("key")
    assert table["score"].to_numpy() == pytest.approx(model.predict(images.astype("float32"), verbose=0).max(axis=1), abs=1e-5)


def test_one_channel_is_pillows_grey(tmp_path):
    model = shaped(40, 40, channels=1)
    result = imported(tmp_path, model)
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 40, 3), np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in images])[..., None]
    assert scores_of(result, images) == pytest.approx(model.predict(grey.astype("float32"), verbose=0), abs=1e-5)
    inputs = keras.Input((40, 40, 1))
    with pytest.raises(ConfigError, match="one channel"):
        imported(tmp_path, keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs))), scale="caffe")


@pytest.mark.parametrize("size", [56, "56", "40x56"])
def test_a_model_of_any_size_takes_the_one_that_is_said(tmp_path, size):
    inputs = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    result = imported(tmp_path, keras.Model(inputs, keras.layers.Dense(3)(pooled)), scale="raw", size=size)
    assert result["size"] == ([40, 56] if size == "40x56" else 56)


@pytest.mark.parametrize("size", ["20", "40x20", "big", "40x56x3"])
def test_a_size_that_is_none(tmp_path, size):
    with pytest.raises(ConfigError, match="one number or HEIGHTxWIDTH"):
        imported(tmp_path, stacked(), scale="raw", size=size)


def exchanged() -> keras.Model:
    """Red and blue change places by an index with an ellipsis."""
    inputs = keras.Input((48, 48, 3))
    numbers = inputs[..., ::-1] / 255.0
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(small_base("avg")(numbers)))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("build", [with_operations, exchanged])
def test_operations_in_an_h5_file(tmp_path, build):
    """Keras 3 writes them without their modules, and then cannot read them."""
    model = build()
    result = imported(tmp_path, model, "h5")
    assert result["scale"] == "raw"
    assert scores_of(result, pixels()) == pytest.approx(model.predict(pixels().astype("float32"), verbose=0), abs=1e-5)


#: How Keras 2 writes the operations of `with_operations`, and of the other modes of `preprocess_input`.
KERAS_2 = {
    "TrueDivide": ("math.truediv", {"y": 127.5, "name": None}),
    "Subtract": ("math.subtract", {"y": 1.0, "name": None}),
}


def as_keras_2(path, function: str | None = None) -> None:
    """Rewrite the operations of an `.h5` file in Keras 2's way; the function of one may be another."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            if layer["class_name"] not in KERAS_2:
                continue
            name, arguments = KERAS_2[layer["class_name"]]
            source = layer["inbound_nodes"][0]["args"][0]["config"]["keras_history"]
            layer["class_name"] = "TFOpLambda"
            layer["config"] = {"name": layer["name"], "trainable": True, "dtype": "float32", "function": function or name}
            layer["inbound_nodes"] = [[[*source, arguments]]]
        file.attrs["model_config"] = json.dumps(config)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_arithmetic_as_keras_2_wrote_it(tmp_path):
    model = with_operations()
    model.save(tmp_path / "model.h5")
    as_keras_2(tmp_path / "model.h5")
    result = imported(tmp_path, None, "h5")
    assert scores_of(result, pixels()) == pytest.approx(model.predict(pixels().astype("float32"), verbose=0), abs=1e-5)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_function_of_tensorflow_that_is_not_converted_is_named(tmp_path):
    with_operations().save(tmp_path / "model.h5")
    as_keras_2(tmp_path / "model.h5", "math.erfinv")
    with pytest.raises(WeightsError, match=r"the operation 'math\.erfinv' of TensorFlow, which is none of those") as refused:
        imported(tmp_path, None, "h5")
    assert "could run code" not in str(refused.value)


def test_the_scale_is_found_where_the_graph_shows_it_and_asked_for_elsewhere(tmp_path):
    assert imported(tmp_path, shaped(40, 40))["scale"] == "raw"
    with pytest.raises(ConfigError, match="no layer of the model scales pixels"):
        imported(tmp_path, stacked())


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_last_activation_that_does_nothing_is_looked_through(tmp_path, activation):
    """As mixed precision's guides end a model."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((48, 48, 3))
    flat = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    scores = keras.layers.Dense(3, activation=activation)(flat)
    model = keras.Model(inputs, keras.layers.Activation("linear", dtype="float32")(scores))
    result = imported(tmp_path, model)
    assert result["multi_label"] == (activation == "sigmoid")
    images = pixels()
    assert scores_of(result, images) == pytest.approx(model.predict(images.astype(np.float32), verbose=0), abs=1e-5)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_small_outputs_are_probabilities_only_if_a_sigmoid_gives_them(tmp_path, activation):
    """Of networks that end in maps and their means."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((48, 48, 3))
    maps = keras.layers.Conv2D(3, 3, activation=activation)(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(maps))
    images = pixels()
    own = model.predict(images.astype(np.float32), verbose=0)
    assert own.min() >= 0
    assert own.max() <= 1
    result = imported(tmp_path, model)
    assert result["multi_label"] == (activation == "sigmoid")
    assert scores_of(result, images) == pytest.approx(own if activation == "sigmoid" else softmax(own), abs=1e-5)


def test_what_makes_bytes_of_smaller_numbers_does_not_scale(tmp_path):
    """An EfficientNet, which takes bytes, in a model that takes numbers from 0 to 1."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((48, 48, 3))
    inner = keras.Sequential([keras.Input((48, 48, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3)])
    maps = inner(keras.layers.Rescaling(255.0)(inputs))
    scores = keras.layers.Dense(3, activation="softmax")(keras.layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(inputs, scores)
    with pytest.raises(ConfigError, match="no layer of the model scales pixels"):
        imported(tmp_path, model)
    images = pixels()
    own = model.predict(images / np.float32(255), verbose=0)
    assert scores_of(imported(tmp_path, model, scale="[0,1]"), images) == pytest.approx(own, abs=1e-5)


def test_the_hard_sigmoid_of_keras_2_is_another_function(tmp_path):
    inputs = keras.Input((48, 48, 3))
    flat = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="hard_sigmoid")(flat))
    assert imported(tmp_path, model, "h5")["multi_label"]
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        file.attrs["keras_version"] = b"2.15.0"
    shutil.rmtree(tmp_path / "bundle")
    with pytest.raises(WeightsError, match=r"Keras 2 wrote it, whose 'hard_sigmoid' is 0.2 x \+ 0.5"):
        imported(tmp_path, None, "h5")


def test_the_ensemble_of_two_scores_stored_features(tmp_path):
    """Its graph shows no head."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((48, 48, 3))
    flat = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Average()([keras.layers.Dense(3, activation="softmax")(flat) for _ in range(2)]))
    bundle = load_bundle(imported(tmp_path, model)["bundle"])
    found = load_engine(bundle).predict(pixels())
    assert load_head(bundle).predict(found.features) == pytest.approx(found.scores, abs=1e-6)


def test_the_signature_of_an_address_is_not_written_into_the_bundle(tmp_path):
    stacked().save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/model.keras"
        given = {"labels": str(tmp_path / "labels.txt"), "bundle": str(tmp_path / "bundle"), "scale": "[0,1]"}
        result = tlbatch.import_model(model=f"{address}?sig=secret", **given)
        server.shutdown()
    bundle = load_bundle(result["bundle"])
    assert bundle.facts["base"]["weights"] == address
    assert "secret" not in json.dumps(bundle.facts) + (bundle.folder / "card.html").read_text()


def test_what_loaded_the_training_images_sets_how_they_are_read(tmp_path):
    model = stacked()
    for loader, resize, fit, scale, background in (
        ("tlbatch", "antialias", "stretch", "[0,1]", "white"),
        ("keras-dataset", "keras", "stretch", "[0,1]", "hidden"),
        ("keras-generator", "nearest", "stretch", "[0,1]", "hidden"),
        ("teachable-machine", "lanczos", "crop-exact", None, "black"),
    ):
        given = {"scale": scale} if scale else {}
        result = imported(tmp_path, model, trained_with=loader, **given)
        assert (result["resize"], result["fit"], result["background"]) == (resize, fit, background)
        rules = load_bundle(result["bundle"]).pixel_rules
        assert rules.background == background
        assert rules.color_profiles == ("to_srgb" if loader == "tlbatch" else "ignored")
    assert result["scale"] == "[-1,1]"
    assert imported(tmp_path, model, trained_with="teachable-machine", fit="pad", scale="[0,1]")["fit"] == "pad"


@pytest.fixture
def folder(tmp_path):
    """Noise, whose labels depend on how it is resized."""
    made = tmp_path / "checked"
    (made / "b").mkdir(parents=True)
    for number in range(12):
        data = encoded(noisy((128, 128, 128), number, (150, 130)), "PNG")
        (made / ("b" if number % 2 else ".") / f"{number}.png").write_bytes(data)
    return made


def sharp() -> keras.Model:
    """A model that sees single pixels."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((48, 48, 3))
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255, -0.5)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", kernel_initializer="normal")(flat))


@pytest.mark.parametrize(("resize", "fit"), [("keras", "stretch"), ("keras", "crop"), ("keras", "pad"), ("nearest", "stretch")])
def test_a_bundle_is_checked_against_keras_own_loaders(tmp_path, folder, resize, fit):
    result = imported(tmp_path, sharp(), resize=resize, fit=fit, check=str(folder))
    assert result["background"] == "hidden"
    assert (result["check"]["images"], result["check"]["equal"], result["check"]["different"]) == (12, 1.0, [])


def test_a_witness_that_shows_other_pixels_is_refused(tmp_path, folder):
    """Keras's loaders show hidden colours."""
    image = noisy((128, 100, 160), 3, (131, 97))
    image.putalpha(60)
    (folder / "thin.png").write_bytes(encoded(image, "PNG"))
    assert imported(tmp_path, sharp(), resize="nearest", check=str(folder))["check"]["equal"] == 1
    with pytest.raises(ConfigError, match=r"show hidden colours and ignore colour profiles, and thin.png has some; give --exp"):
        imported(tmp_path, sharp(), resize="nearest", check=str(folder), background="white")
    with pytest.raises(ConfigError, match="this loader decodes JPEGs with the accurate transform; give --expected"):
        imported(tmp_path, sharp(), resize="nearest", check=str(folder), jpeg="fast")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("plan", ["fused", "split"])
def test_a_run_gives_the_scores_of_keras_own_pipeline(tmp_path, folder, ray_here, plan):
    """On JPEGs and PNGs, whose pixels are not rounded, and whose hidden colours show."""
    for number in range(4):
        image = noisy((128, 100, 160), number, (131, 97))
        image.putalpha(60 * number)
        (folder / f"hidden-{number}.png").write_bytes(encoded(image, "PNG"))
        (folder / f"{number}.jpg").write_bytes(encoded(noisy((128, 100, 160), number, (131, 97))))
    model = sharp()
    result = imported(tmp_path, model, trained_with="keras-dataset")
    tlbatch.classify(images=str(folder), bundle=result["bundle"], output=str(tmp_path / "o"), plan=plan, top_k=3)
    table = tlbatch.read_predictions(str(tmp_path / "o"))
    how = {"labels": None, "image_size": (48, 48), "shuffle": False, "verbose": False}
    dataset = keras.utils.image_dataset_from_directory(folder, **how)
    own = dict(zip(dataset.file_paths, model.predict(dataset, verbose=0), strict=True))
    assert len(table) == len(own) == 20
    for row in table.itertuples():
        given = dict(zip(row.top_labels, row.top_scores, strict=True))
        wanted = dict(zip(LABELS, own[row.uri], strict=True))
        assert given == pytest.approx(wanted, abs=1e-4)


def test_a_bundle_that_says_something_else_than_expected_is_not_written(tmp_path, folder):
    """The labels are those of another way of resizing."""
    model = sharp()
    own = imported(tmp_path, model, resize="nearest", check=str(folder))
    shutil.rmtree(own["bundle"])
    expected = tmp_path / "expected.csv"
    named = sorted(path for path in folder.rglob("*.png"))
    with expected.open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "label"])
        for path in named:
            pixel = np.asarray(keras.utils.load_img(path, target_size=(48, 48)), np.float32)[None]
            label = LABELS[int(softmax(np.log(model.predict(pixel, verbose=0))).argmax())]
            rows.writerow([path.relative_to(folder).as_posix(), label])
    assert imported(tmp_path, model, resize="nearest", check=str(folder), expected=str(expected))["check"]["equal"] == 1.0
    shutil.rmtree(own["bundle"])
    with pytest.raises(BundleError, match=r"Of 12 images in .* get another label than by the model's own pipeline"):
        imported(tmp_path, model, resize="antialias", check=str(folder), expected=str(expected))
    assert not (tmp_path / "bundle").exists()


def test_the_images_that_differ_most_are_shown(tmp_path, folder):
    """Also where the bundle is refused; each with both labels."""
    model, sheet = sharp(), tmp_path / "sheet.html"
    expected = tmp_path / "expected.csv"
    expected.write_text("key,label\n" + "".join(f"b/{number}.png,green\n" for number in range(1, 12, 2)))
    with pytest.raises(BundleError, match="no bundle was written"):
        imported(tmp_path, model, check=str(folder), expected=str(expected), sheet=str(sheet), resize="nearest")
    page = sheet.read_text()
    assert page.count("<figure") == page.count("data:image/jpeg") == 6
    assert page.count(", not green") > 1
    imported(tmp_path, model, check=str(folder), sheet=str(sheet), resize="nearest")
    assert sheet.read_text().count("<figure") == 12
    with pytest.raises(ConfigError, match="sheet: give the folder of its images with check"):
        imported(tmp_path, model, sheet=str(sheet))


def normalized() -> keras.Model:
    """A convolution and a normalization that was trained on pixels from -1 to 1."""
    keras.utils.set_random_seed(4)
    inputs = keras.Input((48, 48, 3))
    convolution, layer = keras.layers.Conv2D(8, 3, strides=2, use_bias=False), keras.layers.BatchNormalization()
    maps = layer(convolution(inputs))
    seen = np.asarray(convolution(np.random.default_rng(1).normal(0, 0.45, (8, 48, 48, 3)).astype("float32")))
    layer.moving_variance.assign(seen.var((0, 1, 2)))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps)))


@pytest.mark.parametrize(("scale", "warned"), [("[-1,1]", False), ("raw", True), ("[0,1]", True)])
def test_a_scale_that_the_first_normalization_was_not_trained_on_is_a_warning(tmp_path, caplog, scale, warned):
    """Both as the first layers and within a base."""
    for model in (normalized(), keras.Sequential([keras.Input((48, 48, 3)), normalized()])):
        caplog.clear()
        imported(tmp_path, model, scale=scale)
        told = [one.getMessage() for one in caplog.records if "first normalization" in one.getMessage()]
        assert len(told) == warned
        assert not told or (f"--scale {scale} gives" in told[0] and "--check shows which" in told[0])


def test_a_normalization_that_was_never_trained_says_nothing(tmp_path, caplog):
    model = normalized()
    model.layers[2].moving_variance.assign(np.ones(8))
    imported(tmp_path, model, scale="raw")
    assert "first normalization" not in caplog.text


def test_lora_is_merged(tmp_path):
    """Of a dense layer and of a convolution."""
    model = stacked()
    for layer in (model.layers[-1], model.layers[1].layers[1]):
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.random.default_rng(1).normal(0, 0.3, layer.lora_kernel_b.shape))
    own = model.predict(pixels() / np.float32(255), verbose=0)
    result = imported(tmp_path, model, scale="[0,1]")
    assert scores_of(result, pixels()) == pytest.approx(own, abs=1e-5)
    assert load_bundle(result["bundle"]).features_length == 16


def test_a_model_of_keras_hub_is_told_to_come_as_onnx(tmp_path):
    path = tmp_path / "model.keras"
    stacked().save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config |= {
        "class_name": "ResNetImageClassifier",
        "module": "keras_hub.src",
        "registered_name": "keras_hub>ResNetImageClassifier",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "config.json": json.dumps(config).encode()}.items():
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match=r"of Keras Hub, .* as ONNX: model.export\('model.onnx', format='onnx'\)"):
        imported(tmp_path, None, scale="[0,1]")


def test_a_check_without_images_or_without_a_folder_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="check: "):
        imported(tmp_path, sharp(), check=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="give the folder of its images with check"):
        imported(tmp_path, sharp(), expected="labels.csv")


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "keras-models.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_layers_below_others_are_converted_too(tmp_path, half):
    """A nested model, as in every transfer learning."""
    base = small_base("avg")
    inputs = keras.Input((48, 48, 3))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", dtype="float32")(base(inputs)))
    plain = in_float32(model)
    assert precision(plain) == "float32"
    assert [one.shape for one in plain.get_weights()] == [one.shape for one in model.get_weights()]


@pytest.fixture(scope="module")
def keras_2(tmp_path_factory):
    """Models that TensorFlow 2.15 has written (`support/keras2.py`)."""
    folder = tmp_path_factory.mktemp("keras2")
    with zipfile.ZipFile(ROOT / "tests" / "golden" / "keras2.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("caffe", "h5"), *((name, suffix) for name in ("tf", "torch", "layer", "machine") for suffix in ("h5", "keras"))],
)
def test_files_of_keras_2(tmp_path, keras_2, name, suffix):
    """Arithmetic of `preprocess_input` in its three modes, models in models, and what Teachable Machine builds."""
    given = {"trained_with": "teachable-machine"} if name == "machine" else {}
    shutil.copy(keras_2 / f"{name}.{suffix}", tmp_path / f"model.{suffix}")
    result = imported(tmp_path, None, suffix, **given)
    assert result["scale"] == ("[-1,1]" if name == "machine" else "raw")
    expected = json.loads((keras_2 / "scores.json").read_text())[name]
    assert scores_of(result, pixels()) == pytest.approx(np.array(expected), abs=1e-5)
