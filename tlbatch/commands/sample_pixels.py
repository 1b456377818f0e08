"""A listing, and names of images or none -> pixels of some images: probes, and the ranges of a base in int8."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.config import ExtractConfig, TrainConfig
from tlbatch.errors import LabelsError
from tlbatch.images.decode import Pixels, decode
from tlbatch.images.labels import ImageName
from tlbatch.images.reader import Reader
from tlbatch.model.frozen import Frozen
from tlbatch.schema import is_loose

#: Images that are read at the same time, and shards from which images are taken where any image will do.
_THREADS, _SHARDS = 16, 16


def draw_by_class(classes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Up to `most` of n images: each class has its share, or with several labels an image each set of labels.

    Args:
        classes: (n,) class numbers, or (n, C) with 1 where an image has a label.
        most: how many are drawn.
        seed: of the draw.
    """
    strata = np.unique(classes, axis=0, return_inverse=True)[1].reshape(-1)
    random = np.random.default_rng(seed)
    places = np.empty(len(strata))
    for one in np.unique(strata):
        members = random.permutation(np.flatnonzero(strata == one))
        places[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.sort(np.argsort(places, kind="stable")[:most])


def pixels_of_named(config: TrainConfig, frozen: Frozen, manifest: pa.Table, names: Collection[ImageName]) -> np.ndarray:
    """Pixels (n, height, width, 3) of the named images, in the order of the manifest; of shards all members are read.

    Raises:
        LabelsError: none of them can be read again.
    """
    keys: dict[str, set[str]] = {}
    for uri, key in names:
        keys.setdefault(uri, set()).add(key)
    wanted = manifest.filter(pc.is_in(manifest["uri"], pa.array(keys, pa.string())))
    found = [*pixels_of_loose(config, frozen, wanted)]
    for row in wanted.filter(pc.invert(is_loose(wanted))).to_pylist():
        missing = set(keys[row["uri"]])
        found += [pixels for key, pixels in _members(config, frozen, row, missing)]
    return _stacked(found, config)


def pixels_of_any(config: ExtractConfig, frozen: Frozen, manifest: pa.Table, most: int) -> np.ndarray:
    """Pixels (n, height, width, 3) of up to `most` images of a store: loose ones, or the first ones of some shards.

    Raises:
        LabelsError: none can be read.
    """
    random, loose = np.random.default_rng(0), manifest.filter(is_loose(manifest))
    if loose.num_rows:
        return _stacked([*pixels_of_loose(config, frozen, loose.take(_draw(random, loose.num_rows, most)))], config)
    found, rows = [], manifest.take(_draw(random, manifest.num_rows, _SHARDS)).to_pylist()
    for row in rows:
        members = _members(config, frozen, row, None)
        found += [pixels for (_, pixels), _ in zip(members, range(most // len(rows)), strict=False)]
    return _stacked(found, config)


def _draw(random: np.random.Generator, count: int, most: int) -> np.ndarray:
    return np.sort(random.permutation(count)[:most])


def pixels_of_loose(config: TrainConfig | ExtractConfig, frozen: Frozen, manifest: pa.Table) -> Iterator[np.ndarray]:
    """Pixels (height, width, 3) of those loose images of a manifest that can be read, in its order."""
    reader, rows = _reader(config), manifest.filter(is_loose(manifest)).to_pylist()

    def read(row: Mapping[str, Any]) -> np.ndarray | None:
        return _decoded(config, frozen, reader.image(row))

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from (pixels for pixels in pool.map(read, rows) if pixels is not None)


def _members(
    config: TrainConfig | ExtractConfig, frozen: Frozen, row: Mapping[str, Any], wanted: set[str] | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The wanted images of a shard that can be decoded, or all of them; of equal keys the first."""
    for member in _reader(config).members(row):
        if wanted is not None and member.key not in wanted:
            continue
        pixels = _decoded(config, frozen, member.data)
        if pixels is not None:
            yield member.key, pixels
        if wanted is not None:
            wanted.remove(member.key)
            if not wanted:
                return


def _reader(config: TrainConfig | ExtractConfig) -> Reader:
    field, exclude = config.image_field, config.exclude
    return Reader(config.storage_options, requests=_THREADS, image_field=field, exclude=exclude, max_bytes=config.max_bytes)


def _decoded(config: TrainConfig | ExtractConfig, frozen: Frozen, data: object) -> np.ndarray | None:
    if not isinstance(data, bytes):
        return None
    found = decode(data, frozen.size, rules=frozen.rules, max_pixels=config.max_pixels, max_side=config.max_side)
    return found.array if isinstance(found, Pixels) else None


def _stacked(found: list[np.ndarray], config: TrainConfig | ExtractConfig) -> np.ndarray:
    if not found:
        raise LabelsError(f"quantize: no image of {config.images} can be read, so int8 has no ranges.")
    return np.stack(found)
