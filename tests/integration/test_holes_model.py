"""A store that loses and regains parts by chance, between nights and during them, against a model of what must be in the table.

TLBATCH_HOLES: the number of nights; `make chaos` runs 300.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import COLORS, encoded

import tlbatch
from tlbatch.commands.classify import classify
from tlbatch.config import RunConfig
from tlbatch.errors import ManyDeletedError
from tlbatch.images.listing import Selection, list_store
from tlbatch.storage.resolve import resolve

NIGHTS = int(os.environ.get("TLBATCH_HOLES", "6"))
FOLDERS, IMAGES = 5, 24  # so that a folder alone is more than may always leave


class Store:
    """Folders of one-colored images, some of which are away, and every version of an image that there ever was."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.root, self.away, self.chance = root / "store", root / "away", chance
        self.away.mkdir()
        for folder in range(FOLDERS):
            for number in range(IMAGES):
                self.write(f"{folder}/{number}.png")

    def write(self, key: str) -> None:
        """A new version: another color, or the same one again."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        color = self.chance.choice(sorted(COLORS))
        path.write_bytes(encoded(Image.new("RGB", (8, 8), COLORS[color]), "PNG", compress_level=0))

    def images(self) -> dict[str, tuple[int, int, str]]:
        """Key -> inode, time and color of what is there now."""
        found = {}
        for path in self.root.rglob("*.png"):
            with Image.open(path) as picture:
                color = next(name for name, value in COLORS.items() if picture.getpixel((0, 0)) == value)
            facts = path.stat()
            found[path.relative_to(self.root).as_posix()] = (facts.st_ino, facts.st_ctime_ns, color)
        return found

    def disturb(self) -> None:
        """One thing that happens to stores."""
        away = sorted(self.away.iterdir())
        names = {path.name for path in away}
        folders = [path for path in sorted(self.root.iterdir()) if any(path.iterdir()) and path.name not in names]
        here = sorted(self.images())
        what = self.chance.choice(["lose", "lose", "regain", "regain", "replace", "exchange", "delete", "add"])
        if what == "lose" and len(folders) > 1:
            lost = self.chance.choice(folders)
            lost.rename(self.away / lost.name)
            lost.mkdir()  # an empty mount point
        elif what == "regain" and away:
            (self.root / away[0].name).rmdir() if not any((self.root / away[0].name).iterdir()) else None
            if not (self.root / away[0].name).exists():
                away[0].rename(self.root / away[0].name)
            else:
                shutil.rmtree(away[0])  # others have filled the place meanwhile
        elif what == "replace" and here:
            self.write(self.chance.choice(here))
        elif what == "exchange" and len(here) > 1:
            one, other = (self.root / key for key in self.chance.sample(here, 2))
            one.rename(self.root / "x"), other.rename(one), (self.root / "x").rename(other)
        elif what == "delete" and len(here) > 1:
            (self.root / self.chance.choice(here)).unlink()
        elif what == "add":
            self.write(f"{self.chance.randrange(FOLDERS)}/{self.chance.randrange(IMAGES, 2 * IMAGES)}.png")


def table_of(output: Path) -> dict[str, str]:
    rows = tlbatch.read_predictions(str(output), ["key", "label"])
    return dict(zip(rows["key"], rows["label"], strict=True))


@pytest.mark.timeout(3600)
def test_nothing_that_stays_is_missing_or_wrong_and_nothing_leaves_in_silence(tmp_path, tiny_url, ray_here):
    chance = random.Random(int(os.environ.get("TLBATCH_SAMPLE", "0")))
    store, output = Store(tmp_path, chance), tmp_path / "out"
    settings = {"images": str(store.root), "bundle": tiny_url, "output": str(output), "incremental": True}
    config = RunConfig(**settings, max_failed_ratio=1.0, report=False, num_gpus=0)
    before: Mapping[str, tuple] = {}
    undisturbed: set[str] = set()
    table: dict[str, str] = {}
    refused = left = failed = 0
    for night in range(NIGHTS):
        for _ in range(chance.randrange(3) if night else 0):
            store.disturb()
        listed, listing = store.images(), list_store(resolve(config.images), Selection())
        for _ in range(chance.randrange(3) if night else 0):
            store.disturb()  # after the listing, before the images are read
        now = store.images()
        allow = chance.random() < 0.5
        try:
            report = classify(config.model_copy(update={"allow_deletes": allow}), listing=listing)
        except ManyDeletedError:
            assert not allow
            assert table_of(output) == table, "nothing was published"
            refused += 1
            continue
        was, table = table, table_of(output)
        gone = {key for key in was if key not in listed}
        assert table.keys() <= listed.keys()
        assert len(gone) <= sum(report.get("left", {}).values()), "what left is said, folder by folder"
        calm = {key for key, facts in listed.items() if now.get(key) == facts}
        for key, facts in listed.items():
            if key in before and (key in calm or (key in undisturbed and before[key] == facts)):
                assert table.get(key) == facts[2], (night, key)
        before, undisturbed = listed, calm
        left, failed = left + len(gone), failed + report["failed"]
    print(f"{NIGHTS} nights: {refused} refused, {left} images left the table, {failed} failed for a night")
