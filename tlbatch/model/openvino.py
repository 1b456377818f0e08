"""Keras models -> OpenVINO models: a base is exported once, and each head is joined to it.

Exporting MobileNetV2 takes two seconds, and exporting a head takes a tenth of that. So training exports its base once, extracts
features with it, and puts the same files into the bundle.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import keras

#: The package that OpenVINO reports with.
_TELEMETRY = "openvino_telemetry"
#: The two files of an OpenVINO model in a bundle.
XML, BIN = "openvino/model.xml", "openvino/model.bin"

#: A variable that says which instructions oneDNN may use, and the last set of them before AMX.
_INSTRUCTIONS, _ALL_BUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16"

Files = Mapping[str, bytes]

_importing = threading.RLock()


def import_openvino() -> Any:
    """OpenVINO without its telemetry.

    Each import of it otherwise reports to Google Analytics that it is used, and so does each conversion: from a copy of this
    process, which is waited for up to three seconds where the internet cannot be reached (2026.4). A process that has imported
    OpenVINO for purposes of its own keeps what it has.
    """
    with without_telemetry():
        import openvino
    _keep_from_amx()
    return openvino


@functools.cache
def _keep_from_amx() -> None:
    """Let OpenVINO use all instructions of this processor but AMX, unless the user's environment says which it may use.

    With AMX it rounds the sums of a network in int8 otherwise: in 4 % of its features, by up to a tenth of the largest one
    (2026.4, an Intel Xeon; with AVX2, AVX512 and VNNI they are the same bits). The variable is read once, when the plugin is
    asked for the first time, and not by OpenVINO alone, so it is set for that moment only.
    """
    import openvino

    with _importing:
        if _INSTRUCTIONS not in os.environ:
            os.environ[_INSTRUCTIONS] = _ALL_BUT_AMX
            try:
                openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            finally:
                del os.environ[_INSTRUCTIONS]


@contextmanager
def without_telemetry() -> Iterator[None]:
    """As if the package were not installed: OpenVINO then imports functions that do nothing."""
    with _importing:
        modules = cast("dict[str, Any]", sys.modules)
        before = modules.get(_TELEMETRY)
        modules[_TELEMETRY] = None  # what Python takes for a package that is not there
        try:
            yield
        finally:
            del modules[_TELEMETRY]
            if before is not None:
                modules[_TELEMETRY] = before


def export_openvino(model: keras.Model) -> Files:
    """The OpenVINO files of a Keras model, name -> bytes."""
    with tempfile.TemporaryDirectory() as folder, without_telemetry(), _export_possible():
        xml = Path(folder, "model.xml")
        model.export(str(xml), format="openvino", verbose=False)
        return _read(xml)


def converted(path: Path) -> Files:
    """The OpenVINO files of a model file that OpenVINO reads, such as ONNX."""
    openvino = import_openvino()
    return saved_files(openvino.Core().read_model(path))


@contextmanager
def _export_possible() -> Iterator[None]:
    """On Python 3.13 and newer, answer for OpenVINO (2026.4) which versions are installed.

    Its own function deletes a local variable by `exec`, which raises NameError there (`findings/openvino-python-3.13.sh`).
    """
    if sys.version_info < (3, 13):
        yield
        return
    from openvino.frontend.tensorflow import utils

    original = utils.get_environment_setup
    utils.get_environment_setup = lambda _: {"tensorflow": version("tensorflow")}
    try:
        yield
    finally:
        utils.get_environment_setup = original


def join_openvino(base: Files, head: Files) -> Files:
    """Join base and head into one OpenVINO model, whose outputs are features and scores.

    Args:
        base: takes pixels and gives features.
        head: takes features and gives scores.
    """
    openvino = import_openvino()
    core = openvino.Core()
    front = core.read_model(base[XML], base[BIN])
    back = core.read_model(head[XML], head[BIN])
    features = front.output(0).get_node().input_value(0)
    for user in back.input(0).get_node().output(0).get_target_inputs():
        user.replace_source_output(features)
    joined = openvino.Model([*front.get_results(), *back.get_results()], front.get_parameters(), "tlbatch")
    for port, name in zip(joined.outputs, ("features", "scores"), strict=True):
        port.get_tensor().set_names({name})
    return saved_files(joined)


def cut_head(joined: Any) -> Any:
    """The head of a joined OpenVINO model as a model of its own: features -> scores."""
    openvino = import_openvino()
    ports = {name: port for port in joined.outputs for name in port.get_names()}
    features = ports["features"].get_node().input_value(0)
    parameter = openvino.op.Parameter(openvino.Type.f32, openvino.PartialShape([-1, features.get_partial_shape()[1]]))
    kept = ports["features"].get_node().get_friendly_name()
    for user in features.get_target_inputs():  # a head that does nothing is a second result
        if user.get_node().get_friendly_name() != kept:
            user.replace_source_output(parameter.output(0))
    return openvino.Model([ports["scores"].get_node()], [parameter], "head")


def cut_base(joined: Path) -> Files:
    """The base of a bundle's OpenVINO model as a model of its own: pixels -> features."""
    openvino = import_openvino()
    model = openvino.Core().read_model(joined)
    features = next(port for port in model.outputs if "features" in port.get_names()).get_node()
    return saved_files(openvino.Model([features], model.get_parameters(), "base"))


def saved_files(model: Any) -> Files:
    """The files of an OpenVINO model, name in a bundle -> bytes."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "model.xml")
        openvino.save_model(model, xml, compress_to_fp16=False)
        return _read(xml)


def _read(xml: Path) -> Files:
    return {XML: xml.read_bytes(), BIN: xml.with_suffix(".bin").read_bytes()}
