"""The OpenVINO files of a base and pixels of its images -> OpenVINO files that compute in int8, by NNCF.

Ranges of activations come from the pixels. The first convolutions, which cost little and whose errors go through all others,
stay in float32. Weights keep seven bits: NNCF's default overflows the 16-bit sums of processors without VNNI, which then give
other features.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tlbatch.errors import ConfigError
from tlbatch.model.openvino import BIN, XML, Files, import_openvino, saved_files, without_telemetry
from tlbatch.schema import sha256

#: Most images from which the ranges of activations are taken; NNCF's own default.
MOST_IMAGES = 300
#: The share of a network's multiplications that its first convolutions in float32 may have: in MobileNetV2 the first block.
_FLOAT32_SHARE = 1 / 12
#: Operations of networks built like transformers (ConvNeXt), which NNCF quantises in another way.
_OF_TRANSFORMERS = {"Erf", "Gelu", "MVN"}


def require_nncf() -> None:
    """Raises ConfigError if NNCF is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise ConfigError("quantize: quantising needs the package nncf: install tlbatch[quantize].")


def quantize_to_int8(base: Files, pixels: np.ndarray) -> Files:
    """The base in int8. Equal arguments give equal files.

    Args:
        base: takes pixels (batch, height, width, 3) and gives features (batch, F), in float32.
        pixels: (n, height, width, 3) of images as it will be given.

    Raises:
        ConfigError: NNCF is not installed.
    """
    require_nncf()
    openvino = import_openvino()
    model = openvino.Core().read_model(base[XML], base[BIN])
    kinds = {operation.get_type_name() for operation in model.get_ops()}
    with _quiet_nncf() as nncf:
        made = nncf.quantize(
            model,
            nncf.Dataset([image[None] for image in pixels]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(pixels),
            ignored_scope=nncf.IgnoredScope(names=_first_convolutions(model)),
            model_type=nncf.ModelType.TRANSFORMER if kinds & _OF_TRANSFORMERS else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE, activations_range_estimator_params=_widest_ranges()
            ),
        )
    _rename(made)
    return saved_files(made)


def _first_convolutions(model: Any) -> list[str]:
    """The names of the first convolutions, as many as have a small share of all multiplications."""
    costs = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution"):
            pixels = [side.get_length() for side in list(operation.get_output_partial_shape(0))[2:]]
            costs[operation.get_friendly_name()] = math.prod(pixels) * math.prod(operation.get_input_shape(1))
    most, found = _FLOAT32_SHARE * sum(costs.values()), []
    for name, cost in costs.items():
        most -= cost
        if most < 0:
            break
        found.append(name)
    return found


def _widest_ranges() -> Any:
    """From the least to the greatest number of all images; NNCF's default, the mean over the images, cuts off bright pixels."""
    from nncf.quantization import range_estimator as ranges

    kinds, ways, one = ranges.StatisticsType, ranges.AggregatorType, ranges.StatisticsCollectorParameters
    return ranges.RangeEstimatorParameters(one(kinds.MIN, ways.MIN), one(kinds.MAX, ways.MAX))


def digest_of(files: Files) -> str:
    """SHA-256 over the OpenVINO files of a quantised base."""
    return sha256(b"".join(files[name] for name in (XML, BIN)))


def _rename(model: Any) -> None:
    """Number the operations in their order: by themselves they have names that count what the process has made so far."""
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
        for port in operation.outputs():
            port.get_tensor().set_names(set())
    model.set_friendly_name("base")
    model.output(0).get_tensor().set_names({"features"})


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF without its telemetry and its reports on standard output.

    Importing it replaces the class of all loggers that are made afterwards; that is undone.
    """
    before = logging.getLoggerClass()
    with without_telemetry(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            import nncf
        finally:
            logging.setLoggerClass(before)
        logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function also changes handlers, which others may use
        yield nncf
