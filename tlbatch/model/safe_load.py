"""A Keras model file -> a Keras model, if nothing in it can run code or read other files; checked before Keras opens it.

Allowed are the layers of Keras that only compute, its pure operations, initializers, regularizers, constraints, losses,
metrics, optimizers and named activations. Everything else is refused, and the error names it: `Lambda` and wrappers of other
code, layers that read vocabularies from files, custom and registered objects, unknown members of the archive, HDF5 links to
other files, and shapes that no image model has or for which no numbers are stored.

Files of older versions are rewritten first (`older_files`), and it is the rewritten file that is checked and loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlbatch.errors import WeightsError, line_of
from tlbatch.model.older_files import FUNCTIONS, is_operation, renewed
from tlbatch.model.own_keras import import_keras, with_own_keras

if TYPE_CHECKING:
    import h5py
    import keras

#: Layers of Keras that run code from the model file, or read files that it names.
_FORBIDDEN = frozenset(
    [
        "Lambda",
        "TFSMLayer",
        "TorchModuleWrapper",
        "JaxLayer",
        "FlaxLayer",
        "StringLookup",
        "IntegerLookup",
        "TextVectorization",
        "HashedCrossing",
        "Hashing",
        "FeatureSpace",
    ]
)
_MODELS = frozenset(("Functional", "Sequential", "Model"))
_PLAIN = frozenset(
    [
        "LayerScale",
        "DTypePolicy",
        "FloatDTypePolicy",
        "QuantizedDTypePolicy",
        "Int4DTypePolicy",
        "Int8QuantizationConfig",
        "Int4QuantizationConfig",
        "AbsMaxQuantizer",
        "__keras_tensor__",
        "__tensor__",
        "__numpy__",
        "__tuple__",
        "__slice__",
        "__ellipsis__",
    ]
)
_MEMBERS = frozenset(("config.json", "metadata.json", "model.weights.h5"))
_MOST_CONFIG_BYTES = 64 << 20
#: Integers in a configuration are sizes, except those under these names.
_MOST_SIZE, _NO_SIZES = 1 << 20, ("seed", "shared_object_id")
#: The most bytes of an HDF5 dataset per stored byte, and the most bytes of a dataset without any stored byte.
_MOST_UNPACKED, _MOST_UNSTORED = 64, 1 << 20


@with_own_keras
def load_safely(path: Path) -> keras.Model:
    """Load a `.keras` or `.h5` file after `require_safe`; the model is not compiled.

    Raises:
        WeightsError: the file is not safe, or Keras cannot load it.
    """
    config, as_it_is = _require_safe(path)
    keras = import_keras()
    try:
        with _file_of(path, None if as_it_is else config) as file:
            return keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # a configuration can make Keras raise any exception
        raise WeightsError(f"Keras cannot load the model {path}: {line_of(error)}.") from None


def require_safe(path: Path) -> None:
    """Raises WeightsError, which names the reason, unless a model file only describes a network and its weights."""
    _require_safe(path)


def _require_safe(path: Path) -> tuple[Any, bool]:
    """The configuration that Keras is to load, and whether it is that of the file."""
    try:
        # By the suffix, like Keras: otherwise a file of both formats would pass one check and be loaded as the other.
        found = _config_of_archive(path) if path.suffix == ".keras" else _config_of_h5(path)
        _require_sizes(found)
        config = renewed(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, RecursionError) as error:
        raise WeightsError(f"The model {path} is not a Keras model that can be loaded safely: {line_of(error)}.") from None
    allowed = _allowed()
    for one in _objects(config):
        if not isinstance(one["class_name"], str) or not _is_allowed(one, allowed):
            raise WeightsError(f"The model {path} contains {_refusal(one)}.")
    return config, config == found


def _refusal(found: Mapping[str, Any]) -> str:
    """What is not allowed, and why."""
    name = found["class_name"]
    if name in FUNCTIONS:
        return f"the operation {found['config'].get('function')!r} of TensorFlow, which is none of those that can be converted"
    if str(found.get("registered_name")).startswith("keras_hub>"):
        return (
            f"{name!r} of Keras Hub, which is not part of Keras. Where Keras Hub is installed, write it as ONNX: "
            "model.export('model.onnx', format='onnx')"
        )
    return f"{name!r}, which could run code or read files; only Keras's own layers that compute are loaded"


@contextmanager
def _file_of(path: Path, config: Any) -> Iterator[Path]:
    """The file, or a copy of it with another configuration."""
    if config is None:
        yield path
        return
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
                for name in ("metadata.json", "model.weights.h5"):
                    with old.open(name) as source, new.open(name, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                new.writestr("config.json", json.dumps(config))
        else:
            shutil.copyfile(path, copy)
            with h5py.File(copy, "r+") as file:
                file.attrs["model_config"] = json.dumps(config)
        yield copy


def _config_of_archive(path: Path) -> Any:
    import h5py

    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename not in _MEMBERS and not member.filename.endswith("/"):
                raise ValueError(f"it contains the file {member.filename!r}")
        if archive.getinfo("config.json").file_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"its configuration is larger than {_MOST_CONFIG_BYTES >> 20} MiB")
        with archive.open("model.weights.h5") as weights, h5py.File(weights, "r") as file:
            _require_within(file)
        config = json.loads(archive.read("config.json"))
        if "metadata.json" in archive.namelist():
            _require_same_functions(config, json.loads(archive.read("metadata.json")).get("keras_version"))
        config.pop("compile_config", None)  # the training setup, which may name custom objects; never loaded
        return config


def _config_of_h5(path: Path) -> Any:
    import h5py

    if zipfile.is_zipfile(path):
        raise ValueError("it is also a zip archive, or ends with one")
    with h5py.File(path, "r") as file:
        _require_within(file)
        if "model_config" not in file.attrs:
            raise ValueError("it contains weights but no network; use it with `train --weights`")
        config = json.loads(file.attrs["model_config"])
        _require_same_functions(config, file.attrs.get("keras_version"))
        return config


def _require_same_functions(config: Any, version: Any) -> None:
    """Raises ValueError if Keras 2 wrote the file and means another function than Keras 3 by the same name."""
    text = version.decode() if isinstance(version, bytes) else str(version)
    if text.startswith("2.") and any("hard_sigmoid" in one["config"].values() for one in _objects(config) if _is_plain(one)):
        raise ValueError("Keras 2 wrote it, whose 'hard_sigmoid' is 0.2 x + 0.5, and that of Keras 3 is x / 6 + 0.5")


def _is_plain(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("config"), dict)


def _require_within(group: h5py.Group) -> None:
    """Raises ValueError if HDF5 refers to another file, by a link or for its data."""
    import h5py

    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            raise ValueError(f"{name!r} in it is stored in another file")
        item = group.get(name)
        if isinstance(item, h5py.Group):
            _require_within(item)
        elif isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                raise ValueError(f"{name!r} in it is stored in another file")
            require_stored(item)


def require_stored(item: h5py.Dataset) -> None:
    """Raises WeightsError if an HDF5 dataset is far larger than its stored bytes: reading it would allocate its full size."""
    stored = item.id.get_storage_size()
    if item.nbytes > _MOST_UNSTORED + _MOST_UNPACKED * stored:
        raise WeightsError(f"{item.name} in the file declares {item.nbytes:,} bytes, but only {stored:,} are stored.")


def _require_sizes(config: Any) -> None:
    """Raises ValueError if a configuration has a size that no image model has; Keras would allocate it."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if not str(name).endswith(_NO_SIZES):
                _require_sizes(value)
    elif isinstance(config, list):
        for value in config:
            _require_sizes(value)
    elif isinstance(config, int) and config > _MOST_SIZE:
        raise ValueError(f"its configuration has a size of {config}")


