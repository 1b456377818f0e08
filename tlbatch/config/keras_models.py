"""The settings of `import` and `export`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from tlbatch.config.settings import Options, Strict, WhiteLevel


def _as_size(size: str | int) -> str | int:
    sides = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", str(size))
    if sides is None or not all(32 <= int(side or sides[1]) <= 4096 for side in sides.groups()):
        raise ValueError("write one number or HEIGHTxWIDTH, each from 32 to 4096")
    return size


#: As in `schema`, which `--help` does not import.
Background = Literal["white", "black", "hidden"]
ImageSize = Annotated[str | int, AfterValidator(_as_size)]
#: Settings of `import` for what loaded a model's training images.
_TRAINED_WITH: dict[str, dict[str, Any]] = {
    "tlbatch": {"resize": "antialias", "fit": "stretch", "color_profiles": "to_srgb"},
    "keras-dataset": {"resize": "keras", "fit": "stretch"},
    "keras-generator": {"resize": "nearest", "fit": "stretch"},
    "teachable-machine": {"resize": "lanczos", "fit": "crop-exact", "scale": "[-1,1]", "background": "black"},
    "tf-slim": {"resize": "tensorflow1", "fit": "central-crop", "scale": "[-1,1]"},
    "torchvision": {"resize": "pillow", "fit": "center-crop", "scale": "torch"},
}


class ImportConfig(Strict):
    """A classifier that was trained elsewhere, and the bundle made from it."""

    model: str = Field(description="A .keras, .h5 or .onnx file with a whole model, or its URL.")
    model_output: str | None = Field(default=None, description="Name of the output that classifies, if the model has several.")
    labels: str = Field(description="Its classes in the order of its outputs: lines of text, CSV, Parquet or JSON.")
    trained_with: (
        Literal["tlbatch", "keras-dataset", "keras-generator", "teachable-machine", "tf-slim", "torchvision"] | None
    ) = Field(
        default=None,
        description="What loaded its training images: sets resize and fit. keras-dataset is image_dataset_from_directory, "
        "keras-generator is ImageDataGenerator and load_img, torchvision is Resize(256), CenterCrop(224) and Normalize.",
    )
    scale: Literal["[-1,1]", "[0,1]", "raw", "caffe", "torch"] | None = Field(
        default=None,
        description="Range of the pixels in training: [-1,1], [0,1], caffe or torch; raw if the model scales them itself "
        "(found in its graph).",
    )
    size: ImageSize | None = Field(
        default=None, description="Height and width of its images, such as 224 or 200x300, if the model accepts any."
    )
    resize: Literal["antialias", "pillow", "keras", "tensorflow1", "nearest", "bicubic", "lanczos"] = Field(
        default="antialias",
        description="How its training resized: keras for image_dataset_from_directory and Resizing, nearest for load_img, "
        "pillow for torchvision, tensorflow1 for resize_bilinear of TensorFlow 1.",
    )
    fit: Literal["stretch", "crop", "crop-exact", "center-crop", "central-crop", "pad"] = Field(
        default="stretch",
        description="Whether its training stretched images, or kept their aspect ratio by crop or pad; crop-exact cuts at "
        "fractions of a pixel, as ImageOps.fit; center-crop is torchvision's, central-crop is tf-slim's of 87.5 %.",
    )
    shorter_side: int | None = Field(
        default=None,
        ge=32,
        le=8192,
        description="For center-crop: the shorter side before it is cut, by default 8/7 of the size.",
    )
    jpeg: Literal["accurate", "fast"] | None = Field(
        default=None,
        description="What decoded its training's JPEGs: fast for TensorFlow, as is assumed of keras; accurate for most others.",
    )
    background: Background | None = Field(
        default=None,
        description="What its training showed where an image is transparent: white, black, or the colours that are hidden "
        "there, as Keras, TensorFlow and Pillow show them; as is assumed of all but tlbatch's own way.",
    )
    color_profiles: Literal["to_srgb", "ignored"] = Field(
        default="ignored", description="Whether its training converted colour profiles to sRGB; tlbatch's does, others rarely."
    )
    check: str | None = Field(
        default=None, description="Folder of images whose labels are compared with those of the model's own Keras pipeline."
    )
    expected: str | None = Field(
        default=None, description="With check, a labels file with what the model said of these images elsewhere, instead."
    )
    sheet: str | None = Field(
        default=None, description="With check, an HTML file to write: the images whose labels or scores differ most."
    )
    quantize: Literal["none", "int8"] = Field(
        default="none",
        description="With check, compute its base in int8, if 99 % of these images keep the model's own label; faster on CPUs, "
        "and needs tlbatch[quantize], here alone.",
    )
    white_level: WhiteLevel = "auto"
    bundle: str = Field(description="Folder or URL where the bundle is written.")
    storage_options: Options = {}  # noqa: RUF012  # pydantic copies it

    @model_validator(mode="before")
    @classmethod
    def _as_trained_with(cls, values: Any) -> Any:
        preset = _TRAINED_WITH.get(values.get("trained_with") or "") if isinstance(values, dict) else None
        return {**preset, **values} if preset else values

    @model_validator(mode="after")
    def _is_checked(self) -> Self:
        for name in ("expected", "sheet"):
            if getattr(self, name) is not None and self.check is None:
                raise ValueError(f"{name}: give the folder of its images with check")
        if self.quantize != "none" and self.check is None:
            raise ValueError("quantize: give a folder of images like those that it will classify with check")
        if self.fit == "crop-exact" and self.resize in ("keras", "tensorflow1", "nearest"):
            raise ValueError(f"fit: with resize={self.resize} Keras cuts at whole pixels; write crop")
        if self.fit == "center-crop" and self.resize in ("keras", "tensorflow1"):
            raise ValueError(f"fit: center-crop is for pictures that are rounded after resizing; found resize={self.resize}")
        if self.shorter_side and self.fit != "center-crop":
            raise ValueError("shorter_side: it belongs to fit=center-crop")
        return self

    @property
    def transform(self) -> Literal["accurate", "fast"]:
        """How JPEGs are decoded."""
        return self.jpeg or ("fast" if self.resize in ("keras", "tensorflow1") else "accurate")

    @property
    def shown(self) -> Background:
        """What shows where an image is transparent."""
        is_own = self.resize == "antialias" and self.transform == "accurate"
        return self.background or ("white" if is_own else "hidden")

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width."""
        if self.size is None:
            return None
        sides = [int(side) for side in str(self.size).split("x")]
        return sides[0], sides[-1]

    @field_validator("scale", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        return str(value).replace(" ", "") if isinstance(value, list) else value


class ExportConfig(Strict):
    """A bundle, and the plain model made from it."""

    bundle: str = Field(description="Folder or URL of the bundle.")
    model: str = Field(description="The .keras or .onnx file to write, or its URL.")
    storage_options: Options = {}  # noqa: RUF012  # pydantic copies it
