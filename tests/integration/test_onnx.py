"""ONNX classifiers, as PyTorch's exporters and Keras write them: their own scores as bundles, features, new heads, and back."""

import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from support.models import pixels, small_base, softmax, stacked
from support.paths import ROOT
from support.pictures import write_store

import tlbatch
from tlbatch.errors import BundleError, ConfigError, WeightsError
from tlbatch.model import onnx_files
from tlbatch.model.bundle import ONNX, load_bundle
from tlbatch.model.engines import load_engine, load_head
from tlbatch.model.frozen import frozen_base_of

pytestmark = pytest.mark.filterwarnings("ignore:In the future `np.object`")  # of Keras's own export

LABELS = ("red", "green", "blue")
FILES = (
    "plain-dynamo",
    "plain-dynamo-one",
    "plain-script",
    "plain-script-one",
    "resnet-script",
    "vit-dynamo",
    "vit-script-one",
    "convnext-script",
    "squeezed-dynamo",
    "squeezed-script",
    "two-script",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Models that PyTorch has written (`support/onnx_models.py`)."""
    folder = tmp_path_factory.mktemp("onnx")
    with zipfile.ZipFile(ROOT / "tests" / "golden" / "onnx.zip") as archive:
        archive.extractall(folder)
    return folder


def imported(tmp_path: Path, model: Path | onnx.ModelProto, **settings) -> dict:
    path = model if isinstance(model, Path) else tmp_path / "model.onnx"
    if not isinstance(model, Path):
        path.write_bytes(model.SerializeToString())
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    given = {"labels": str(tmp_path / "labels.txt"), "bundle": str(tmp_path / "bundle"), "scale": "torch"}
    return tlbatch.import_model(model=str(path), **{**given, **settings})


def scores_of(bundle: str, images: np.ndarray) -> np.ndarray:
    return load_engine(load_bundle(bundle)).predict(images).scores


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_pytorchs_exporters_gives_its_own_scores(tmp_path, exported, name):
    settings = {"model_output": "scores"} if name.startswith("two") else {}
    result = imported(tmp_path, exported / f"{name}.onnx", **settings)
    kind = name.split("-")[0]
    outputs = np.array(json.loads((exported / "outputs.json").read_text())[kind])
    expected = outputs if kind in ("plain", "two") else softmax(outputs)
    assert np.ptp(expected, axis=0).max() > 0.1  # the images do differ
    assert scores_of(result["bundle"], pixels()) == pytest.approx(expected, abs=1e-5)
    lengths = {"plain": 16, "two": 16, "resnet": 16, "vit": 24, "convnext": 16, "squeezed": 3}
    assert (result["features_length"], result["split"]) == (lengths[kind], kind != "squeezed")
    assert load_bundle(result["bundle"]).batch == (1 if name.endswith("one") else None)
    assert (result["size"], result["scale"], result["precision"]) == (48, "torch", "float32")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["plain-dynamo", "plain-script-one"])
def test_an_onnx_bundle_goes_the_whole_way(tmp_path, exported, ray_here, name):
    """classify, a new head on its features, rescore, and both as ONNX again, with ONNX Runtime as the judge."""
    store = tmp_path / "store"
    write_store(store, 10)
    bundle = imported(tmp_path, exported / f"{name}.onnx", trained_with="torchvision", resize="pillow", fit="stretch")["bundle"]
    kept = {"features": True, "features_dtype": "float32"}
    first = tlbatch.classify(images=str(store), bundle=bundle, output=str(tmp_path / "table"), **kept)
    assert first["predicted"] == 30
    own = own_labels(exported / f"{name}.onnx", store)
    table = tlbatch.read_predictions(str(tmp_path / "table"))
    assert dict(zip(table["key"], table["label"], strict=True)) == own
    head = tlbatch.train(features=str(tmp_path / "table"), bundle=str(tmp_path / "head"))
    assert head["accuracy"] > 0.8
    made = load_bundle(head["bundle"])
    assert made.base_digest == load_bundle(bundle).base_digest
    again = tlbatch.rescore(features=str(tmp_path / "table"), bundle=head["bundle"], output=str(tmp_path / "again"))
    assert again["predicted"] == 30
    anew = tlbatch.classify(images=str(store), bundle=head["bundle"], output=str(tmp_path / "anew"))
    assert anew["predicted"] == 30
    one, other = (tlbatch.read_predictions(str(tmp_path / name)).sort_values("key") for name in ("again", "anew"))
    assert np.array_equal(one["score"].to_numpy(), other["score"].to_numpy())
    for url in (bundle, head["bundle"]):
        model = tlbatch.export_model(bundle=url, model=str(tmp_path / "plain.onnx"))["model"]
        found = np.concatenate([run_onnx(Path(model.removeprefix("file://")), one[None]) for one in pixels()])
        assert found == pytest.approx(scores_of(url, pixels()), abs=1e-5)
    with pytest.raises(WeightsError, match="comes from ONNX, which Keras cannot take in"):
        tlbatch.export_model(bundle=bundle, model=str(tmp_path / "plain.keras"))


def run_onnx(path: Path, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: values})[0]


def own_labels(path: Path, store: Path) -> dict[str, str]:
    """What a model of PyTorch says of the pictures of a store, by Pillow and ONNX Runtime."""
    found = {}
    for file in sorted(store.rglob("*.jpg")):
        image = Image.open(file).convert("RGB").resize((48, 48), Image.Resampling.BILINEAR)
        values = (np.asarray(image, np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        outputs = run_onnx(path, values.transpose(2, 0, 1)[None].astype(np.float32))
        found[file.relative_to(store).as_posix()] = LABELS[int(outputs.argmax())]
    return found


def test_photographs_get_a_models_own_labels(tmp_path, exported, photos):
    """By torchvision's pixels, checked before anything is written."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.glob("*.JPEG"))[:40]:
        (folder / path.name).with_suffix(".jpg").write_bytes(path.read_bytes())
    result = imported(tmp_path, exported / "vit-dynamo.onnx", trained_with="torchvision", scale="torch", check=str(folder))
    assert (result["check"]["images"], result["check"]["equal"]) == (40, 1.0)
    assert load_bundle(result["bundle"]).pixel_rules.shorter_side == 55


def test_which_of_several_outputs_classifies_is_asked(tmp_path, exported):
    with pytest.raises(ConfigError, match="model_output: the model has the outputs scores, maps; say which one classifies"):
        imported(tmp_path, exported / "two-script.onnx")
    with pytest.raises(ConfigError, match="model_output: the model has no output 'labels'; it has scores, maps"):
        imported(tmp_path, exported / "two-script.onnx", model_output="labels")
    with pytest.raises(WeightsError, match="one image and give one vector of scores"):
        imported(tmp_path, exported / "two-script.onnx", model_output="maps")
    assert not (tmp_path / "bundle").exists()


def test_a_keras_model_of_several_outputs_too(tmp_path):
    maps = small_base()
    scores = keras.layers.Dense(3, activation="softmax", name="kinds")(keras.layers.GlobalAveragePooling2D()(maps.output))
    boxes = keras.layers.Dense(4, name="boxes")(keras.layers.Flatten()(maps.output))
    model = keras.Model(maps.input, {"kinds": scores, "boxes": boxes})
    model.save(tmp_path / "model.keras")
    with pytest.raises(ConfigError, match="the model has the outputs boxes, kinds; say which one"):
        imported(tmp_path, tmp_path / "model.keras", scale="[0,1]")
    result = imported(tmp_path, tmp_path / "model.keras", scale="[0,1]", model_output="kinds")
    own = model.predict(pixels() / np.float32(255), verbose=0)["kinds"]
    assert scores_of(result["bundle"], pixels()) == pytest.approx(own, abs=1e-5)


def shaped(channels: int = 3, units: int = 3, first: object = None, **conv) -> keras.Model:
    keras.utils.set_random_seed(4)
    inputs = keras.Input((40, 60, channels))
    tensor = first(inputs) if first else inputs
    tensor = keras.layers.Conv2D(9, 3, strides=2, activation="relu", **conv)(tensor)
    dense = keras.layers.Dense(units, activation="softmax", kernel_initializer=keras.initializers.RandomNormal(0, 2, seed=1))
    return keras.Model(inputs, dense(keras.layers.GlobalAveragePooling2D()(tensor)))


@pytest.mark.parametrize("channels", [3, 1])
def test_a_file_of_kerass_exporter_gives_its_own_scores(tmp_path, channels):
    """Channels last; not square; of one channel, whose grey is Pillow's."""
    model = shaped(channels)
    model(np.zeros((1, *model.input.shape[1:]), np.float32))
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    result = imported(tmp_path, tmp_path / "model.onnx", scale="[-1,1]")
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in images])[..., None]
    own = model.predict((grey if channels == 1 else images) / np.float32(127.5) - 1, verbose=0)
    assert scores_of(result["bundle"], images) == pytest.approx(own, abs=1e-5)
    assert (result["size"], result["split"], result["features_length"]) == ([40, 60], True, 9)


