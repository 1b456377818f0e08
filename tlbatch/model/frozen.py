"""A frozen base, ready to run and to get heads -> a bundle."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tlbatch.model import bases
from tlbatch.model.bundle import BUNDLE, FORMAT_VERSION, HEAD, MODEL, ONNX, PROBES, Bundle, base_digest, installed_versions
from tlbatch.model.depths import FeaturesOf, at_depths, depths_of
from tlbatch.model.onnx_files import as_openvino, outputs_of_onnx
from tlbatch.model.openvino import XML, Files, cut_base, export_openvino, join_openvino
from tlbatch.model.openvino_engine import features_of_files
from tlbatch.model.own_keras import import_keras, with_own_keras
from tlbatch.model.quantize import digest_of, quantize_to_int8
from tlbatch.model.safe_load import load_safely
from tlbatch.schema import UNRECORDED_RULES, PixelRules, Size, sha256
from tlbatch.storage.location import Location

if TYPE_CHECKING:
    import keras

#: How many images become the probes of a bundle's self-test.
_PROBES = 8


@dataclass(frozen=True)
class Frozen:
    """A base that is ready to run and to get heads.

    Attributes:
        base: a network of `keras.applications`, or an imported one.
        size: height and width of its input, in pixels.
        rules: how the numbers in image files become its pixels.
        weights: the source of its weights, as the user gave it.
        features_length: F.
        weights_digest: SHA-256 over everything else that the features depend on.
        source: pixels (batch, height, width, 3) -> features (batch, F); includes the preprocessing. A Keras model, or the bytes
            of an ONNX file.
        openvino: the same as OpenVINO files.
        depths: the layers whose averages are the features; empty for the last one alone.
        last_length: how many of the features are of the last layer.
        batch: the only batch size that it takes; None for any.
        quantized: SHA-256 of its OpenVINO files if these compute in int8; `source` is the network before that.
    """

    base: bases.Base
    size: Size
    rules: PixelRules
    weights: str
    features_length: int
    weights_digest: str
    source: keras.Model | bytes
    openvino: Files
    depths: tuple[str, ...] = ()
    last_length: int | None = None
    batch: int | None = None
    quantized: str | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The fields of `bundle.json` that describe the base."""
        base = {"name": self.base.name, "weights": self.weights, "weights_digest": self.weights_digest}
        how = self.rules._asdict()
        levels = {name: how[name] for name in ("white_level", "color_profiles")}
        unrecorded = all(getattr(UNRECORDED_RULES, name) == value for name, value in levels.items())
        return {
            "base": {**base, "scaling": self.base.scaling, **({"quantized": self.quantized} if self.quantized else {})},
            "input": {
                "size": list(self.size),
                "resize": self.rules.resize,
                "interpolation": self.rules.interpolation,
                "color": "rgb",
                **({} if unrecorded else levels),
                **({"jpeg": self.rules.jpeg} if self.rules.jpeg != PixelRules().jpeg else {}),
                **({"shorter_side": self.rules.shorter_side} if self.rules.shorter_side else {}),
                **({"background": self.rules.background} if self.rules.background != PixelRules().background else {}),
                **({"batch": self.batch} if self.batch else {}),
            },
            **({"depths": list(self.depths)} if self.depths else {}),
            "features_length": self.features_length,
        }

    @property
    def digest(self) -> str:
        """The same digest as `Bundle.base_digest`."""
        return base_digest(self.facts)


@with_own_keras
def freeze(
    base: bases.Base, size: int, rules: PixelRules, weights: str, data: str | bytes, features_of: FeaturesOf = "last"
) -> Frozen:
    """Build a base with its weights and export it to OpenVINO.

    Args:
        base: which network.
        size: height and width of its input, in pixels.
        rules: how the numbers in image files become its pixels.
        weights: the source of the weights.
        data: "imagenet", "random", or the bytes of the weights file.
        features_of: whether the features are the averages of several depths, or of the last one.

    Raises:
        WeightsError: the weights cannot be downloaded or do not fit.
    """
    network = bases.build_network(base, size, data)
    depths = depths_of(network) if features_of == "depths" else ()
    network = at_depths(network, depths) if depths else network
    import keras

    pixels, features = bases.with_preprocessing(base, network, size)
    extractor = keras.Model(pixels, {"features": features})
    return frozen_keras(base, (size, size), rules, weights, network, extractor, depths)


def frozen_keras(
    base: bases.Base,
    size: Size,
    rules: PixelRules,
    weights: str,
    network: keras.Model,
    extractor: keras.Model,
    depths: tuple[str, ...] = (),
    openvino: Files | None = None,
) -> Frozen:
    """A Keras network as a frozen base.

    Args:
        base: its name and scaling.
        size: height and width of its input, in pixels.
        rules: how the numbers in image files become its pixels.
        weights: the source of its weights.
        network: the network, without preprocessing.
        extractor: pixels (batch, height, width, 3) -> {"features": (batch, F)}, through the network.
        depths: the layers whose averages are the features.
        openvino: the extractor's OpenVINO files, if there are any.
    """
    length, last = int(extractor.output["features"].shape[-1]), int(network.outputs[-1].shape[-1]) if depths else None
    digest, files = bases.weights_digest(network), openvino or export_openvino(extractor)
    return Frozen(base, size, rules, weights, length, digest, extractor, files, depths, last)


