"""A trained model <-> a bundle: the self-contained folder that is moved, versioned and verified.

`bundle.json` is written last and contains the digest of every other file. A folder without it, or with a file that differs, is
not a bundle. The model includes the base's preprocessing, so it takes uint8 RGB pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from tlbatch.errors import BundleError
from tlbatch.model import bases
from tlbatch.model.depths import FeaturesOf, at_depths, depths_of
from tlbatch.model.openvino import Files, export_openvino, join_openvino
from tlbatch.model.own_keras import import_keras, with_own_keras
from tlbatch.model.safe_load import load_safely
from tlbatch.schema import PIN, UNRECORDED_RULES, PixelRules, Size, sha256
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import local_copy, resolve

if TYPE_CHECKING:
    import keras

FORMAT_VERSION = 1

BUNDLE = "bundle.json"
MODEL = "model.keras"
HEAD = "head.keras"
PROBES = "probes.npz"
CARD = "card.html"
SPLIT = "split.csv"

#: Everything that a bundle's folder may contain.
NAMES = frozenset((BUNDLE, MODEL, HEAD, PROBES, CARD, SPLIT, "openvino"))

#: The largest difference in a probe's scores that the self-test allows. In float32, engines differ by up to 1e-5. With
#: bfloat16, which OpenVINO uses by default on processors that support it, the difference was measured at 0.2.
PROBE_TOLERANCE = 1e-3
_PROBES = 8


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Score = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Base(_Strict):
    name: str
    weights: str
    weights_digest: _Digest
    scaling: str


class _Input(_Strict):
    size: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=2, max_length=2)]
    white_level: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    color_profiles: Literal["to_srgb", "ignored"] = "ignored"


class _Facts(_Strict):
    """The fields that `bundle.json` must have; it may have more. Other people may have written it."""

    base: _Base
    input: _Input
    depths: list[str] = []
    features_length: Annotated[int, Field(ge=1, le=1 << 20)]
    labels: list[str]
    abstain_threshold: _Score | None
    label_thresholds: list[_Score] | None = None
    files: dict[str, _Digest]

    @model_validator(mode="after")
    def _one_threshold_per_label(self) -> Self:
        if self.label_thresholds is not None and len(self.label_thresholds) != len(self.labels):
            raise ValueError(f"there are {len(self.labels)} labels and {len(self.label_thresholds)} thresholds")
        return self


@dataclass(frozen=True)
class Bundle:
    """A bundle whose `bundle.json` was read; its other files are not opened yet.

    Attributes:
        location: where it is stored.
        facts: the contents of `bundle.json`.
        digest: SHA-256 of `bundle.json`. It identifies the bundle, because `bundle.json` contains all other digests.
    """

    location: Location
    facts: Mapping[str, Any]
    digest: str

    @property
    def pinned(self) -> str:
        """Its address with its digest. A run gives this address to its actors, so that they refuse any other bundle."""
        return f"{self.location.url}{PIN}{self.digest}"

    @property
    def size(self) -> Size:
        """(height, width) of the pixels it takes."""
        height, width = self.facts["input"]["size"]
        return height, width

    @property
    def pixel_rules(self) -> PixelRules:
        """How the numbers in an image file become the pixels it takes; a bundle that records no rules was made before them."""
        found = {name: self.facts["input"][name] for name in PixelRules._fields if name in self.facts["input"]}
        return UNRECORDED_RULES._replace(**found)

    @property
    def labels(self) -> list[str]:
        """The classes in the order of the scores; empty if the bundle has only a base."""
        return list(self.facts["labels"])

    @property
    def features_length(self) -> int:
        """The length of a feature vector."""
        return int(self.facts["features_length"])

    @property
    def depths(self) -> tuple[str, ...]:
        """The layers whose averages are the features; empty for the last one alone."""
        return tuple(self.facts.get("depths") or ())

    @property
    def base_digest(self) -> str:
        """SHA-256 over everything the features depend on (network, weights, layers, input size, preprocessing).

        Equal digests mean equal features.
        """
        return _base_digest(self.facts)

    @property
    def abstain_threshold(self) -> float | None:
        """Images whose best score is lower are marked `abstained`; None if the bundle never abstains."""
        return cast("float | None", self.facts["abstain_threshold"])

    @property
    def label_thresholds(self) -> list[float] | None:
        """For each label the lowest score at which an image gets it; None if each image has exactly one label."""
        thresholds = self.facts.get("label_thresholds")
        return None if thresholds is None else [float(value) for value in thresholds]

    @property
    def for_run(self) -> dict[str, Any]:
        """The fields of `run.json` that describe the bundle, besides its digest."""
        return {
            "bundle_url": self.location.url,
            "base": self.base_digest,
            "multi_label": self.label_thresholds is not None,
            "abstain_threshold": self.abstain_threshold,
            "pixel_rules": self.pixel_rules._asdict(),
        }

    @cached_property
    def folder(self) -> Path:
        """The files on this machine, each checked against its digest.

        Raises:
            BundleError: a file is missing or differs from its digest.
        """
        cache = Path(tempfile.gettempdir(), f"tlbatch-bundles-{os.getuid()}", self.digest)
        try:
            folder = local_copy(self.location, self.facts["files"], cache)
            for name, expected in self.facts["files"].items():
                if sha256(Path(folder, name).read_bytes()) != expected:
                    raise BundleError(f"The bundle {self.location.url} is damaged: {name} differs from its recorded sha256.")
        except FileNotFoundError as error:
            raise BundleError(f"The bundle {self.location.url} is incomplete: {error.filename or error} is missing.") from None
        return folder

    def require_whole(self) -> None:
        """Raises BundleError unless every file exists and matches its digest."""
        _ = self.folder

    def has(self, name: str) -> bool:
        """Whether the bundle has a file of this name."""
        return name in self.facts["files"]

    def probes(self) -> dict[str, np.ndarray]:
        """`pixels` (n, height, width, 3) uint8, and the expected `features` and, with a head, `scores`."""
        with np.load(self.folder / PROBES, allow_pickle=False) as file:
            return dict(file)


def load_bundle(url: str, storage_options: Mapping[str, Any] | None = None) -> Bundle:
    """Read `bundle.json`; the other files are fetched and checked when `folder` is first read.

    Args:
        url: the bundle's folder; `URL#sha256=DIGEST` accepts only the bundle whose `bundle.json` has that digest.
        storage_options: fsspec's options for it.

    Raises:
        BundleError: there is no bundle, its format is newer, or it is not the pinned one.
    """
    where, pin = _unpinned(url)
    location = resolve(where, storage_options)
    try:
        data = location.join(BUNDLE).read()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"There is no bundle at {location.url}: it has no {BUNDLE}. `tlbatch train` creates one.") from None
    except PermissionError as error:
        raise BundleError(f"The bundle {location.url} cannot be read: {error}.") from None
    digest = sha256(data)
    if pin not in ("", digest):
        raise BundleError(f"The bundle {location.url} is not the pinned one: its {BUNDLE} has the sha256 {digest}, not {pin}.")
    return Bundle(location, _validated(data, location.url), digest)


def _unpinned(url: str) -> tuple[str, str]:
    """Split an address into the bundle's address and its pinned digest, which is empty if there is none.

    Raises:
        BundleError: the pinned digest is not a digest.
    """
    where, _, pin = url.partition(PIN)
    if PIN in url and not re.fullmatch("[0-9a-f]{64}", pin):
        raise BundleError(f"{url}: {PIN} takes the 64 digits that `sha256sum {BUNDLE}` prints; found {pin!r}.")
    return where, pin


def _validated(data: bytes, url: str) -> dict[str, Any]:
    """The contents of `bundle.json`, checked, because other people may have written it."""
    try:
        facts = from_json(data)
    except ValueError:
        facts = None
    found = facts.get("format_version") if isinstance(facts, dict) else None
    if type(found) is int and found != FORMAT_VERSION:
        raise BundleError(f"The bundle {url} has format {found}; this tlbatch reads format {FORMAT_VERSION}.")
    if found != FORMAT_VERSION:
        raise BundleError(f"{url} is not a bundle: its {BUNDLE} is not JSON with a format_version.")
    try:
        files = _Facts.model_validate(facts).files
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])).encode("unicode_escape").decode()[:100]  # text from the file
        field = f"{where} in its {BUNDLE}" if where else f"its {BUNDLE}"
        raise BundleError(f"{url} is not a bundle: {field} is invalid: {first['msg'].removeprefix('Value error, ')}.") from None
    if not all(_is_inside(name) for name in files):
        raise BundleError(f"{url} is not a bundle: its {BUNDLE} lists files that a bundle does not have.")
    return cast("dict[str, Any]", facts)


def _is_inside(name: str) -> bool:
    """Whether a file name stays inside the bundle's folder, so that no bundle can write elsewhere."""
    return name.split("/", maxsplit=1)[0] in NAMES and not {"..", ""} & set(name.split("/")) and "\\" not in name


