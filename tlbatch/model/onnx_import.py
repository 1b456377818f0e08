"""An ONNX classifier that was trained elsewhere -> base and head, which together give the same scores.

The features are what the last matrix multiplication (`Gemm`, or `MatMul` and `Add`) takes. If the graph does not end in one,
the scores themselves are the features. The base keeps the file's own operators; before them come those that scale the pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tlbatch.errors import WeightsError
from tlbatch.model import bases
from tlbatch.model.bases import Scaling
from tlbatch.model.foreign import (
    NOT_A_CLASSIFIER,
    Imported,
    as_trained,
    choose_output,
    enlarges,
    head_of,
    kind_of,
    probe_pixels,
    require_channels,
    require_same,
    shrinks,
)
from tlbatch.model.frozen import Frozen
from tlbatch.model.onnx_files import as_openvino, import_onnx, outputs_of_onnx, read_onnx, require_sizes
from tlbatch.model.own_keras import with_own_keras
from tlbatch.schema import PixelRules, Size

if TYPE_CHECKING:
    import onnx

_ARITHMETIC = ("Sub", "Add", "Mul", "Div")
#: Operators before the first layer that do not scale.
_ARRANGES_PIXELS = (
    "Cast",
    "Clip",
    "Gather",
    "Identity",
    "Pad",
    "Reshape",
    "Resize",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "Upsample",
)
#: Operators that arrange or combine scores.
_ARRANGES = frozenset(
    [
        *("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
        *("Add", "AveragePool", "Concat", "Div", "GlobalAveragePool", "Mean", "Mul", "ReduceMean", "Sub", "Sum"),
    ]
)
#: Operators that change neither numbers nor their order in a graph that is not trained.
_SAME = ("Identity", "Dropout")
#: The largest difference between the scores of base and head and those of the model: ONNX Runtime merges other operators where
#: the graph is cut, and a network whose numbers are not well scaled enlarges the differences in the last bits.
_TOLERANCE = 1e-4
#: Prefix of the file's own names, so that ours cannot be among them.
_PREFIX = "model/"


class LastLayer(NamedTuple):
    """The last layer of a graph: the tensor that it takes, (F, C) weights, (C,) biases."""

    takes: str
    weights: np.ndarray
    biases: np.ndarray


class OnnxClassifier:
    """An ONNX model as a `ForeignModel`.

    Args:
        data: the file.
        name: its address, for errors.
        output: the name of the output that classifies, if there are several.

    Raises:
        WeightsError: it is not allowed, or its inputs or outputs are of another kind.
        ConfigError: it has several outputs and none is named, or none of that name; or a package is not installed.
    """

    precision = "float32"

    def __init__(self, data: bytes, name: str, output: str | None = None) -> None:
        onnx = import_onnx()
        self._model = onnx.compose.add_prefix(read_onnx(data, name), _PREFIX)
        graph = self._model.graph
        held = {one.name for one in graph.initializer}
        inputs = [one for one in graph.input if one.name not in held]  # files of IR version 3 list their weights as inputs
        self._output = _PREFIX + choose_output([str(one.name).removeprefix(_PREFIX) for one in graph.output], output)
        if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
            raise WeightsError(NOT_A_CLASSIFIER)
        kind = onnx.helper.tensor_dtype_to_np_dtype(inputs[0].type.tensor_type.elem_type)
        if kind not in (np.float32, np.uint8):
            raise WeightsError(f"The model takes {kind}; import it in float32, the numbers that tlbatch computes in.")
        self.takes, self._input = str(kind), inputs[0].name
        sides = [one.dim_value or None for one in inputs[0].type.tensor_type.shape.dim]
        self.channels_first = sides[1] in (1, 3) or sides[3] not in (1, 3)
        self.channels = require_channels(sides[1] if self.channels_first else sides[3])
        self.size = (sides[2], sides[3]) if self.channels_first else (sides[1], sides[2])
        if sides[0] not in (None, 1):
            raise WeightsError(f"The model takes {sides[0]} images at once; export it for one, or for any number.")
        self._batch = sides[0]

    def scaling_layer(self) -> str | None:
        """As `ForeignModel` says."""
        tensor, constants = self._input, _constants(self._model.graph)
        while True:
            users = [node for node in self._model.graph.node if tensor in node.input and node.op_type != "Shape"]
            if len(users) != 1 or users[0].op_type not in (*_ARITHMETIC, *_ARRANGES_PIXELS):
                return None
            (node,) = users
            numbers = [constants[one] for one in node.input if one in constants] if node.op_type in _ARITHMETIC else []
            if enlarges(node.op_type, numbers):
                return None
            if shrinks(node.op_type, numbers):
                return str(node.name or node.output[0]).removeprefix(_PREFIX)
            tensor = node.output[0]

    def spread(self, numbers: np.ndarray) -> float | None:  # noqa: ARG002  # as of every `ForeignModel`
        """None: exporters fold normalizations into the layers before them."""
        return None

    def split(self, name: str, scaling: Scaling, size: Size, labels: Sequence[str], rules: PixelRules) -> Imported:
        """As `ForeignModel` says."""
        self._set_size(size)
        probes = probe_pixels(size, rules.dtype)
        outputs = self._run(self._numbers(probes, scaling, size, rules))
        if outputs.ndim != 2:
            raise WeightsError(NOT_A_CLASSIFIER)
        activation, tensor = self._last_activation()
        dense = _dense_of(self._model.graph, tensor)
        source = self._base(dense.takes if dense else tensor, scaling, size, rules)
        (features,) = outputs_of_onnx(source, probes)
        if features.ndim != 2:  # the last multiplication takes maps
            dense, source = None, self._base(tensor, scaling, size, rules)
            (features,) = outputs_of_onnx(source, probes)
        shown = _shows_sigmoid(self._model.graph, tensor)
        kind = kind_of(activation if activation or dense is None else "linear", outputs, sigmoid=shown)
        head, multi_label = _keras_head(features.shape[1], dense, activation, outputs.shape[1], kind, labels)
        require_same(np.asarray(head(features, training=False)), outputs, kind, labels, _TOLERANCE)
        base = bases.Base(self._model.producer_name or "onnx", size[0], scaling)
        digest, length, files = hashlib.sha256(source).hexdigest(), features.shape[1], as_openvino(source)
        frozen = Frozen(base, size, rules, name, length, digest, source, files, batch=self._batch)
        return Imported(frozen, head, multi_label, dense is not None, kind)

    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        """As `ForeignModel` says; in float32."""
        return self._run(self._ordered(numbers))

    def _ordered(self, numbers: np.ndarray) -> np.ndarray:
        ordered = numbers.transpose(0, 3, 1, 2) if self.channels_first else numbers
        return np.ascontiguousarray(ordered).astype(self.takes, copy=False)

    def _run(self, given: np.ndarray) -> np.ndarray:
        (found,) = outputs_of_onnx(self._model.SerializeToString(), given, [self._output])
        return np.asarray(found, np.float32)

    def _numbers(self, probes: np.ndarray, scaling: Scaling, size: Size, rules: PixelRules) -> np.ndarray:
        """What the operators before the base make of pixels.

        The base is compared with the model on these, because networks enlarge differences in the last bit of a float.

        Raises:
            WeightsError: they are not the numbers of its training.
        """
        (found,) = outputs_of_onnx(self._base(self._input, scaling, size, rules), probes)
        wanted = self._ordered(as_trained(scaling, probes, self.channels))
        if not np.allclose(found, wanted, rtol=1e-5, atol=1e-5):
            raise WeightsError("The model cannot be imported: its pixels cannot be scaled as in its training.")
        return found.astype(self.takes, copy=False)

    def off_float32(self, numbers: np.ndarray) -> float:  # noqa: ARG002  # as of every `ForeignModel`
        """Zero: it computes in float32."""
        return 0.0

    def _set_size(self, size: Size) -> None:
        """Make the shape of its input that of one image, and check what it then computes."""
        (taken,) = (one for one in self._model.graph.input if one.name == self._input)
        dims = taken.type.tensor_type.shape.dim
        for dim, side in zip(dims[2:] if self.channels_first else dims[1:3], size, strict=True):
            dim.dim_value = side
        require_sizes(self._model, self._input)

    def _last_activation(self) -> tuple[str | None, str]:
        """`softmax`, `sigmoid` or None, and the tensor that it takes."""
        makers = {out: node for node in self._model.graph.node for out in node.output}
        tensor = _through_same(makers, self._output)
        node = makers.get(tensor)
        if node is not None and node.op_type in ("Softmax", "Sigmoid"):
            return node.op_type.lower(), _through_same(makers, node.input[0])
        return None, tensor

    def _base(self, tensor: str, scaling: Scaling, size: Size, rules: PixelRules) -> bytes:
        """An ONNX file: pixels (batch, height, width, 3) -> the tensor as features (batch, F)."""
        onnx = import_onnx()
        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        kept = _before(self._model.graph, tensor)
        used = {one for node in kept for one in node.input}
        pixels_type = onnx.TensorProto.UINT8 if rules.dtype == "uint8" else float32
        pixels = helper.make_tensor_value_info("pixels", pixels_type, [self._batch or "batch", *size, 3])
        ours = _Nodes()
        number = ours.add("Cast", ["pixels"], to=float32)
        if self.channels == 1:
            number = _grey(ours, number, whole=rules.dtype == "uint8")
        number = _scaled(ours, number, scaling)
        if self.channels_first:
            number = ours.add("Transpose", [number], perm=[0, 3, 1, 2])
        ours.add("Cast" if self.takes == "uint8" else "Identity", [number], self._input, **_to(self.takes))
        graph = helper.make_graph(
            [*ours.nodes, *kept, helper.make_node("Cast", [tensor], ["features"], to=float32)],
            "base",
            [pixels],
            [helper.make_tensor_value_info("features", float32, [self._batch or "batch", None])],
            [*ours.constants, *(one for one in self._model.graph.initializer if one.name in used)],
        )
        made = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=max(4, self._model.ir_version))
        return bytes(made.SerializeToString(deterministic=True))


class _Nodes:
    """Operators in the order in which they are added, with the constants that they take."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operation: str, inputs: Sequence[str | np.ndarray], output: str | None = None, **attributes: Any) -> str:
        """Add an operator, and give the name of its output."""
        onnx = import_onnx()
        made = output or f"pixels/{len(self.nodes)}"
        names = []
        for one in inputs:
            if not isinstance(one, str):
                self.constants.append(onnx.numpy_helper.from_array(one, f"pixels/constant/{len(self.constants)}"))
            names.append(one if isinstance(one, str) else self.constants[-1].name)
        self.nodes.append(onnx.helper.make_node(operation, names, [made], **attributes))
        return made


