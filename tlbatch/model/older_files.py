"""The configuration of a Keras model of yesterday -> the same in the words of today's Keras, by data alone.

Nothing of the file is run, and the result is checked like any other configuration (`safe_load`). Keras 2, of TensorFlow up to
2.15, named its own modules, and wrote the arithmetic of a graph as functions of TensorFlow. Keras 3 writes the operations of a
graph into `.h5` files without their modules, and then cannot read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tlbatch.model.own_keras import import_keras
from tlbatch.stdio import import_quietly

#: Where Keras's tensor operations stand.
OPERATIONS = tuple(f"keras.src.ops.{part}" for part in ("numpy", "nn", "core", "math", "image"))
#: Classes of models -> the module that Keras 3 finds them in.
_MODELS = {"Functional": "keras.src.models.functional", "Sequential": "keras", "Model": "keras"}
#: How Keras 2 names a function of TensorFlow in a graph.
FUNCTIONS = ("TFOpLambda", "SlicingOpLambda")
#: Arithmetic with a number, or with one number for each channel -> what it multiplies with and adds.
_ARITHMETIC: dict[str, tuple[str, Callable[[np.ndarray], tuple[Any, Any]]]] = {
    "math.truediv": ("y", lambda y: (1 / y, 0.0)),
    "math.divide": ("y", lambda y: (1 / y, 0.0)),
    "math.multiply": ("y", lambda y: (y, 0.0)),
    "math.subtract": ("y", lambda y: (1.0, -y)),
    "math.add": ("y", lambda y: (1.0, y)),
    "__operators__.add": ("y", lambda y: (1.0, y)),
    "nn.bias_add": ("bias", lambda bias: (1.0, bias)),
}


def renewed(config: Any) -> Any:
    """A configuration, at any depth, as today's Keras writes it; what is not known stays as it is."""
    if isinstance(config, list):
        return [renewed(one) for one in config]
    if not isinstance(config, Mapping):
        return config
    made = {name: renewed(value) for name, value in config.items()}
    if not _is_object(made):
        return made
    if made["class_name"] in _MODELS and isinstance(made["config"].get("layers"), list):
        made["config"]["layers"] = _layers(made["config"])
    return _object(made)


def _is_object(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("class_name"), str) and isinstance(found.get("config"), dict)


def is_operation(module: str, name: str) -> bool:
    """Whether a module of Keras has a tensor operation of this name, such as the division that `preprocess_input` adds."""
    kind = getattr(import_quietly(module), name, None) if module in OPERATIONS else None
    return isinstance(kind, type) and issubclass(kind, import_keras().Operation)


def _layers(network: dict[str, Any]) -> list[Any]:
    """The layers of a model, connected as today's Keras counts, with an input of their own."""
    layers = [one for one in network["layers"] if isinstance(one, dict) and _is_object(one)]
    if len(layers) != len(network["layers"]):
        return list(network["layers"])  # something else, which is refused by its name
    first = layers[0] if layers else {}
    shape = first.get("config", {}).get("batch_input_shape")
    if shape and first["class_name"] != "InputLayer" and "inbound_nodes" not in first:
        layers.insert(0, {"class_name": "InputLayer", "config": {"batch_input_shape": shape, "dtype": "float32"}})
    for layer in layers:
        if layer["class_name"] != "InputLayer":
            layer["config"].pop("batch_input_shape", None)
    _count_calls_from_0(layers, network)
    return layers


def _count_calls_from_0(layers: list[dict[str, Any]], network: dict[str, Any]) -> None:
    """Keras 2 counted the making of a model in a graph as its first call; its references are lists of name, call, output.

    It also wrote one input, or one output, as a list.
    """
    models = {layer.get("name") for layer in layers if layer["class_name"] in _MODELS}
    every = [node for layer in layers for node in layer.get("inbound_nodes") or ()]
    nodes = [node for node in every if isinstance(node, list)]
    if not nodes:  # Keras 3
        return
    tensors = [one for node in every if isinstance(node, dict) for one in node["args"] if isinstance(one, dict)]
    nodes += [one["config"]["keras_history"] for one in tensors if one.get("class_name") == "__keras_tensor__"]
    ends = [end for name in ("input_layers", "output_layers") for end in network.get(name) or ()]
    found = [one for part in (*nodes, *ends) if isinstance(part, list) for one in _references(part) if one[0] in models]
    first = {name: min(one[1] for one in found if one[0] == name) for name in {one[0] for one in found}}
    for one in found:
        one[1] -= first[one[0]]
    for name in ("input_layers", "output_layers"):  # one tensor is no list of one
        if len(network.get(name) or ()) == 1 and isinstance(network[name][0], list):
            network[name] = network[name][0]