@pytest.mark.parametrize("first", [keras.layers.Rescaling(1 / 255), lambda tensor: tensor / 127.5 - 1])
def test_a_file_that_scales_its_pixels_itself_is_not_scaled_twice(tmp_path, first):
    model = shaped(first=first)
    model(np.zeros((1, *model.input.shape[1:]), np.float32))
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    with pytest.raises(ConfigError, match="the model scales its pixels itself, in its layer"):
        imported(tmp_path, tmp_path / "model.onnx", scale="[-1,1]")
    result = imported(tmp_path, tmp_path / "model.onnx", scale=None)
    assert result["scale"] == "raw"
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert scores_of(result["bundle"], images) == pytest.approx(model.predict(images.astype("f4"), verbose=0), abs=1e-5)


def test_the_scale_is_asked_for_where_the_graph_does_not_show_it(tmp_path, exported):
    with pytest.raises(ConfigError, match="no layer of the model scales pixels, so say how"):
        imported(tmp_path, exported / "plain-script.onnx", scale=None)


@pytest.mark.parametrize("scaling", ["[-1,1]", "caffe", "torch"])
def test_a_keras_bundle_as_onnx_and_back(tmp_path, scaling):
    """Its pixels are uint8, and its file shows that it scales them itself."""
    stacked().save(tmp_path / "model.keras")
    bundle = imported(tmp_path, tmp_path / "model.keras", scale=scaling)["bundle"]
    exported = tlbatch.export_model(bundle=bundle, model=str(tmp_path / "plain.onnx"))
    assert exported["labels"] == list(LABELS)
    own = scores_of(bundle, pixels())
    assert run_onnx(tmp_path / "plain.onnx", pixels()) == pytest.approx(own, abs=1e-5)
    again = imported(tmp_path, tmp_path / "plain.onnx", scale=None, bundle=str(tmp_path / "again"))
    assert (again["scale"], again["split"]) == ("raw", True)
    assert scores_of(again["bundle"], pixels()) == pytest.approx(own, abs=1e-5)


