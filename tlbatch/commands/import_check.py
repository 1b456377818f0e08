"""Labels of a bundle beside those of the model's own pipeline, on a folder of images, before anything is classified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlbatch.config import ImportConfig
from tlbatch.errors import BundleError, ConfigError
from tlbatch.images.decode import Pixels, decode
from tlbatch.images.label_files import read_labels
from tlbatch.model.bundle import Bundle
from tlbatch.model.engines import load_engine
from tlbatch.model.own_pipeline import images_in
from tlbatch.report.html import Thumbnail, render
from tlbatch.report.thumbnails import as_data_url
from tlbatch.schema import PixelRules, Size
from tlbatch.storage.resolve import resolve

#: The smallest share of images whose labels must be equal; one image may always differ. Differences that are named, and shown.
_FEWEST_EQUAL, _NAMED, _SHOWN = 0.99, 20, 60


class Answer(NamedTuple):
    """A label and its score, which is None where only the label is known."""

    label: str
    score: float | None


class ComparedAnswers(NamedTuple):
    """What a model's own pipeline and a bundle say of an image."""

    key: str
    path: Path
    expected: Answer
    found: Answer

    @property
    def off(self) -> float:
        """How far the answers are from each other; 1 or more if they name different labels."""
        apart = abs((self.found.score or 0) - self.expected.score) if self.expected.score is not None else 0.0
        return apart if self.found.label == self.expected.label else 1 + (self.found.score or 0)


class Checked(NamedTuple):
    """The images that could be compared."""

    told: list[ComparedAnswers]

    @property
    def different(self) -> list[ComparedAnswers]:
        """Those with another label."""
        return [one for one in self.told if one.found.label != one.expected.label]

    @property
    def equal(self) -> float:
        """The share with the same label."""
        return 1 - len(self.different) / len(self.told)

    @property
    def enough(self) -> bool:
        """Whether that is enough; one image may always differ."""
        return len(self.different) <= 1 or self.equal >= _FEWEST_EQUAL


def compare_labels(folder: Path, bundle: Bundle, own: Mapping[str, Answer]) -> Checked:
    """Compare a bundle's labels of the images in a folder with those that are expected.

    Args:
        folder: the images.
        bundle: the bundle, not yet where it belongs.
        own: file name below the folder -> answer of the model's own pipeline.

    Raises:
        ConfigError: no image can be compared.
    """
    images = {key: path for key, path in images_in(folder).items() if key in own}
    answers = zip(images.items(), _answers(bundle, images.values()), strict=True)
    told = [ComparedAnswers(key, path, own[key], answer) for (key, path), answer in answers if answer is not None]
    if not told:
        raise ConfigError(f"check: {folder} has no image that can be compared.")
    return Checked(told)


def tell_check(config: ImportConfig, checked: Checked, rules: PixelRules) -> dict[str, Any]:
    """Write the page of the images that differ most.

    Returns:
        `images`, the number compared; `equal`, the share with the same label; `different`, the images that differ with the
        `expected` and the `found` label.

    Raises:
        BundleError: too many labels differ.
    """
    if config.sheet is not None:
        resolve(config.sheet, config.storage_options).write(_sheet(checked.told, rules))
    different = checked.different
    if not checked.enough:
        first = different[0]
        raise BundleError(
            f"Of {len(checked.told):,} images in {config.check}, {len(different):,} get another label than by the model's own "
            f"pipeline, such as {first.key} ({first.found.label!r} instead of {first.expected.label!r}); no bundle was "
            "written. Say how its training resized and scaled: --trained-with, --resize, --fit, --scale."
        )
    named = [{"key": one.key, "expected": one.expected.label, "found": one.found.label} for one in different[:_NAMED]]
    return {"images": len(checked.told), "equal": checked.equal, "different": named}


def require_same_pixels(folder: Path, size: Size, rules: PixelRules) -> None:
    """Raises ConfigError if a transparent image, or a colour profile, has other pixels in Keras's loaders than by the rules."""
    own = rules._replace(background="hidden", color_profiles="ignored")
    for name, path in images_in(folder).items() if rules != own else ():
        data = path.read_bytes()
        shown, wanted = (decode(data, size, rules=one) for one in (own, rules))
        if isinstance(shown, Pixels) and isinstance(wanted, Pixels) and not np.array_equal(shown.array, wanted.array):
            raise ConfigError(
                f"check: Keras's loaders show hidden colours and ignore colour profiles, and {name} has some; give --expected "
                "FILE.csv, or --background hidden and --color-profiles ignored."
            )


def expected_answers(config: ImportConfig) -> dict[str, Answer]:
    """File name below the checked folder -> label, out of the file that says what is expected."""
    keys = images_in(Path(str(config.check)))
    labels = read_labels([resolve(str(config.expected), config.storage_options)]).of_images([(key, key) for key in keys])
    return {key: Answer(names[0], None) for (_, key), names in labels.labels.items()}


def _answers(bundle: Bundle, paths: Iterable[Path]) -> Iterator[Answer | None]:
    """The bundle's answer for each image; None if it cannot be decoded."""
    engine = load_engine(bundle, "openvino")
    for path in paths:
        pixels = decode(path.read_bytes(), bundle.size, rules=bundle.pixel_rules)
        scores = engine.predict(pixels.array[None]).scores if isinstance(pixels, Pixels) else None
        best = 0 if scores is None else int(np.argmax(scores[0]))
        yield None if scores is None else Answer(bundle.labels[best], float(scores[0, best]))


def _sheet(told: Sequence[ComparedAnswers], rules: PixelRules) -> bytes:
    worst = sorted(told, key=lambda one: -one.off)[:_SHOWN]
    shown = []
    for one in worst:
        label = one.found.label if one.found.label == one.expected.label else f"{one.found.label}, not {one.expected.label}"
        data = as_data_url(one.path.read_bytes(), 160, rules)
        why = "" if one.expected.score is None else f"the model's own score is {one.expected.score:.3f}"
        shown.append(Thumbnail(one.key, label, one.found.score or 0.0, why, data))
    return render("thumbnails.html", "The images that differ most from the model's own answers", thumbnails=shown)
