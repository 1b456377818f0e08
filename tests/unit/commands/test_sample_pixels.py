"""Pixels of some images of a store, loose or in shards, by which a base is quantised."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.pictures import write_store
from support.shards import tar_of

from tlbatch.commands.list_images import list_images
from tlbatch.commands.sample_pixels import pixels_of_any, pixels_of_named
from tlbatch.config import ExtractConfig, TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.decode import decode
from tlbatch.schema import PixelRules
from tlbatch.storage.resolve import resolve

#: What is asked of a base here.
FROZEN = SimpleNamespace(size=(32, 32), rules=PixelRules())


@pytest.fixture
def store(tmp_path):
    """Six loose images, one of which is damaged, and four in a shard."""
    root = write_store(tmp_path / "store", 2)
    loose = sorted(root.rglob("*.jpg"))
    data = {f"{number}.jpg": path.read_bytes() for number, path in enumerate(loose[:4])}
    (root / "more.tar").write_bytes(tar_of(data))
    loose[5].write_bytes(b"\xff\xd8\xff")
    return root


def listed(config, root):
    return list_images(config, resolve(str(root.parent / "o"))).manifest


def test_named_images_are_found_where_they_lie(store):
    config = TrainConfig(images=str(store), bundle="b")
    manifest = listed(config, store)
    uri = dict(zip(manifest["key"].to_pylist(), manifest["uri"].to_pylist(), strict=True))
    images = sorted(store.rglob("*.jpg"))
    first = str(images[0].relative_to(store))
    found = pixels_of_named(
        config, FROZEN, manifest, [(uri["more.tar"], "3.jpg"), (uri["more.tar"], "1.jpg"), (uri[first], first)]
    )
    wanted = [decode(images[number].read_bytes(), (32, 32)).array for number in (0, 1, 3)]
    assert np.array_equal(found, np.stack(wanted)), "loose ones first, then in the order of the shard"


def test_any_images_will_do(store):
    config = ExtractConfig(images=str(store), output="o")
    manifest = listed(config, store)
    assert pixels_of_any(config, FROZEN, manifest, 100).shape == (5, 32, 32, 3), "one of six cannot be decoded"
    assert np.array_equal(pixels_of_any(config, FROZEN, manifest, 3), pixels_of_any(config, FROZEN, manifest, 3))
    shards = manifest.filter([key.endswith(".tar") for key in manifest["key"].to_pylist()])
    assert len(pixels_of_any(config, FROZEN, shards, 3)) == 3
    with pytest.raises(LabelsError, match=r"quantize: no image of .* can be read"):
        pixels_of_named(TrainConfig(images=str(store), bundle="b"), FROZEN, manifest, [])