def test_a_normalization_becomes_numbers_of_the_file(tmp_path):
    """Keras's own export makes its mean and deviation inputs of the network."""
    model = shaped(first=keras.layers.Normalization(mean=[120, 115, 100], variance=[60**2, 50**2, 40**2]))
    model.save(tmp_path / "model.keras")
    bundle = imported(tmp_path, tmp_path / "model.keras", scale=None)["bundle"]
    tlbatch.export_model(bundle=bundle, model=str(tmp_path / "plain.onnx"))
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert run_onnx(tmp_path / "plain.onnx", images) == pytest.approx(scores_of(bundle, images), abs=1e-5)


def test_gelu_which_kerass_exporter_writes_in_an_operator_that_onnx_does_not_have(tmp_path):
    """Into a file of ours, and out of one of Keras."""
    model = shaped()
    inputs = keras.Input((40, 60, 3))
    curved = keras.layers.Activation("gelu")(keras.layers.Dense(9)(model.layers[-2](model.layers[1](inputs))))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(curved))
    model.save(tmp_path / "model.keras")
    bundle = imported(tmp_path, tmp_path / "model.keras", scale="[0,1]")["bundle"]
    tlbatch.export_model(bundle=bundle, model=str(tmp_path / "plain.onnx"))
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), np.uint8)
    assert run_onnx(tmp_path / "plain.onnx", images) == pytest.approx(scores_of(bundle, images), abs=1e-5)
    model(np.zeros((1, 40, 60, 3), np.float32))
    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)
    result = imported(tmp_path, tmp_path / "model.onnx", scale="[0,1]")
    own = model.predict(images / np.float32(255), verbose=0)
    assert scores_of(result["bundle"], images) == pytest.approx(own, abs=1e-5)