def quantized_base(frozen: Frozen, pixels: np.ndarray) -> Frozen:
    """A base in int8: another base, with other features.

    Args:
        frozen: the base in float32.
        pixels: (n, height, width, 3) of images as it will be given.

    Raises:
        ConfigError: NNCF is not installed.
    """
    files = quantize_to_int8(frozen.openvino, pixels)
    return replace(frozen, openvino=files, quantized=digest_of(files))


def frozen_base_of(bundle: Bundle) -> Frozen:
    """The base of a bundle, ready to get another head."""
    base = bundle.facts["base"]
    known = bases.Base(base["name"], bundle.size[0], base["scaling"])
    if not bundle.has(ONNX):
        return _frozen_again(bundle, known)
    source, length, rules = (bundle.folder / ONNX).read_bytes(), bundle.features_length, bundle.pixel_rules
    digest, files = base["weights_digest"], cut_base(bundle.folder / XML) if bundle.quantized else as_openvino(source)
    made = Frozen(known, bundle.size, rules, base["weights"], length, digest, source, files, batch=bundle.batch)
    return replace(made, quantized=bundle.quantized)


@with_own_keras
def _frozen_again(bundle: Bundle, base: bases.Base) -> Frozen:
    keras = import_keras()
    model = load_safely(bundle.folder / MODEL)
    extractor = keras.Model(model.input, {"features": model.output["features"]})
    network = next(layer for layer in extractor.layers if isinstance(layer, keras.Model))
    files = cut_base(bundle.folder / XML) if bundle.has(XML) else None
    weights = bundle.facts["base"]["weights"]
    frozen = frozen_keras(base, bundle.size, bundle.pixel_rules, weights, network, extractor, bundle.depths, files)
    return replace(frozen, quantized=bundle.quantized)


@dataclass(frozen=True)
class Trained:
    """A head for a frozen base, its labels and thresholds, and how it was trained and measured."""

    head: keras.Model
    labels: tuple[str, ...]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    abstain_threshold: float | None = None
    label_thresholds: tuple[float, ...] | None = None


@with_own_keras
def save_bundle(
    location: Location,
    frozen: Frozen,
    trained: Trained | None,
    probe_pixels: np.ndarray,
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Join base and head into one model and write the bundle, `bundle.json` last.

    Args:
        location: where the bundle is written; an existing bundle is replaced.
        frozen: the base.
        trained: the head; None for a bundle that only extracts features.
        probe_pixels: (n, height, width, 3) images; some become the probes of the bundle's self-test.
        extra: further files, name -> bytes, such as the model card.
    """
    chosen = probe_pixels[np.linspace(0, len(probe_pixels) - 1, min(_PROBES, len(probe_pixels))).astype(int)]
    model = None if isinstance(frozen.source, bytes) else _stack(frozen.base.name, frozen.source, trained)
    files = {ONNX: cast("bytes", frozen.source)} if model is None else {MODEL: saved(model)}
    if frozen.quantized:
        expected = _with_scores(features_of_files(frozen.openvino, chosen), trained)
    elif model is None:
        expected = _through_onnx(cast("bytes", frozen.source), trained, chosen)
    else:
        expected = {name: np.asarray(value) for name, value in model(chosen, training=False).items()}
    files |= {PROBES: _probes(chosen, expected), **(extra or {})}
    if trained is None:
        files |= frozen.openvino
    else:
        files |= {HEAD: saved(trained.head), **join_openvino(frozen.openvino, export_openvino(trained.head))}
    facts = _facts(frozen, trained, {name: sha256(data) for name, data in sorted(files.items())})
    location.join(BUNDLE).unlink()
    for name, data in files.items():
        location.join(*name.split("/")).write(data)
    data = json.dumps(facts, indent=1).encode()
    location.join(BUNDLE).write(data)
    return Bundle(location, facts, sha256(data))


def _stack(name: str, extractor: keras.Model, trained: Trained | None) -> keras.Model:
    """Pixels (batch, height, width, 3) -> {"features": (batch, F), "scores": (batch, C)}, both float32."""
    import keras

    features = extractor.output["features"]
    outputs = {"features": features}
    if trained is not None:
        outputs["scores"] = trained.head(features, training=False)
    return keras.Model(extractor.input, outputs, name=f"tlbatch_{name}")


def _through_onnx(source: bytes, trained: Trained | None, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Features by ONNX Runtime and scores by Keras."""
    (features,) = outputs_of_onnx(source, pixels, ["features"])
    return _with_scores(features, trained)


def _with_scores(features: np.ndarray, trained: Trained | None) -> dict[str, np.ndarray]:
    """Features, and the scores that Keras computes from them."""
    return {"features": features, **({} if trained is None else {"scores": np.asarray(trained.head(features, training=False))})}


@with_own_keras
def saved(model: keras.Model) -> bytes:
    """A Keras model as the bytes of a `.keras` file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        return path.read_bytes()


def _probes(pixels: np.ndarray, expected: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=pixels, **expected)  # type: ignore[arg-type]
    return buffer.getvalue()


def _facts(frozen: Frozen, trained: Trained | None, files: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **frozen.facts,
        "labels": list(trained.labels) if trained else [],
        "abstain_threshold": trained.abstain_threshold if trained else None,
        "label_thresholds": trained.label_thresholds if trained else None,
        "metrics": dict(trained.metrics) if trained else {},
        "training": dict(trained.training) if trained else {},
        "files": dict(files),
        "versions": installed_versions("keras", "openvino", "tensorflow", "tlbatch"),
    }