def _to(kind: str) -> dict[str, int]:
    return {"to": int(import_onnx().TensorProto.UINT8)} if kind == "uint8" else {}


def _grey(ours: _Nodes, number: str, *, whole: bool) -> str:
    """As `bases.scaled` makes one channel of three."""
    summed = ours.add("MatMul", [number, np.array(bases.GREY_PARTS, np.float32).reshape(3, 1)])
    parts = ours.add("Mul", [summed, np.array(1 / 65536, np.float32)])
    return ours.add("Floor", [ours.add("Add", [parts, np.array(0.5, np.float32)])]) if whole else parts


def _scaled(ours: _Nodes, number: str, scaling: Scaling) -> str:
    if scaling == "caffe":
        number = ours.add("Gather", [number, np.array([2, 1, 0], np.int64)], axis=3)
    scale, offset = bases.scale_and_offset(scaling)
    if np.any(np.not_equal(scale, 1)):
        number = ours.add("Mul", [number, np.array(scale, np.float32)])
    return ours.add("Add", [number, np.array(offset, np.float32)]) if np.any(offset) else number


def _shows_sigmoid(graph: onnx.GraphProto, tensor: str) -> bool:
    """Whether a tensor is what a sigmoid gives, or a mean, a sum or another arrangement of that."""
    makers = {out: node for node in graph.node for out in node.output}
    wanted, seen = [tensor], set()
    while wanted:
        name = wanted.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ("Sigmoid", "HardSigmoid"):
            return True
        if node.op_type in _ARRANGES:
            wanted.extend(node.input)
    return False


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Name -> numbers of everything in a graph that is the same for every image and needs no computing."""
    onnx = import_onnx()
    found = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in _SAME and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _through_same(makers: dict[str, onnx.NodeProto], tensor: str) -> str:
    while tensor in makers and makers[tensor].op_type in _SAME:
        tensor = str(makers[tensor].input[0])
    return tensor


def _before(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """The operators that a tensor is computed by, in order."""
    wanted, kept = {tensor}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _dense_of(graph: onnx.GraphProto, tensor: str) -> LastLayer | None:
    """The multiplication that gives a tensor, if its weights are in the file."""
    makers, constants = {out: node for node in graph.node for out in node.output}, _constants(graph)
    node = makers.get(tensor)
    if node is None:
        return None
    if node.op_type == "Gemm":
        return _of_gemm(node, constants)
    biases = np.zeros(1, np.float32)
    if node.op_type == "Add" and any(one in constants for one in node.input):
        first = int(node.input[0] in constants)  # which of the two is multiplied
        biases = constants[node.input[1 - first]]
        node = makers.get(_through_same(makers, node.input[first]))
    if node is None or node.op_type != "MatMul" or node.input[1] not in constants:
        return None
    weights = constants[node.input[1]]
    return _dense(node.input[0], weights, biases)


def _of_gemm(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> LastLayer | None:
    onnx = import_onnx()
    how = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    biases = constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.float32)
    if how.get("transA") or node.input[1] not in constants or biases is None:
        return None
    weights = constants[node.input[1]]
    weights = weights.T if how.get("transB") else weights
    return _dense(node.input[0], weights * np.float32(how.get("alpha", 1)), biases * np.float32(how.get("beta", 1)))


def _dense(takes: str, weights: np.ndarray, biases: np.ndarray) -> LastLayer | None:
    if weights.ndim != 2 or biases.size not in (1, weights.shape[1]):
        return None
    return LastLayer(takes, weights, np.broadcast_to(biases.reshape(-1), weights.shape[1]).astype(np.float32))


@with_own_keras
def _keras_head(
    length: int, dense: LastLayer | None, activation: str | None, units: int, kind: str, labels: Sequence[str]
) -> tuple[Any, bool]:
    import keras

    layers: list[Any] = []
    if dense is not None:
        layer = keras.layers.Dense(units, activation=activation)
        layer.build((None, length))
        layer.set_weights([dense.weights, dense.biases])
        layers = [layer]
    elif activation is not None:
        layers = [keras.layers.Activation(activation)]
    return head_of(length, layers, units, kind, labels)
