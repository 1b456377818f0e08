"""An ONNX file -> a graph that only computes, checked before anything runs it; and what ONNX Runtime and OpenVINO make of it.

Allowed are the operators of ONNX's own domain, except those that contain graphs, draw random numbers, take texts or sequences,
or are quantised. Everything else is refused, and the error names it: operators and functions of other origin, numbers that are
stored in other files, tensors that declare more than they store, and results that no image model has.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import ConfigError, WeightsError, line_of
from tlbatch.model.openvino import Files, converted

if TYPE_CHECKING:
    import onnx

#: The largest file, and the most numbers that one operator may give for one image.
_MOST_BYTES, _MOST_NUMBERS = 1 << 30, 1 << 28
#: The oldest version of the operators that ONNX Runtime promises to run.
_OLDEST = 7
#: How operators begin that do not compute the same numbers from numbers each time, or do so in integers.
_REFUSED = (
    "Bernoulli",
    "ConvInteger",
    "Dequantize",
    "DynamicQuantize",
    "If",
    "ImageDecoder",
    "Loop",
    "MatMulInteger",
    "Multinomial",
    "Optional",
    "QLinear",
    "Quantize",
    "Random",
    "Regex",
    "Scan",
    "Sequence",
    "SplitToSequence",
    "String",
    "TfIdf",
)
#: Operators whose output is as large as the numbers of the image say.
_SIZED_BY_NUMBERS = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
_HALF = "it computes in half precision, or less; export it in float32, the numbers that tlbatch computes in"
_ONE_FILE = (
    "its numbers are stored in another file. Write one file: torch.onnx.export(..., external_data=False), or "
    "onnx.save(onnx.load(FILE), NEW)"
)


def read_onnx(data: bytes, name: str) -> onnx.ModelProto:
    """The model of an ONNX file, if it only describes a network and its numbers.

    Args:
        data: the file.
        name: how errors call it.

    Raises:
        WeightsError: it is not ONNX, or not allowed; the error says what.
        ConfigError: the package `onnx` is not installed.
    """
    onnx = import_onnx()
    if len(data) > _MOST_BYTES:
        raise WeightsError(f"The model {name} has {len(data):,} bytes; at most {_MOST_BYTES:,} are read.")
    try:
        model = with_erf(onnx.ModelProto.FromString(data))
        _require_allowed(model)
        onnx.checker.check_model(model)
    except ValueError as error:
        raise WeightsError(f"The model {name} cannot be read safely: {error}.") from None
    except Exception as error:  # of protobuf and of ONNX's checker, which have no kind in common
        raise WeightsError(f"The model {name} is not an ONNX model: {line_of(error)}.") from None
    return with_own_domain(model)


def with_own_domain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the domains of operators that it does not use: `read_onnx` allows ONNX's own alone."""
    kept = [one for one in model.opset_import if one.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def with_erf(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with `Erf` for the operator `Erfc`, which ONNX does not have.

    tf2onnx (1.17) writes it for a GELU of TensorFlow 2.21, as if it were ONNX's own.
    """
    helper, nodes = import_onnx().helper, []
    for node in model.graph.node:
        if node.op_type != "Erfc" or node.domain:
            nodes.append(node)
            continue
        one, part = f"{node.output[0]}/one", f"{node.output[0]}/erf"
        value = helper.make_tensor(one, import_onnx().TensorProto.FLOAT, [], [1.0])
        nodes.append(helper.make_node("Constant", [], [one], value=value))
        nodes.append(helper.make_node("Erf", list(node.input), [part]))
        nodes.append(helper.make_node("Sub", [one, part], list(node.output), name=node.name))
    if len(nodes) != len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return model


def import_onnx() -> Any:
    """The package `onnx`; raises ConfigError if it is not installed."""
    try:
        import onnx
        import onnx.checker
        import onnx.compose
        import onnx.shape_inference
    except ImportError:
        raise ConfigError("ONNX models need the packages onnx and onnxruntime: install tlbatch[onnx].") from None
    return onnx


def _require_allowed(model: onnx.ModelProto) -> None:
    """Raises ValueError, which says what is not allowed."""
    onnx = import_onnx()
    if model.functions:
        raise ValueError(f"it contains functions of its own, such as {model.functions[0].name!r}")
    newest, used = onnx.defs.onnx_opset_version(), {one.domain or "ai.onnx": one.version for one in model.opset_import}
    if not _OLDEST <= used.get("ai.onnx", 0) <= newest:
        raise ValueError(f"its operators are of version {used.get('ai.onnx')}; {_OLDEST} to {newest} are read")
    known = {one.name for one in onnx.defs.get_all_schemas_with_history() if one.domain == ""}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in known or node.op_type.startswith(_REFUSED):
            where = f" of {node.domain!r}" if node.domain else ""
            raise ValueError(f"it contains the operator {node.op_type!r}{where}, which is none of those that only compute")
        graphs = [one.name for one in node.attribute if one.HasField("g") or one.graphs]
        if graphs:
            raise ValueError(f"its operator {node.op_type!r} contains a graph")
    if model.graph.sparse_initializer:
        raise ValueError("it contains sparse tensors")
    for tensor in tensors(model.graph):
        _require_stored(tensor)
    _require_inference(model.graph)


def _require_inference(graph: onnx.GraphProto) -> None:
    """Raises ValueError if an operator makes numbers of less than 32 bits that are no integers, or drops some at random."""
    onnx = import_onnx()
    helper, stored = onnx.helper, {one.name: one for one in graph.initializer}
    stored |= {node.output[0]: one.t for node in graph.node if node.op_type == "Constant" for one in node.attribute[:1]}
    for node in graph.node:
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            trains = stored.get(node.input[2])
            if trains is None or onnx.numpy_helper.to_array(trains):
                raise ValueError("it is in the mode of training; export it for inference")
    for attribute in (one for node in graph.node for one in node.attribute):
        if attribute.name in ("to", "dtype") and attribute.HasField("i"):
            kind = helper.tensor_dtype_to_np_dtype(attribute.i)
            if kind.kind not in "iub" and kind.itemsize < 4:
                raise ValueError(_HALF)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of numbers that a graph without inner graphs contains."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ValueError("it contains sparse tensors")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _require_stored(tensor: onnx.TensorProto) -> None:
    """Raises ValueError if the numbers of a tensor are not in the file, or are not as many as it declares."""
    onnx = import_onnx()
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(_ONE_FILE)
    if any(side < 0 for side in tensor.dims) or math.prod(tensor.dims) > _MOST_BYTES:
        raise ValueError(f"the tensor {tensor.name!r} in it declares the shape {list(tensor.dims)}")
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    except KeyError:
        raise ValueError(f"the tensor {tensor.name!r} in it is of an unknown type") from None
    if kind.kind not in "iub" and kind.itemsize < 4:
        raise ValueError(_HALF)
    if kind.kind not in "fiub":
        raise ValueError(f"the tensor {tensor.name!r} in it holds no numbers that are computed with ({kind})")
    wanted = math.prod(tensor.dims)
    stored = len(tensor.raw_data) / kind.itemsize if tensor.HasField("raw_data") else len(getattr(tensor, field))
    if stored != wanted:
        raise ValueError(f"the tensor {tensor.name!r} in it declares {wanted:,} numbers, and {stored:,.0f} are stored")


def require_sizes(model: onnx.ModelProto, taken: str) -> None:
    """Raises WeightsError if an operator gives more numbers for one image than any image model does, or gives no fixed number.

    Args:
        model: of known height and width.
        taken: the name of its input.
    """
    onnx = import_onnx()
    one_image = type(model)()
    one_image.CopyFrom(model)
    (images,) = (one for one in one_image.graph.input if one.name == taken)
    images.type.tensor_type.shape.dim[0].dim_value = 1
    for out in one_image.graph.output:
        out.type.tensor_type.ClearField("shape")
    del one_image.graph.value_info[:]
    try:
        told = onnx.shape_inference.infer_shapes(one_image, strict_mode=True, data_prop=True)
    except Exception as error:  # ONNX raises errors of several kinds, all with one sentence
        raise WeightsError(f"The shapes of the model do not fit together: {line_of(error, -1)}.") from None
    by_numbers = {out: node.op_type for node in told.graph.node if node.op_type in _SIZED_BY_NUMBERS for out in node.output}
    for value in (*told.graph.value_info, *told.graph.output):
        shape = value.type.tensor_type.shape
        sides = [one.dim_value for one in shape.dim if one.HasField("dim_value")]
        if math.prod(sides) > _MOST_NUMBERS:
            raise WeightsError(f"The model computes {math.prod(sides):,} numbers at once ({value.name!r}) for one image.")
        if value.name in by_numbers and len(sides) < len(shape.dim):
            raise WeightsError(f"How much the operator {by_numbers[value.name]!r} of the model gives depends on the image.")


def outputs_of_onnx(source: bytes, pixels: np.ndarray, names: Sequence[str] | None = None) -> list[np.ndarray]:
    """The outputs of a model with one input for (n, ...) pixels, by ONNX Runtime on CPUs.

    Args:
        source: the file, which `read_onnx` allowed.
        pixels: the input; a model that takes one image at a time gets them one by one.
        names: which outputs; None for all.

    Raises:
        WeightsError: ONNX Runtime cannot run it.
        ConfigError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ONNX models need the packages onnx and onnxruntime: install tlbatch[onnx].") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.load_model_format", "ONNX")  # otherwise the first bytes decide
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        at_once = taken.shape[0] if isinstance(taken.shape[0], int) else len(pixels)
        starts = range(0, len(pixels), at_once)
        found = [session.run(names, {taken.name: pixels[start : start + at_once]}) for start in starts]
        return [np.concatenate([np.atleast_1d(one) for one in outputs]) for outputs in zip(*found, strict=True)]
    except Exception as error:  # each of ONNX Runtime's errors is a class of its own
        raise WeightsError(f"ONNX Runtime cannot run the model: {line_of(error)}.") from None


def as_openvino(source: bytes) -> Files:
    """The OpenVINO files of an ONNX model, in float32.

    Raises:
        WeightsError: it is not allowed, or OpenVINO cannot read it.
    """
    model = read_onnx(source, "of the bundle")
    require_sizes(model, "pixels")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(source)
        try:
            return converted(path)
        except Exception as error:  # OpenVINO raises RuntimeError and errors of its own
            raise WeightsError(f"OpenVINO cannot read the model: {line_of(error, -1)}.") from None
