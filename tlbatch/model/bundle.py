"""A trained model <-> a bundle: the self-contained folder that is moved, versioned and verified.

`bundle.json` is written last and contains the digest of every other file. A folder without it, or with a file that differs, is
not a bundle. The model includes the base's preprocessing, so it takes uint8 RGB pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import from_json

from tlbatch.errors import BundleError
from tlbatch.schema import PIN, UNRECORDED_RULES, Background, PixelRules, Size, sha256
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import local_copy, resolve

#: What is written. A tlbatch that reads format 1 alone knows neither the newer resizer nor bases in int8, and would not say so.
FORMAT_VERSION = 2
_READ = (1, FORMAT_VERSION)

BUNDLE = "bundle.json"
MODEL = "model.keras"
ONNX = "base.onnx"
HEAD = "head.keras"
PROBES = "probes.npz"
CARD = "card.html"
SPLIT = "split.csv"

#: Everything that a bundle's folder may contain.
NAMES = frozenset((BUNDLE, MODEL, ONNX, HEAD, PROBES, CARD, SPLIT, "openvino"))

#: The largest difference in a probe's scores that the self-test allows. In float32, engines differ by up to 1e-5. With
#: bfloat16, which OpenVINO uses by default on processors that support it, the difference was measured at 0.2.
PROBE_TOLERANCE = 1e-3

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Score = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Base(_Strict):
    name: str
    weights: str
    weights_digest: _Digest
    scaling: str
    quantized: _Digest | None = None


class _Input(_Strict):
    size: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=2, max_length=2)]
    white_level: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    color_profiles: Literal["to_srgb", "ignored"] = "ignored"
    shorter_side: Annotated[int, Field(ge=1, le=8192)] | None = None
    background: Background = "white"
    batch: Literal[1] | None = None
    resize: str = PixelRules().resize
    interpolation: str = PixelRules().interpolation
    jpeg: str = PixelRules().jpeg

    @field_validator("resize", "interpolation", "jpeg")
    @classmethod
    def _is_known(cls, value: str, field: ValidationInfo) -> str:
        if value not in get_args(get_type_hints(PixelRules)[str(field.field_name)]):
            raise ValueError(f"this tlbatch does not know {value[:100]!r}")
        return value


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
    def batch(self) -> int | None:
        """The only batch size that its network takes; None for any."""
        return cast("int | None", self.facts["input"].get("batch"))

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
    def quantized(self) -> str | None:
        """SHA-256 of the OpenVINO files of a base in int8; None if it is in float32."""
        return cast("str | None", self.facts["base"].get("quantized"))

    @property
    def quantizable(self) -> bool:
        """Whether its base could be in int8, and training has not found that too inaccurate."""
        training = self.facts.get("training")
        tried = isinstance(training, dict) and "quantized" in training
        return self.has(MODEL) and self.quantized is None and not tried

    @property
    def base_digest(self) -> str:
        """SHA-256 over everything the features depend on (network, weights, layers, input size, preprocessing).

        Equal digests mean equal features.
        """
        return base_digest(self.facts)

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
    if type(found) is int and found not in _READ:
        raise BundleError(f"The bundle {url} has format {found}; this tlbatch reads formats 1 to {FORMAT_VERSION}.")
    if type(found) is not int:
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


def base_digest(facts: Mapping[str, Any]) -> str:
    """As `Bundle.base_digest`, of the contents of a `bundle.json`."""
    base = {name: facts["base"][name] for name in ("name", "weights_digest", "scaling")}
    base |= {"quantized": facts["base"]["quantized"]} if facts["base"].get("quantized") else {}
    depths = {"depths": facts["depths"]} if facts.get("depths") else {}
    wanted = {**base, **depths, "input": facts["input"], "features_length": facts["features_length"]}
    return sha256(json.dumps(wanted, sort_keys=True).encode())


def require_bundle_place(location: Location) -> None:
    """Raises BundleError if a folder contains files that do not belong to a bundle, or if the address pins a digest."""
    if PIN in location.url:
        raise BundleError(f"{location.url}: a new bundle has no digest yet; remove {PIN}… from the address.")
    foreign = [name for name in location.names() if name not in NAMES and not name.startswith(".")]
    if foreign:
        raise BundleError(
            f"{location.url} contains files that do not belong to a bundle ({foreign[0]}, …); choose another --bundle."
        )


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
