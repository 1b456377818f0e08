"""Small pictures, and stores of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy(color: tuple[int, int, int], seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A picture of `color` that is unlike any other seed's."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise + color, 0, 255).astype(np.uint8))


def write_store(folder: Path, per_class: int, first: int = 0) -> Path:
    """One folder a color, `per_class` pictures in each."""
    for label, color in COLORS.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + per_class):
            (folder / label / f"{number:04d}.jpg").write_bytes(encoded(noisy(color, number)))
    return folder
