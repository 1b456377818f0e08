"""The settings of a frozen base, and of the verbs that make one: `extract` and `train`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tlbatch.config.settings import (
    Count,
    Engine,
    Images,
    MlflowUri,
    Names,
    Notify,
    Resources,
    RunConfig,
    Strict,
    Strings,
    WhiteLevel,
)

#: Settings of a head that Adam trains; a convex one has none of them.
_OF_SGD = ("epochs", "patience", "learning_rate")


class Pretrained(Strict):
    """A frozen base."""

    base: str = Field(default="MobileNetV2", description="A network of keras.applications, such as MobileNetV2.")
    size: Annotated[int, Field(ge=32, le=4096)] | None = Field(
        default=None, description="Height and width to which images are resized; by default the base's own."
    )
    weights: str = Field(default="imagenet", description="imagenet, random, or a .h5, .weights.h5 or .keras file or URL.")
    white_level: WhiteLevel = "auto"
    features_of: Literal["depths", "last"] = Field(
        default="depths",
        description="depths: averages of up to five layers of the base, early and late; last: of the last one.",
    )
    quantize: Literal["none", "int8"] = Field(
        default="none",
        description="int8: the base computes in 8-bit integers on CPUs, which is faster; its features are others. Needs "
        "tlbatch[quantize], here alone.",
    )

    def _require_cpus(self) -> None:
        """Raises ValueError if a base in int8 is wanted and an engine or a GPU that it does not run on."""
        engine, gpus = getattr(self, "engine", "auto"), getattr(self, "num_gpus", None)
        if self.quantize == "none":
            return
        if engine not in ("auto", "openvino"):
            raise ValueError(f"engine: a base in int8 runs in OpenVINO, not in {engine}; leave engine out")
        if gpus:
            raise ValueError("num_gpus: a base in int8 runs on CPUs; leave num_gpus out")


class ExtractConfig(Pretrained, RunConfig):
    """One run that writes features, of a bundle's base or of a base given by name."""

    bundle: str = Field(default="", description="Folder or URL of a bundle; without one, base, size and weights name a base.")
    predictions: Literal[False] = False
    features: Literal[True] = True
    stale: Literal["keep", "redo"] = Field(
        default="redo", description="With incremental, features of another base: keep or redo."
    )

    @model_validator(mode="after")
    def _has_a_base_to_quantize(self) -> Self:
        if self.bundle and self.quantize != "none":
            raise ValueError("quantize: the base of a bundle stays as it is; name a base instead")
        self._require_cpus()
        return self


class TrainConfig(Pretrained, Images, Resources):
    """One training: labelled images or their stored features, a base, and how the head is trained."""

    images: str = Field(
        default="",
        description="Folder or URL of the images or shards, a list of addresses, or an S3 Inventory's manifest.json.",
    )
    features: str | None = Field(
        default=None, description="Train on the stored features of this run or output; no image is read."
    )
    bundle: str = Field(description="Folder or URL where the trained bundle is written.")
    labels: Strings = Field(
        default=(),
        description="CSV or Parquet with key or uri, and label; repeatable, later files win. Default: one folder per class.",
    )
    labels_columns: Names = Field(
        default=(), description="Columns of the labels files that name the image and its label, if called otherwise: id,breed."
    )
    multi_label: bool = Field(
        default=False, description="An image may have any number of labels, one per row of the labels file."
    )
    precision: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Target precision, e.g. 0.95: images below the resulting score threshold are marked `abstained`.",
    )
    class_weight: Literal["auto", "none", "balanced"] = Field(
        default="auto",
        description="balanced: rare classes weigh as much as common ones; auto is balanced if a class has ten times as many "
        "images as another.",
    )
    engine: Engine = "auto"
    quantize_loss: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.5,
        description="quantize: points of held-out accuracy that int8 may cost; if it costs more, and more than one image, the "
        "base stays in float32.",
    )
    try_bases: Names = Field(
        default=(),
        description="Train on the features of each of these bases, and keep the most accurate: NAME, NAME@SIZE or "
        "NAME@SIZE=WEIGHTS, with commas between them.",
    )
    budget: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]*[smh]$",
        description="try_bases: begin no base that will not be done in this time, such as 90s, 10m or 2h.",
    )
    min_speed: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="try_bases: keep only a base that predicts so many images a second on this machine's CPUs."
    )
    head: Literal["auto", "convex", "sgd"] = Field(
        default="auto",
        description="convex: the one head that fits best, by cross-validation; sgd: Adam with early stopping, for millions of "
        "labels; auto is convex up to 300 million features, and sgd if a setting of sgd is given.",
    )
    epochs: Count = Field(
        default=100, description="sgd: maximum number of epochs; training stops early when validation stops improving."
    )
    patience: Count = Field(default=10, description="sgd: epochs without a better validation loss after which training stops.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="sgd: learning rate of Adam.")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15, description="Share of each class used for sgd's early stopping; a convex head trains on it too."
    )
    test: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="Share of each class used only to measure accuracy."
    )
    seed: int = Field(default=0, description="Seed of the split; of sgd also that of the first weights and of the shuffling.")
    notify: Notify = None
    mlflow_uri: MlflowUri = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        if bool(self.images) == bool(self.features):
            raise ValueError("give either images or features to train on")
        if self.labels_columns and not self.labels:
            raise ValueError("labels_columns: without labels this setting does nothing; remove it")
        if self.multi_label and not self.labels:
            raise ValueError("multi_label: images with several labels need a labels file; give labels")
        if self.multi_label and self.precision is not None:
            raise ValueError("precision: with multi_label every label has a threshold of its own")
        of_one = [name for name in ("base", "size", "features") if name in self.model_fields_set]
        if self.try_bases and of_one:
            raise ValueError(f"{of_one[0]}: with try_bases every base has its own; write NAME@SIZE there")
        of_several = [name for name in ("budget", "min_speed") if getattr(self, name) is not None]
        if of_several and not self.try_bases:
            raise ValueError(f"{of_several[0]}: without try_bases this setting does nothing; remove it")
        unused = [name for name in Images.model_fields if name != "images" and name in self.model_fields_set]
        of_sgd = [name for name in _OF_SGD if name in self.model_fields_set]
        if self.head == "convex" and of_sgd:
            raise ValueError(f"{of_sgd[0]}: a convex head has no epochs, so this setting does nothing; remove it")
        if self.features and unused:
            raise ValueError(f"{unused[0]}: with features no image is read, so this setting does nothing; remove it")
        return self

    @model_validator(mode="after")
    def _can_be_quantized(self) -> Self:
        if self.quantize == "none" and "quantize_loss" in self.model_fields_set:
            raise ValueError("quantize_loss: without quantize this setting does nothing; remove it")
        if self.quantize != "none" and self.features:
            raise ValueError("quantize: stored features are those of their base; give quantize to extract, and train on these")
        self._require_cpus()
        return self

    @property
    def budget_seconds(self) -> float:
        """The seconds that `budget` stands for."""
        return float("inf") if self.budget is None else int(self.budget[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.budget[-1]]

    @property
    def way(self) -> Literal["auto", "convex", "sgd"]:
        """How the head is trained; auto looks at the number of labels."""
        return "sgd" if self.model_fields_set.intersection(_OF_SGD) else self.head