@dataclass(frozen=True)
class Frozen:
    """A base that is ready to run and to get heads.

    Attributes:
        base: a network of `keras.applications`, or an imported one.
        size: height and width of its input, in pixels.
        rules: how the numbers in image files become its pixels.
        weights: the source of its weights, as the user gave it.
        network: the network itself.
        extractor: uint8 pixels (batch, height, width, 3) -> features (batch, F); includes the preprocessing.
        openvino: the extractor's OpenVINO files.
        depths: the layers whose averages are the features; empty for the last one alone.
    """

    base: bases.Base
    size: Size
    rules: PixelRules
    weights: str
    network: keras.Model
    extractor: keras.Model
    openvino: Files
    depths: tuple[str, ...] = ()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The fields of `bundle.json` that describe the base."""
        base = {"name": self.base.name, "weights": self.weights, "weights_digest": bases.weights_digest(self.network)}
        how = self.rules._asdict()
        levels = {name: how[name] for name in ("white_level", "color_profiles")}
        unrecorded = all(getattr(UNRECORDED_RULES, name) == value for name, value in levels.items())
        return {
            "base": {**base, "scaling": self.base.scaling},
            "input": {
                "size": list(self.size),
                "resize": self.rules.resize,
                "interpolation": self.rules.interpolation,
                "color": "rgb",
                **({} if unrecorded else levels),
                **({"jpeg": self.rules.jpeg} if self.rules.jpeg != PixelRules().jpeg else {}),
            },
            **({"depths": list(self.depths)} if self.depths else {}),
            "features_length": int(self.extractor.output["features"].shape[-1]),
        }

    @property
    def digest(self) -> str:
        """The same digest as `Bundle.base_digest`."""
        return _base_digest(self.facts)


def _base_digest(facts: Mapping[str, Any]) -> str:
    base = {name: facts["base"][name] for name in ("name", "weights_digest", "scaling")}
    depths = {"depths": facts["depths"]} if facts.get("depths") else {}
    wanted = {**base, **depths, "input": facts["input"], "features_length": facts["features_length"]}
    return sha256(json.dumps(wanted, sort_keys=True).encode())


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
    return Frozen(base, (size, size), rules, weights, network, extractor, export_openvino(extractor), depths)


@with_own_keras
def frozen_base_of(bundle: Bundle) -> Frozen:
    """The base of a bundle, ready to get another head."""
    keras = import_keras()
    model = load_safely(bundle.folder / MODEL)
    extractor = keras.Model(model.input, {"features": model.output["features"]})
    network = next(layer for layer in extractor.layers if isinstance(layer, keras.Model))
    base = bundle.facts["base"]
    known = bases.Base(base["name"], bundle.size[0], base["scaling"])
    files = export_openvino(extractor)
    return Frozen(known, bundle.size, bundle.pixel_rules, base["weights"], network, extractor, files, bundle.depths)


@dataclass(frozen=True)
class Trained:
    """A head for a frozen base, its labels and thresholds, and how it was trained and measured."""

    head: keras.Model
    labels: tuple[str, ...]
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    abstain_threshold: float | None = None
    label_thresholds: tuple[float, ...] | None = None


def require_bundle_place(location: Location) -> None:
    """Raises BundleError if a folder contains files that do not belong to a bundle, or if the address pins a digest."""
    if PIN in location.url:
        raise BundleError(f"{location.url}: a new bundle has no digest yet; remove {PIN}… from the address.")
    foreign = [name for name in location.names() if name not in NAMES and not name.startswith(".")]
    if foreign:
        raise BundleError(
            f"{location.url} contains files that do not belong to a bundle ({foreign[0]}, …); choose another --bundle."
        )


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
        probe_pixels: (n, height, width, 3) uint8 images; some become the probes of the bundle's self-test.
        extra: further files, name -> bytes, such as the model card.
    """
    model = _stack(frozen, trained)
    files = {MODEL: saved(model), PROBES: _probes(model, probe_pixels), **(extra or {})}
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


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed: a machine with JAX needs neither OpenVINO nor TensorFlow."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def copy_bundle(bundle: Bundle, location: Location) -> Bundle:
    """Copy a bundle's files to another location, `bundle.json` last; an existing bundle is replaced."""
    data = bundle.location.join(BUNDLE).read()
    location.join(BUNDLE).unlink()
    for name in bundle.facts["files"]:
        location.join(*name.split("/")).write((bundle.folder / name).read_bytes())
    location.join(BUNDLE).write(data)
    return Bundle(location, bundle.facts, bundle.digest)


def _stack(frozen: Frozen, trained: Trained | None) -> keras.Model:
    """uint8 pixels (batch, height, width, 3) -> {"features": (batch, F), "scores": (batch, C)}, both float32."""
    import keras

    features = frozen.extractor.output["features"]
    outputs = {"features": features}
    if trained is not None:
        outputs["scores"] = trained.head(features, training=False)
    return keras.Model(frozen.extractor.input, outputs, name=f"tlbatch_{frozen.base.name}")


@with_own_keras
def saved(model: keras.Model) -> bytes:
    """A Keras model as the bytes of a `.keras` file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        return path.read_bytes()


def _probes(model: keras.Model, pixels: np.ndarray) -> bytes:
    chosen = pixels[np.linspace(0, len(pixels) - 1, min(_PROBES, len(pixels))).astype(int)]
    expected = {name: np.asarray(value) for name, value in model(chosen, training=False).items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=chosen, **expected)  # type: ignore[arg-type]
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
