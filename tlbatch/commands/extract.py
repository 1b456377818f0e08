"""A store and a base -> the features of its images: of a bundle's base, or of one that is named and frozen first."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.commands.classify import classify
from tlbatch.commands.list_images import list_images
from tlbatch.config import ExtractConfig, RunConfig, TrainConfig
from tlbatch.errors import OutputError, WeightsError
from tlbatch.images import decode
from tlbatch.images.decode import Pixels
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import Base, find_base
from tlbatch.model.bundle import Frozen, freeze, save_bundle
from tlbatch.output.documents import ReportDocument
from tlbatch.output.lease import require_free
from tlbatch.output.progress import Watcher
from tlbatch.output.run import read_output, require_output
from tlbatch.schema import IMAGE
from tlbatch.storage.resolve import resolve


def extract(config: ExtractConfig, watch: Watcher | None = None) -> ReportDocument:
    """Write the features of every image of a store, of a bundle's base or of a base that is named.

    A named base is saved as a bundle without a head in the output's folder `base`, where all workers reach it and a second
    command finds it.

    Returns:
        The run's report, as `pipeline.run` gives it.
    """
    settings = {name: getattr(config, name) for name in RunConfig.model_fields}
    if config.bundle:
        return classify(RunConfig(**settings), watch)
    output = resolve(config.output, config.storage_options)
    require_output(read_output(output), resolve(config.images).url)
    require_free(output)
    location = output.join(schema.BASE)
    base = find_base(config.base)
    size = config.size or base.size
    listing = None
    if not location.join(bundles.BUNDLE).exists():
        reading = read_weights(config)
        listing = list_images(config, output, watch)
        frozen = freeze_named(config, reading)
        save_bundle(location, frozen, None, probe_pixels(config, size, listing.manifest))
    _require_same_base(bundles.load_bundle(location.url, config.storage_options), base, size, _told(config.weights))
    return classify(RunConfig(**{**settings, "bundle": location.url}), watch, listing)


def freeze_named(config: TrainConfig | ExtractConfig, weights: str | bytes) -> Frozen:
    """The base that a configuration names, with weights that `read_weights` gave."""
    base = find_base(config.base)
    return freeze(base, config.size or base.size, _told(config.weights), weights)


def _told(weights: str) -> str:
    """Where weights came from as the bundle tells it: without the query of a URL, which may be a signature."""
    return weights.split("?", maxsplit=1)[0] if "://" in weights else weights


def _require_same_base(bundle: bundles.Bundle, base: Base, size: int, weights: str) -> None:
    facts = bundle.facts["base"]
    was, asked = (facts["name"], bundle.size[0], facts["weights"]), (base.name, size, weights)
    if was != asked:
        raise OutputError(
            f"The output belongs to another base: it was begun with {was[0]} at {was[1]} pixels, weights {was[2]}, and "
            f"{asked[0]} at {asked[1]} pixels, weights {asked[2]}, is asked for; choose another --output."
        )


def read_weights(config: TrainConfig | ExtractConfig) -> str | bytes:
    """What `build_network` takes as weights: a word, or the bytes of a file.

    Raises:
        WeightsError: there is no such file, or it is of another kind.
    """
    if config.weights in ("imagenet", "random"):
        return config.weights
    if not config.weights.endswith((".h5", ".keras")):
        raise WeightsError(f"weights: {config.weights!r} is neither imagenet nor random nor a .h5, .weights.h5 or .keras file.")
    location = resolve(config.weights, config.storage_options)
    try:
        return location.read()
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"weights: there is no file {location.url}.") from None
    except PermissionError as error:
        raise WeightsError(f"weights: {location.url} may not be read: {error}.") from None


def probe_pixels(config: TrainConfig | ExtractConfig, size: int, manifest: pa.Table) -> np.ndarray:
    """A few labelled images as pixels, for the bundle's self-test; noise stands in where none of them can be read."""
    chosen: list[np.ndarray] = []
    manifest = manifest.filter(pa.compute.equal(manifest["format"], IMAGE))
    places = np.unique(np.linspace(0, manifest.num_rows - 1, min(16, manifest.num_rows)).astype(int))
    for row in manifest.take(places).to_pylist():
        with contextlib.suppress(OSError):
            data = resolve(row["uri"], config.storage_options).read()
            pixels = decode.decode(data, (size, size), max_pixels=config.max_pixels, max_side=config.max_side)
            if isinstance(pixels, Pixels):
                chosen.append(pixels.array)
    noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    return np.stack([*chosen, *noise])
