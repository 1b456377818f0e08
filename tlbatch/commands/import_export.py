"""A model file of Keras or ONNX <-> a bundle: `import` reads a classifier trained elsewhere, `export` writes a plain model."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from tlbatch.commands.extract import without_query
from tlbatch.commands.import_check import Answer, compare_labels, expected_answers, require_same_pixels, tell_check
from tlbatch.commands.quantizing import ComparedImport, quantize_imported
from tlbatch.config import ExportConfig, ImportConfig
from tlbatch.errors import BundleError, ConfigError, WeightsError
from tlbatch.images.label_files import read_classes
from tlbatch.model import bundle as bundles
from tlbatch.model.bundle import Bundle, copy_bundle, load_bundle, require_bundle_place
from tlbatch.model.engines import load_engine
from tlbatch.model.foreign import ForeignModel, Imported, as_trained, probe_pixels, size_of
from tlbatch.model.frozen import Frozen, Trained, save_bundle, saved
from tlbatch.model.keras_import import KerasClassifier, plain_model
from tlbatch.model.onnx_export import export_onnx
from tlbatch.model.onnx_import import OnnxClassifier
from tlbatch.model.own_pipeline import own_scores
from tlbatch.model.quantize import require_nncf
from tlbatch.model.safe_load import load_safely
from tlbatch.report.model_card import make_model_card
from tlbatch.schema import PixelRules, Size
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve

log = logging.getLogger(__name__)

#: Value of `--resize` -> name of the interpolation in the bundle.
INTERPOLATIONS: dict[str, Any] = {
    "antialias": "bilinear",
    "pillow": "bilinear_pillow",
    "keras": "bilinear_tensorflow",
    "tensorflow1": "bilinear_tensorflow1",
    "nearest": "nearest",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
}
#: The largest difference between scores of the CPU engine and of Keras, both in float32.
_MOST_OFF = 1e-4
#: How much farther from those of the training, as a logarithm, the variances of activations are with an implausible scaling.
_IMPLAUSIBLE = 0.6
#: Value of `--scale` -> name of the scaling in the bundle.
SCALINGS = {"[-1,1]": "tf", "[0,1]": "unit", "raw": "inside", "caffe": "caffe", "torch": "torch"}


def import_model(config: ImportConfig) -> dict[str, Any]:
    """Make a bundle from a classifier of Keras or ONNX and check that both give the same scores.

    Args:
        config: the model, its labels, its scaling, and the folder for the bundle.

    Returns:
        `bundle` (its URL), `digest`, `labels`, `features_length`, `multi_label`; `size`, a number or [height, width]; `split`,
        whether the graph shows where the head begins; `scale`, `resize`, `fit`, `jpeg` and `background`; `off`, the largest
        difference between the scores of the CPU engine and of the model in float32; `precision`, what the model computes in,
        and `off_float32`, the largest difference of its outputs if that is not float32; `check`, what `tell_check` returns, or
        None; `quantized`, with `quantize` the fields of `ComparedImport`, or None; `seconds`.

    Raises:
        UsageError: the model could run code, does not classify images, or does not fit its labels, or too many labels of the
            checked images differ; nothing was written.
    """
    began = time.monotonic()
    location = resolve(config.bundle, config.storage_options)
    require_bundle_place(location)
    if config.quantize != "none":
        require_nncf()
    labels = read_classes(resolve(config.labels, config.storage_options))
    model = _load(resolve(config.model, config.storage_options), config.model_output)
    scale = _scale_of(model, config.scale)
    scaling: Any = SCALINGS[scale]
    size = size_of(model, config.shape, scaling)
    rules = _rules_of(config, size)
    source = without_query(config.model)
    imported = model.split(source, scaling, size, labels, rules)
    frozen, probes = imported.frozen, probe_pixels(imported.frozen.size, rules.dtype)
    _tell_of_scale(model, scale, probes)
    facts = {"imported": source, "scale": scale, "head found in the graph": imported.split}
    with tempfile.TemporaryDirectory() as folder:
        save = partial(_saved, resolve(folder), imported, labels, probes, facts)
        trial = save("float32", frozen)
        off = _require_same_scores(trial, source)
        kept, checked, compared = _checked(config, model, imported, trial, partial(save, "int8"))
        made = copy_bundle(kept, location)
    return {
        "bundle": made.location.url,
        "digest": made.digest,
        "labels": list(labels),
        "size": frozen.size[0] if frozen.size[0] == frozen.size[1] else list(frozen.size),
        "features_length": made.features_length,
        "multi_label": imported.multi_label,
        "split": imported.split,
        "scale": scale,
        "resize": config.resize,
        "fit": config.fit,
        "jpeg": config.transform,
        "background": config.shown,
        "off": off,
        "precision": model.precision,
        "off_float32": model.off_float32(as_trained(scaling, probes, model.channels)),
        "check": checked,
        "quantized": None if compared is None else compared._asdict(),
        "seconds": round(time.monotonic() - began, 3),
    }


def _rules_of(config: ImportConfig, size: Size) -> PixelRules:
    """How the pixels become those of its training."""
    shorter, fit = None, cast("Any", config.fit.replace("-", "_"))
    if config.fit == "center-crop":
        shorter = config.shorter_side or round(min(size) * 8 / 7)
        if shorter < max(size):
            raise ConfigError(f"shorter_side: {shorter} pixels are fewer than the {max(size)} that are cut out.")
    interpolation, profiles = INTERPOLATIONS[config.resize], config.color_profiles
    return PixelRules(config.white_level, profiles, fit, interpolation, config.transform, shorter, config.shown)


def _checked(
    config: ImportConfig, model: ForeignModel, imported: Imported, trial: Bundle, save_in_int8: Callable[..., Bundle]
) -> tuple[Bundle, dict[str, Any] | None, ComparedImport | None]:
    """The bundle that is kept, what its check has found, and what int8 gives."""
    if config.check is None:
        return trial, None, None
    folder, own = Path(config.check), _own_answers(config, model, imported, trial)
    checked = tell_check(config, compare_labels(folder, trial, own), trial.pixel_rules)
    if config.quantize == "none":
        return trial, checked, None
    kept, compared = quantize_imported(folder, imported.frozen, trial, own, save_in_int8)
    return kept, checked, compared


def _saved(
    folder: Location,
    imported: Imported,
    labels: Sequence[str],
    probes: np.ndarray,
    facts: Mapping[str, Any],
    name: str,
    base: Frozen,
    **more: Any,
) -> Bundle:
    """The bundle of an imported model with its base, or with the base in int8, and with its model card."""
    known = {**facts, **more}
    card = make_model_card(f"{', '.join(labels[:4])}{' …' if len(labels) > 4 else ''}: imported", known, None)
    thresholds = (0.5,) * len(labels) if imported.multi_label else None
    trained = Trained(imported.head, tuple(labels), {}, known, label_thresholds=thresholds)
    return save_bundle(folder.join(name), base, trained, probes, {bundles.CARD: card})


def _scale_of(model: ForeignModel, scale: str | None) -> str:
    """How the pixels are scaled outside a model: as given, or `raw` if it shows that it scales them itself.

    Raises:
        ConfigError: it scales its pixels itself, or takes integers like one of `export`, and another scale is given; or none is
            given and it shows nothing.
    """
    takes = model.takes
    layer = None if "int" in takes else model.scaling_layer()
    where = f"scales its pixels itself, in its layer {layer!r}"
    told = f"takes {takes}, so it scales its pixels itself" if "int" in takes else where
    if "int" not in takes and layer is None:
        if scale is None:
            raise ConfigError("scale: no layer of the model scales pixels, so say how its training scaled them, with --scale.")
        return scale
    if scale not in (None, "raw"):
        raise ConfigError(f"scale: the model {told}; give --scale raw, or leave it out.")
    return "raw"


def _tell_of_scale(model: ForeignModel, scale: str, probes: np.ndarray) -> None:
    """Warn if another scaling, and not the given one, gives the first normalization of a model the numbers of its training."""
    if scale == "raw" and model.scaling_layer() is not None:
        return
    off: dict[str, float] = {}
    for name in dict.fromkeys((scale, *SCALINGS)):  # the given one first: a model without a normalization is asked once
        if model.channels == 1 and name in ("caffe", "torch"):
            continue
        spread = model.spread(as_trained(cast("Any", SCALINGS[name]), probes, model.channels))
        if spread is None:
            return
        off[name] = spread
    best = min(off, key=lambda name: off[name])
    if off[scale] > off[best] + _IMPLAUSIBLE:
        log.warning(
            "--scale %s gives the first normalization of the model numbers that vary %.1f times as much as, or as little as, "
            "in its training; with --scale %s it is %.1f times. --check shows which is right.",
            *(scale, np.exp(off[scale]), best, np.exp(off[best])),
        )


def _own_answers(config: ImportConfig, model: ForeignModel, imported: Imported, bundle: Bundle) -> dict[str, Answer]:
    """What the model's own pipeline says of the checked images, or what the user says that it said."""
    if config.expected is not None:
        return expected_answers(config)
    folder, frozen = Path(str(config.check)), imported.frozen
    require_same_pixels(folder, frozen.size, frozen.rules)
    paths, scores = own_scores(model, folder, frozen.size, frozen.base.scaling, frozen.rules, imported.kind, len(bundle.labels))
    best = scores.argmax(axis=1)
    answers = (Answer(bundle.labels[int(one)], float(row[one])) for one, row in zip(best, scores, strict=True))
    return dict(zip((path.relative_to(folder).as_posix() for path in paths), answers, strict=True))


