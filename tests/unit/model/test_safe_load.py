"""A model file is refused, before Keras sees it, unless it only describes a network and its numbers.

No file here would harm anything if it were loaded: what is not allowed is a name of this module, and limits are lowered.
"""

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
from PIL import PngImagePlugin
from support.models import stacked
from support.paths import ROOT

from tlbatch.config import RunConfig
from tlbatch.errors import WeightsError
from tlbatch.images import colour, tar, tiff
from tlbatch.model import safe_load
from tlbatch.model.bases import build_network, find_base
from tlbatch.model.safe_load import load_safely, require_safe


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


class Stranger:
    """A class that is no part of Keras."""

    def __init__(self, **_: object) -> None:
        pytest.fail("a class that is not on the list was made")


def stranger(*_: object, **__: object) -> None:
    """A function that is no part of Keras."""
    pytest.fail("a function that is not on the list was called")


#: What stands in the place of the last layer. The weaknesses of Keras that were of this kind: any function of any module could
#: be named (CVE-2025-1550), functions of Keras itself that read files (CVE-2025-8747) or change how it loads (CVE-2025-9906).
NOT_ON_THE_LIST = {
    "a class of another package": {"module": __name__, "class_name": "Stranger"},
    "a function of another package": {"module": __name__, "class_name": "stranger"},
    "a name of Keras in another package": {"module": __name__, "class_name": "Dense"},
    "a package whose name begins like Keras": {"module": "keras_of_others.layers", "class_name": "Dense"},
    "a registered object of another package": {"module": __name__, "class_name": "Dense", "registered_name": "other>Dense"},
    "a name of Keras that another package registered": {
        "module": "keras.layers",
        "class_name": "Dense",
        "registered_name": "other>Dense",
    },
    "a function of Keras that is no layer": {"module": "keras.utils", "class_name": "to_categorical"},
    "a setting of Keras": {"module": "keras.config", "class_name": "image_data_format"},
    "an operation that is none": {"module": "keras.src.ops.numpy", "class_name": "backend"},
    "operations of another module": {"module": "keras.src.ops.function", "class_name": "Function"},
    "a function for an activation": {
        "module": "keras.layers",
        "class_name": "Dense",
        "config": {"units": 3, "activation": {"module": __name__, "class_name": "function", "config": "stranger"}},
    },
    "a function of Keras that is no activation": {
        "module": "keras.layers",
        "class_name": "Dense",
        "config": {"units": 3, "activation": {"module": "keras.utils", "class_name": "function", "config": "to_categorical"}},
    },
    "a class for an initializer": {
        "module": "keras.layers",
        "class_name": "Dense",
        "config": {"units": 3, "kernel_initializer": {"module": __name__, "class_name": "Stranger", "config": {}}},
    },
    "a class name that is no text": {"module": "keras.layers", "class_name": ["Dense"]},
}


@pytest.fixture
def keras_never_loads(monkeypatch):
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("Keras saw it"))


@pytest.mark.parametrize("what", NOT_ON_THE_LIST)
def test_what_is_not_on_the_list_is_refused_before_keras_sees_it(tmp_path, what, keras_never_loads):
    stacked().save(tmp_path / "good.keras")
    path = rewritten(
        tmp_path / "good.keras", tmp_path / "other.keras", lambda config: with_layer(config, NOT_ON_THE_LIST[what])
    )
    with pytest.raises(WeightsError, match="which could run code or read files"):
        load_safely(path)


#: Layers of Keras that run code from the file, or read files that it names; written out, so that none leaves the code's list
#: unnoticed.
MAY_NOT = (
    *("FeatureSpace", "FlaxLayer", "HashedCrossing", "Hashing", "IntegerLookup", "JaxLayer", "Lambda", "StringLookup"),
    *("TFSMLayer", "TextVectorization", "TorchModuleWrapper"),
)


@pytest.mark.parametrize("name", MAY_NOT)
def test_a_layer_of_keras_that_may_run_code_or_read_files_is_refused(tmp_path, name, keras_never_loads):
    """Without anything in it. Keras itself let through code in a `Lambda` (CVE-2024-3660), a pickled module in a
    `TorchModuleWrapper` (CVE-2025-49655) and a vocabulary from any file (CVE-2025-12058).
    """
    stacked().save(tmp_path / "good.keras")
    layer = {"module": "keras.layers", "class_name": name}
    path = rewritten(tmp_path / "good.keras", tmp_path / "other.keras", lambda config: with_layer(config, layer))
    with pytest.raises(WeightsError, match=f"contains '{name}', which could run code or read files"):
        load_safely(path)


