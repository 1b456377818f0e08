"""A model file is refused, before Keras sees it, unless it only describes a network and its numbers."""

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import pytest
from support.models import stacked

from tlbatch.errors import WeightsError
from tlbatch.model.bases import build_network, find_base
from tlbatch.model.safe_load import load_safely, require_safe

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


def test_a_layer_of_one_of_keras_own_networks_is_allowed(tmp_path):
    """ConvNeXt's `LayerScale` is no public layer of Keras."""
    keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3)).save(tmp_path / "network.keras")
    require_safe(tmp_path / "network.keras")