def test_what_onnx_runtime_cannot_run_is_not_written(tmp_path):
    """Keras's export of a convolution in groups is a file that no runtime reads."""
    shaped(groups=3).save(tmp_path / "model.keras")
    bundle = imported(tmp_path, tmp_path / "model.keras", scale="raw")["bundle"]
    with pytest.raises(WeightsError, match="ONNX Runtime cannot run the model"):
        tlbatch.export_model(bundle=bundle, model=str(tmp_path / "plain.onnx"))
    assert not (tmp_path / "plain.onnx").exists()


def test_an_onnx_bundle_runs_in_openvino_on_cpus(tmp_path, exported):
    bundle = imported(tmp_path, exported / "plain-script.onnx")["bundle"]
    for engine in ("tensorflow", "jax"):
        with pytest.raises(ConfigError, match="comes from ONNX, which runs in OpenVINO on CPUs"):
            load_engine(load_bundle(bundle), engine)
    with pytest.raises(ConfigError, match="set num_gpus=0"):
        tlbatch.classify(images=str(tmp_path), bundle=bundle, output=str(tmp_path / "out"), num_gpus=1, engine="jax")


def attribute(name: str, value: object) -> onnx.AttributeProto:
    return helper.make_attribute(name, value)


def first_weights(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if len(one.dims) == 4)


def of_another_domain(model):
    model.graph.node[0].domain = "org.example"
    model.opset_import.append(helper.make_opsetid("org.example", 1))


def with_a_function(model):
    made = helper.make_function("org.example", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [])
    made.opset_import.append(helper.make_opsetid("", 17))
    model.functions.append(made)


def with_a_graph(model):
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [], [])
    model.graph.node[0].attribute.append(attribute("body", inner))


def with_an_operator(name):
    def change(model):
        model.graph.node[0].op_type = name

    return change


def stored_elsewhere(model):
    weights = first_weights(model)
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.append(onnx.StringStringEntryProto(key="location", value="numbers.bin"))
    weights.ClearField("raw_data")


def constant_stored_elsewhere(model):
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL, name="c")
    tensor.external_data.append(onnx.StringStringEntryProto(key="location", value="numbers.bin"))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


def larger_than_stored(model):
    first_weights(model).dims[0] *= 4


def of_texts(model):
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"word"]))


def sparse(model):
    values, places = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def of_a_later_version(model):
    model.opset_import[0].version = 999


def in_half_precision(model):
    model.graph.node.append(helper.make_node("Cast", [model.graph.node[0].output[0]], ["half"], to=TensorProto.FLOAT16))


def with_half_of_the_bits(model):
    model.graph.initializer.append(helper.make_tensor("short", TensorProto.BFLOAT16, [1], [1.0]))