def old_file(path: Path, layer: dict) -> Path:
    """An `.h5` file with another last layer."""
    stacked().save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = json.dumps(with_layer(json.loads(file.attrs["model_config"]), layer))
    return path


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("layer", [{"module": __name__, "class_name": "Stranger"}, {"class_name": "Lambda"}])
def test_in_an_old_file_the_list_is_the_same(tmp_path, layer, keras_never_loads):
    """CVE-2025-9905: Keras loaded an `.h5` without its safe mode."""
    path = old_file(tmp_path / "model.h5", layer)
    with pytest.raises(WeightsError, match=f"'{layer['class_name']}', which could run code"):
        load_safely(path)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_an_old_configuration_that_is_none_is_a_sentence(tmp_path, keras_never_loads):
    """It is rewritten before it is checked, so its parts may be of any type."""
    odd = {"class_name": "TFOpLambda", "config": {"function": ["math.add"]}, "inbound_nodes": [["a", 0, 0, {"y": 1.0}]]}
    with pytest.raises(WeightsError, match="not a Keras model that can be loaded safely"):
        load_safely(old_file(tmp_path / "model.h5", odd))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_file_that_is_two_things_is_refused(tmp_path):
    """Keras goes by the name: an old file with an archive at its end would be checked as the one and loaded as the other."""
    path = old_file(tmp_path / "model.h5", {"module": __name__, "class_name": "Stranger"})
    stacked().save(tmp_path / "good.keras")
    (tmp_path / "both.h5").write_bytes(path.read_bytes() + (tmp_path / "good.keras").read_bytes())
    with pytest.raises(WeightsError, match="it is also a zip archive"):
        require_safe(tmp_path / "both.h5")
    shutil.copy(path, tmp_path / "named.keras")
    with pytest.raises(WeightsError, match="is not a Keras model that can be loaded safely"):
        require_safe(tmp_path / "named.keras")


def test_an_archive_holds_a_network_and_its_numbers_and_nothing_else(tmp_path):
    """CVE-2025-12060 and its like: members that are unpacked to where their names lead. Only the known three are taken."""
    stacked().save(tmp_path / "good.keras")
    for name in ("notes.txt", "assets/vocabulary.txt", "other/model.weights.h5"):
        path = rewritten(tmp_path / "good.keras", tmp_path / "other.keras", lambda config: config, {name: b"x"})
        with pytest.raises(WeightsError, match=re.escape(f"it contains the file {name!r}")):
            require_safe(path)


def test_a_configuration_over_the_limit_is_not_read(tmp_path, monkeypatch):
    stacked().save(tmp_path / "good.keras")
    require_safe(tmp_path / "good.keras")
    monkeypatch.setattr(safe_load, "_MOST_CONFIG_BYTES", 100)
    with pytest.raises(WeightsError, match="its configuration is larger than"):
        require_safe(tmp_path / "good.keras")


def archive_of(weights: bytes, path: Path) -> Path:
    """A `.keras` file with these bytes for its numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", weights)
    return path


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_numbers_that_lie_in_another_file_are_refused(tmp_path, kind):
    """CVE-2026-1669: HDF5 that takes its numbers from other files. Here they lie in one that the test makes."""
    (tmp_path / "second.bin").write_bytes(bytes(64))
    with h5py.File(tmp_path / "second.h5", "w") as second:
        second["x"] = np.zeros(16, np.float32)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if kind == "link":
            file["layers"] = h5py.ExternalLink(str(tmp_path / "second.h5"), "/x")
        elif kind == "external":
            file.create_dataset("layers", (16,), "f4", external=[(str(tmp_path / "second.bin"), 0, 64)])
        else:
            layout = h5py.VirtualLayout((16,), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "second.h5"), "x", (16,))
            file.create_virtual_dataset("layers", layout)
    with pytest.raises(WeightsError, match="'layers' in it is stored in another file"):
        require_safe(archive_of(buffer.getvalue(), tmp_path / "other.keras"))


def not_stored(side: int) -> bytes:
    """HDF5 with side x side numbers of which none is stored."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("layers/dense/vars/0", (side, side), "f4", chunks=(32, 32), compression="gzip")
    return buffer.getvalue()


