"""The table of formats in docs/formats.md says what tlbatch and three other decoders make of each file today."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from support.format_table import SHAPE, readings
from support.paths import ROOT

from tlbatch.images.decode import Pixels, decode, prepare_process
from tlbatch.schema import PixelRules

PAGE = ROOT / "docs" / "formats.md"


def by_tlbatch(data: bytes) -> np.ndarray:
    found = decode(data, SHAPE, rules=PixelRules())
    assert isinstance(found, Pixels)
    return found.array


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def by_tensorflow(data: bytes) -> np.ndarray:
    import tensorflow as tf

    return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()


def by_opencv(data: bytes) -> np.ndarray:
    import cv2

    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def column(number: int) -> dict[str, str]:
    """One column of the table, by the file."""
    lines = PAGE.read_text().split("| file | tlbatch |")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {row[0]: row[number] for row in cells}


@pytest.mark.parametrize(
    ("number", "read"), list(enumerate([by_tlbatch, by_tensorflow, by_pillow, by_opencv], 1)), ids=lambda one: str(one)[:20]
)
def test_each_cell_is_what_is_found(number, read):
    prepare_process()
    assert column(number) == readings(read)


def test_the_versions_on_the_page_are_those_installed():
    from importlib.metadata import version

    named = re.findall(r"(TensorFlow|Pillow|OpenCV) ([0-9.]+)", PAGE.read_text().split("| file | tlbatch |")[0][-600:])
    packages = {"TensorFlow": "tensorflow", "Pillow": "pillow", "OpenCV": "opencv-python-headless"}
    assert dict(named) == {name: ".".join(version(package).split(".")[:3]) for name, package in packages.items()}