def in_training(model):
    model.graph.initializer.append(helper.make_tensor("trains", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("Dropout", [model.graph.node[0].output[0], "", "trains"], ["dropped"]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (of_another_domain, r"the operator 'Conv' of 'org.example', which is none of those that only compute"),
        (with_a_function, "contains functions of its own, such as 'Twice'"),
        (with_a_graph, "its operator 'Conv' contains a graph"),
        (with_an_operator("If"), "the operator 'If', which is none of those"),
        (with_an_operator("Loop"), "the operator 'Loop', which is none of those"),
        (with_an_operator("RandomNormalLike"), "the operator 'RandomNormalLike', which is none of those"),
        (with_an_operator("QuantizeLinear"), "the operator 'QuantizeLinear', which is none of those"),
        (with_an_operator("NoSuchThing"), "the operator 'NoSuchThing', which is none of those"),
        (
            stored_elsewhere,
            r"in another file. Write one file: torch.onnx.export\(..., external_data=False",
        ),
        (constant_stored_elsewhere, "its numbers are stored in another file"),
        (larger_than_stored, "declares 4,608 numbers, and 1,152 are stored"),
        (of_texts, "holds no numbers that are computed with"),
        (sparse, "it contains sparse tensors"),
        (of_a_later_version, "its operators are of version 999; 7 to"),
        (in_half_precision, "it computes in half precision, or less; export it in float32"),
        (with_half_of_the_bits, "it computes in half precision, or less; export it in float32"),
        (in_training, "it is in the mode of training; export it for inference"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_runs_it(
    tmp_path, exported, monkeypatch, change: Callable[[onnx.ModelProto], None], sentence: str
):
    model = onnx.load(exported / "plain-script.onnx")
    change(model)
    ran: list[object] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **more: ran.append(given))
    monkeypatch.setattr(onnx_files, "converted", ran.append)
    (tmp_path / "numbers.bin").write_bytes(bytes(1 << 16))
    with pytest.raises(WeightsError, match=sentence):
        imported(tmp_path, model)
    assert ran == []
    assert not (tmp_path / "bundle").exists()


def test_a_file_and_an_operator_of_absurd_size_are_refused(tmp_path, exported, monkeypatch):
    """By limits that are lowered."""
    with monkeypatch.context() as lowered:
        lowered.setattr(onnx_files, "_MOST_BYTES", 5000)
        with pytest.raises(WeightsError, match=r"has 7,229 bytes; at most 5,000 are read"):
            imported(tmp_path, exported / "plain-script-one.onnx")
    monkeypatch.setattr(onnx_files, "_MOST_NUMBERS", 500)
    with pytest.raises(WeightsError, match=r"The model computes 1,152 numbers at once .* for one image"):
        imported(tmp_path, exported / "plain-script-one.onnx")


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x07" * 20])
def test_what_is_no_onnx_file_is_a_sentence(tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(WeightsError, match=r"The model .*model.onnx (is not an ONNX model|cannot be read safely): "):
        imported(tmp_path, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("shape", "kind", "sentence"),
    [
        ([1, 4, 48, 48], TensorProto.FLOAT, "images with 4 channels"),
        ([4, 3, 48, 48], TensorProto.FLOAT, "takes 4 images at once"),
        ([1, 3, 48, 48], TensorProto.FLOAT16, "takes float16; import it in float32"),
        (["n", 3, "h", "w"], TensorProto.FLOAT, "give the size it was trained at with --size"),
    ],
)
def test_other_inputs_are_sentences(tmp_path, shape, kind, sentence):
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    taken = helper.make_tensor_value_info("x", kind, shape)
    graph = helper.make_graph(nodes, "g", [taken], [helper.make_tensor_value_info("y", kind, ["n", "c"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises((WeightsError, ConfigError), match=sentence):
        imported(tmp_path, model)


def averages(*before: tuple, after: Sequence[tuple] = (), shape: tuple = ("n", 3, "h", "w")) -> onnx.ModelProto:
    """A model of the mean of each channel: operators with one input and constants, before and after it."""
    nodes, constants, tensor = [], [], "x"
    for number, (operator, *values) in enumerate([*before, ("GlobalAveragePool",), ("Flatten",), *after]):
        names = [f"c{number}-{place}" for place in range(len(values))]
        constants += [numpy_helper.from_array(np.asarray(value), name) for name, value in zip(names, values, strict=True)]
        nodes.append(helper.make_node(operator, [tensor, *names], [f"t{number}"]))
        tensor = f"t{number}"
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    gives = helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", "c"])
    graph = helper.make_graph(nodes, "g", [taken], [gives], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="ORTMaker")


def test_any_size_takes_the_one_that_is_said(tmp_path):
    """And small logits are no probabilities."""
    result = imported(tmp_path, averages(), scale="[0,1]", size="40x56")
    assert (result["size"], result["split"], result["multi_label"]) == ([40, 56], False, False)
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 56, 3), np.uint8)
    means = (images / 255).mean((1, 2))
    assert scores_of(result["bundle"], images) == pytest.approx(softmax(means), abs=1e-5)


def test_what_a_sigmoid_gives_are_several_labels(tmp_path):
    model = averages(("Sigmoid",), after=(("Mul", np.float32(0.5)),), shape=("n", 3, 48, 48))
    result = imported(tmp_path, model, scale="[0,1]")
    assert result["multi_label"]
    expected = (0.5 / (1 + np.exp(-(pixels() / np.float32(255))))).mean((1, 2))
    assert scores_of(result["bundle"], pixels()) == pytest.approx(expected, abs=1e-5)


def test_a_head_that_does_nothing_scores_stored_features(tmp_path):
    """As of a model whose graph does not show where its head begins."""
    bundle = load_bundle(imported(tmp_path, averages(after=(("Softmax",), ("Flatten",)), shape=("n", 3, 48, 48)))["bundle"])
    found = load_engine(bundle).predict(pixels())
    assert load_head(bundle).predict(found.features) == pytest.approx(found.scores, abs=1e-6)


@pytest.mark.parametrize(
    ("before", "scale"),
    [
        ([("Slice", [2], [-4], [1], [-1]), ("Add", np.full((3, 1, 1), -110, np.float32))], "raw"),  # as caffe's
        ([("Clip", np.float32(0), np.float32(255)), ("Div", np.float32(255))], "raw"),
        ([("Mul", np.float32(127.5)), ("Add", np.float32(127.5)), ("Div", np.float32(255))], None),
        ([("Mul", np.float32(255)), ("Sub", np.float32(110))], None),
    ],
)
def test_the_scale_is_found_where_the_graph_shows_it(tmp_path, before, scale):
    """And not where it makes bytes of smaller numbers."""
    model = averages(*before, shape=("n", 3, 48, 48))
    if scale is None:
        with pytest.raises(ConfigError, match="no layer of the model scales pixels"):
            imported(tmp_path, model, scale=None)
    else:
        assert imported(tmp_path, model, scale=None)["scale"] == scale


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        ([("Expand", np.int64([1, 1000, 3]))], r"computes 3,000 numbers at once \('model/t2'\) for one image"),
        ([("ReduceSum",), ("Squeeze",)], "must take one image and give one vector of scores"),
    ],
)
def test_outputs_that_are_too_large_or_no_vectors_are_refused(tmp_path, monkeypatch, after, sentence):
    monkeypatch.setattr(onnx_files, "_MOST_NUMBERS", 2_000)
    with pytest.raises(WeightsError, match=sentence):
        imported(tmp_path, averages(after=after, shape=("n", 3, 24, 24)), scale="[0,1]")


def test_what_grows_with_the_image_s_numbers_is_refused(tmp_path):
    model = averages(shape=("n", 3, 48, 48))
    model.graph.node.append(helper.make_node("NonZero", ["t1"], ["places"]))
    model.graph.node.append(helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT))
    model.graph.output[0].name = "numbers"
    with pytest.raises(WeightsError, match="How much the operator 'NonZero' of the model gives depends on the image"):
        imported(tmp_path, model, scale="[0,1]")


def test_a_base_in_a_bundle_is_checked_like_a_file(tmp_path, exported):
    """Somebody else may have written the bundle."""
    bundle = load_bundle(imported(tmp_path, exported / "plain-script.onnx")["bundle"])
    bundle.require_whole()
    model = onnx.load(bundle.folder / ONNX)
    with_an_operator("If")(model)
    (bundle.folder / ONNX).write_bytes(model.SerializeToString())
    with pytest.raises((WeightsError, BundleError), match=r"which is none of those that only compute"):
        frozen_base_of(bundle)


def test_without_the_packages_a_sentence_says_which(tmp_path, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"install tlbatch\[onnx\]"):
        imported(tmp_path, exported / "plain-script.onnx")