def _objects(config: Any) -> Iterator[Mapping[str, Any]]:
    """Every object that a configuration describes, at any depth."""
    if isinstance(config, Mapping):
        if "class_name" in config:
            yield config
        for value in config.values():
            yield from _objects(value)
    elif isinstance(config, list):
        for value in config:
            yield from _objects(value)


def _allowed() -> frozenset[str]:
    """Names of Keras's own classes that may describe a model."""
    keras = import_keras()
    modules = [keras.layers, keras.initializers, keras.regularizers, keras.constraints]
    modules += [keras.optimizers, keras.losses, keras.metrics]  # nested models keep their training setup
    names = {name for module in modules for name in dir(module) if isinstance(getattr(module, name), type)}
    return frozenset(names - _FORBIDDEN) | _MODELS | _PLAIN


def _is_allowed(found: Mapping[str, Any], allowed: frozenset[str]) -> bool:
    module, registered = found.get("module"), found.get("registered_name")
    name = str(found["class_name"])
    of_keras = module in (None, "builtins", "keras") or str(module).startswith("keras.")
    if registered not in (None, name) or not of_keras:
        return False
    if str(module).startswith("keras.src.ops."):
        return is_operation(str(module), name)
    if name == "function":
        return found.get("config") in dir(import_keras().activations)
    return name in allowed