def test_numbers_that_are_not_stored_are_refused(tmp_path, monkeypatch):
    """CVE-2026-0897: a shape for which reading makes room, in a model and in weights."""
    monkeypatch.setattr(safe_load, "_MOST_UNSTORED", 4 * 64 * 64)
    require_safe(archive_of(not_stored(64), tmp_path / "good.keras"))
    with pytest.raises(WeightsError, match="declares 16,900 bytes, but only 0 are stored"):
        require_safe(archive_of(not_stored(65), tmp_path / "other.keras"))
    with pytest.raises(WeightsError, match="declares 16,900 bytes, but only 0 are stored"):
        build_network(find_base("MobileNetV2"), 32, not_stored(65))


def test_numbers_that_are_stored_in_far_fewer_bytes_are_refused(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        stored = file.create_dataset("layers/dense/vars/0", data=np.zeros((64, 64), np.float32), compression="gzip")
        ratio = stored.nbytes / stored.id.get_storage_size()
    path = archive_of(buffer.getvalue(), tmp_path / "zeros.keras")
    monkeypatch.setattr(safe_load, "_MOST_UNSTORED", 0)
    monkeypatch.setattr(safe_load, "_MOST_UNPACKED", int(ratio) + 1)
    require_safe(path)
    monkeypatch.setattr(safe_load, "_MOST_UNPACKED", int(ratio) - 1)
    with pytest.raises(WeightsError, match="declares 16,384 bytes, but only"):
        require_safe(path)


@pytest.mark.parametrize(
    "layer",
    [
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1001}},
        {"module": "keras.layers", "class_name": "Reshape", "config": {"target_shape": [1001, 1]}},
    ],
)
def test_sizes_that_no_image_model_has_are_refused(tmp_path, layer, monkeypatch):
    """Keras would make room for them before it finds that the file holds nothing of the kind."""
    stacked().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "other.keras", lambda config: with_layer(config, layer))
    monkeypatch.setattr(safe_load, "_MOST_SIZE", 1000)
    with pytest.raises(WeightsError, match="its configuration has a size of 1001"):
        require_safe(path)
    monkeypatch.setattr(safe_load, "_MOST_SIZE", 1001)
    require_safe(path)


def test_the_limits_are_those_of_the_documentation():
    rows = re.findall(r"^\| (.+?) \| ([0-9,]+) \| (?:yes|no|Pillow's) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    limits = {name: int(number.replace(",", "")) for name, number in rows}
    defaults = RunConfig(images="i", bundle="b", output="o")
    assert limits == {
        "`max_pixels`: pixels of an image, or of a tile of a TIFF": defaults.max_pixels,
        "`max_side`: pixels of an image's longer side": defaults.max_side,
        "`max_bytes`: bytes of an image": defaults.max_bytes,
        "bytes of a TIFF's samples, for each pixel of `max_pixels`": tiff._MAX_BYTES_PER_PIXEL,
        "bytes of a colour profile": colour._MAX_PROFILE_BYTES,
        "bytes of a text beside a PNG's pixels, unpacked": PngImagePlugin.MAX_TEXT_CHUNK,
        "bytes of one text header in a tar": tar._MAX_HEADER_BYTES,
        "bytes of a model's configuration": safe_load._MOST_CONFIG_BYTES,
        "a size in a model's configuration": safe_load._MOST_SIZE,
        "bytes of a weight for each byte that is stored": safe_load._MOST_UNPACKED,
        "bytes of a weight beyond that": safe_load._MOST_UNSTORED,
    }


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"no model"])
def test_what_is_no_model_is_a_sentence(tmp_path, data):
    (tmp_path / "x.keras").write_bytes(data)
    with pytest.raises(WeightsError, match="is not a Keras model that can be loaded safely"):
        require_safe(tmp_path / "x.keras")


def test_a_layer_of_one_of_keras_own_networks_is_allowed(tmp_path):
    """ConvNeXt's `LayerScale` is no public layer of Keras."""
    keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3)).save(tmp_path / "network.keras")
    require_safe(tmp_path / "network.keras")