def _require_same_scores(bundle: Bundle, source: str) -> float:
    """How far the bundle's scores are from those of the model; raises BundleError if it is too far."""
    off = _distance(bundle)
    if off > _MOST_OFF:
        raise BundleError(
            f"The bundle's scores differ from those of the model {source}: off by {off:.2g}; nothing was written."
        )
    return off


def _distance(bundle: Bundle) -> float:
    """The largest difference between the scores of the CPU engine and of Keras on the bundle's probes."""
    probes = bundle.probes()
    scores = load_engine(bundle, "openvino").predict(probes["pixels"]).scores
    return float(np.abs(probes["scores"] - scores).max())


def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write a bundle's model as a plain model of Keras or ONNX that takes pixels and returns scores.

    Args:
        config: the bundle, and the file to write.

    Returns:
        `model`, the URL of the file; `labels`, in the order of its scores.

    Raises:
        BundleError: the bundle is damaged or has no head.
        WeightsError: the name of the file ends in neither .keras nor .onnx, or the bundle cannot be written as such a file.
    """
    bundle = load_bundle(config.bundle, config.storage_options)
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.location.url} has no head, so it cannot be exported as a classifier.")
    if not config.model.endswith((".keras", ".onnx")):
        raise WeightsError(f"model: write a file name that ends in .keras or .onnx; found {config.model!r}.")
    target = resolve(config.model, config.storage_options)
    if bundle.quantized:
        log.warning(
            "The base of %s is in int8. The exported model is in float32, so some of its scores, and labels, will differ.",
            bundle.location.url,
        )
    if config.model.endswith(".onnx"):
        target.write(export_onnx(bundle))
    elif bundle.has(bundles.ONNX):
        raise WeightsError(f"The bundle {bundle.location.url} comes from ONNX, which Keras cannot take in; export it as .onnx.")
    else:
        target.write(saved(plain_model(load_safely(bundle.folder / bundles.MODEL))))
    return {"model": target.url, "labels": bundle.labels}


def _load(location: Location, output: str | None) -> ForeignModel:
    try:
        data = location.read()
    except (FileNotFoundError, IsADirectoryError):
        if location.join("saved_model.pb").exists():
            raise WeightsError(
                f"model: {location.url} is a SavedModel folder, which holds a graph and not its layers. Load it with the "
                "TensorFlow that wrote it, and save it as one file: model.save('model.keras')."
            ) from None
        raise WeightsError(f"model: there is no file {location.url}.") from None
    if without_query(location.url).lower().endswith(".onnx"):
        return OnnxClassifier(data, location.url, output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras" if data.startswith(b"PK") else "model.h5")  # Keras selects its reader by the name
        path.write_bytes(data)
        try:
            return KerasClassifier(load_safely(path), output)
        except WeightsError as error:
            raise WeightsError(str(error).replace(str(path), location.url)) from None