def _references(part: list[Any]) -> list[list[Any]]:
    """The references to outputs of layers in a node, or in the inputs or outputs of a model."""
    if len(part) >= 3 and isinstance(part[0], str) and isinstance(part[1], int):
        return [part]
    return [one for inner in part if isinstance(inner, list) for one in _references(inner)]


def _object(found: dict[str, Any]) -> dict[str, Any]:
    name, config = found["class_name"], found["config"]
    if name in FUNCTIONS:
        return _layer_of_function(found)
    if name in _MODELS and str(found.get("module")).startswith("keras."):
        return {**found, "module": _MODELS[name]}
    if name == "DepthwiseConv2D" and config.get("groups") == 1:
        config.pop("groups")  # Keras 2 wrote it, for a layer that has none
    if isinstance(config.get("axis"), list) and len(config["axis"]) == 1:
        config["axis"] = config["axis"][0]
    # A layer always says whether it is trainable, and an operation never does: some have the same name.
    if "inbound_nodes" in found and "module" not in found and "trainable" not in config:
        for node in found["inbound_nodes"] if name == "GetItem" else ():
            node["args"] = [_without_ellipsis(one) if isinstance(one, list) else one for one in node["args"]]
        module = next((module for module in OPERATIONS if is_operation(module, name)), None)
        return {**found, "module": module, "registered_name": name} if module else found
    return found


def _layer_of_function(found: dict[str, Any]) -> dict[str, Any]:
    """The layer or operation that does the same as a function of TensorFlow, if it takes one tensor and constants."""
    nodes = found.get("inbound_nodes")
    sources = _references(nodes) if isinstance(nodes, list) else []
    if len(sources) != 1:
        return found
    source, arguments = sources[0][:3], (sources[0][3:] or [{}])[0]
    config = found["config"]
    function = config.get("function")
    if function == "__operators__.getitem":
        return _slice(found, source, arguments.get("slice_spec"))
    if function == "cast":
        return _rescaling(found, source, 1.0, 0.0) if str(arguments.get("dtype")).startswith("float") else found
    if function not in _ARITHMETIC:
        return found
    name, numbers_of = _ARITHMETIC[function]
    numbers = _numbers(arguments.get(name))
    return found if numbers is None else _rescaling(found, source, *numbers_of(numbers))


def _numbers(value: Any) -> np.ndarray | None:
    """A constant: one number, or one for each channel."""
    if isinstance(value, Mapping) and "config" in value:
        value = value["config"].get("value")
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.ndim <= 1 and np.isfinite(numbers).all() and np.all(numbers != 0) else None


def _rescaling(found: Mapping[str, Any], source: list[Any], scale: Any, offset: Any) -> dict[str, Any]:
    name = found["config"].get("name", found.get("name"))
    values = {"scale": np.asarray(scale).tolist(), "offset": np.asarray(offset).tolist()}
    layer = {"class_name": "Rescaling", "config": {"name": name, "dtype": "float32", "trainable": False, **values}}
    place = {"module": "keras.layers", "registered_name": None} if "module" in found else {}
    return {**layer, **place, "name": found.get("name", name), "inbound_nodes": [[[*source, {}]]]}


def _slice(found: Mapping[str, Any], source: list[Any], spec: Any) -> dict[str, Any]:
    """Indexing of a tensor, such as the exchange of red and blue."""
    parts = spec.get("items", spec.get("config")) if isinstance(spec, Mapping) else spec
    if not isinstance(parts, list) or not all(_is_ellipsis(part) or _is_range(part) for part in parts):
        return dict(found)
    key = _without_ellipsis([part if _is_ellipsis(part) else _range(**part) for part in parts])
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None], "dtype": "float32", "keras_history": source}}
    return {
        "module": "keras.src.ops.numpy",
        "class_name": "GetItem",
        "config": {"name": found["config"].get("name", found.get("name"))},
        "registered_name": "GetItem",
        "name": found.get("name"),
        "inbound_nodes": [{"args": [tensor, key], "kwargs": {}}],
    }


def _is_ellipsis(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("class_name") == "__ellipsis__"


def _is_range(part: Any) -> bool:
    return isinstance(part, Mapping) and set(part) == {"start", "stop", "step"}


def _range(start: Any = None, stop: Any = None, step: Any = None) -> dict[str, Any]:
    return {"class_name": "__slice__", "config": {"start": start, "stop": stop, "step": step}}


def _without_ellipsis(key: list[Any]) -> list[Any]:
    """The index of a batch of images, of four dimensions, written out: Keras cannot read an ellipsis from `.h5` files."""
    found = next((place for place, part in enumerate(key) if _is_ellipsis(part)), None)
    return key if found is None else key[:found] + [_range()] * (5 - len(key)) + key[found + 1 :]
