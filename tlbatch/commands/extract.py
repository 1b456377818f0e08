"""A store and a base -> the features of its images. The base is that of a bundle, or a named base that is frozen first."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tlbatch import schema
from tlbatch.commands.classify import classify
from tlbatch.commands.list_images import list_images, store_of
from tlbatch.commands.sample_pixels import pixels_of_any, pixels_of_loose
from tlbatch.config import ExtractConfig, RunConfig, TrainConfig
from tlbatch.errors import OutputError, WeightsError
from tlbatch.model import bundle as bundles
from tlbatch.model.bases import Base, find_base
from tlbatch.model.depths import FeaturesOf
from tlbatch.model.frozen import Frozen, freeze, quantized_base, save_bundle
from tlbatch.model.quantize import MOST_IMAGES, require_nncf
from tlbatch.output.documents import ReportDocument
from tlbatch.output.lease import require_free
from tlbatch.output.progress import Watcher
from tlbatch.output.run import read_output, require_output
from tlbatch.schema import IMAGE, NEW_RULES
from tlbatch.storage.resolve import resolve


def extract(config: ExtractConfig, watch: Watcher | None = None) -> ReportDocument:
    """Write the features of every image of a store, from a bundle's base or from a named base.

    A named base is saved as a bundle without a head in the folder `base` of the output, where all workers can read it and the
    next command finds it.

    Args:
        config: the store, the base, the output and the resources.
        watch: called every few seconds with the counts.

    Returns:
        The run's report, as `classify` returns it.

    Raises:
        OutputError: the output belongs to another base.
        WeightsError: the weights cannot be used.
    """
    settings = {name: getattr(config, name) for name in RunConfig.model_fields}
    if config.bundle:
        return classify(RunConfig(**settings), watch)
    output = resolve(config.output, config.storage_options)
    require_output(read_output(output), store_of(config).url)
    require_free(output)
    location = output.join(schema.BASE)
    base = find_base(config.base)
    size = config.size or base.size
    listing = None
    if not location.join(bundles.BUNDLE).exists():
        if config.quantize != "none":
            require_nncf()
        weights = read_weights(config)
        listing = list_images(config, output, watch)
        frozen = freeze_named(config, weights)
        if config.quantize != "none":
            frozen = quantized_base(frozen, pixels_of_any(config, frozen, listing.manifest, MOST_IMAGES))
        save_bundle(location, frozen, None, probe_pixels(config, frozen, listing.manifest))
    _require_same_base(bundles.load_bundle(location.url, config.storage_options), base, size, config)
    return classify(RunConfig(**{**settings, "bundle": location.url}), watch, listing)


def freeze_named(config: TrainConfig | ExtractConfig, weights: str | bytes, like: bundles.Bundle | None = None) -> Frozen:
    """Freeze the base that a configuration names.

    Args:
        config: the base, its size and the source of its weights.
        weights: the result of `read_weights`.
        like: the bundle whose pixel rules and depths are taken where the configuration is silent.
    """
    base = find_base(config.base)
    rules, features_of = NEW_RULES._replace(white_level=config.white_level), config.features_of
    if like is not None:
        level = config.white_level if "white_level" in config.model_fields_set else like.pixel_rules.white_level
        rules, features_of = like.pixel_rules._replace(white_level=level), _wanted_depths(config, like)
    return freeze(base, config.size or base.size, rules, without_query(config.weights), weights, features_of)


def _features_of(bundle: bundles.Bundle) -> FeaturesOf:
    return "depths" if bundle.depths else "last"


def _wanted_depths(config: TrainConfig | ExtractConfig, like: bundles.Bundle) -> FeaturesOf:
    """What the configuration says, or else what the bundle has: features that exist go on as they are."""
    return config.features_of if "features_of" in config.model_fields_set else _features_of(like)


def without_query(weights: str) -> str:
    """The source of weights as the bundle records it: without the query of a URL, which may be a signature."""
    return weights.split("?", maxsplit=1)[0] if "://" in weights else weights


def _require_same_base(bundle: bundles.Bundle, base: Base, size: int, config: ExtractConfig) -> None:
    facts = bundle.facts["base"]
    numbers = "int8" if bundle.quantized else "none"
    old = (facts["name"], bundle.size[0], facts["weights"], bundle.pixel_rules.white_level, _features_of(bundle), numbers)
    wanted = config.white_level, _wanted_depths(config, bundle), config.quantize
    new = (base.name, size, without_query(config.weights), *wanted)
    if old != new:
        form = "{} at {} pixels, weights {}, white_level {}, features_of {}, quantize {}"
        raise OutputError(
            f"The output belongs to another base: it was begun with {form.format(*old)}; this command has {form.format(*new)}. "
            "Choose another --output."
        )


def read_weights(config: TrainConfig | ExtractConfig) -> str | bytes:
    """Read the weights of a base.

    Returns:
        `imagenet` or `random`, or the bytes of a weights file, as `build_network` takes them.

    Raises:
        WeightsError: the file does not exist, may not be read, or has another suffix.
    """
    if config.weights in ("imagenet", "random"):
        return config.weights
    if not config.weights.endswith((".h5", ".keras")):
        raise WeightsError(f"weights: write imagenet, random, or a .h5, .weights.h5 or .keras file; found {config.weights!r}.")
    location = resolve(config.weights, config.storage_options)
    try:
        return location.read()
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"weights: there is no file {location.url}.") from None
    except PermissionError as error:
        raise WeightsError(f"weights: no permission to read {location.url}: {error}.") from None


def probe_pixels(config: TrainConfig | ExtractConfig, frozen: Frozen, manifest: pa.Table) -> np.ndarray:
    """Pixels for the bundle's self-test: up to 16 images of the store that can be read, and two images of noise."""
    manifest = manifest.filter(pa.compute.equal(manifest["format"], IMAGE))
    rows = np.unique(np.linspace(0, manifest.num_rows - 1, min(16, manifest.num_rows)).astype(int))
    noise = np.random.default_rng(0).integers(0, 256, (2, *frozen.size, 3), np.uint8).astype(frozen.rules.dtype)
    return np.stack([*pixels_of_loose(config, frozen, manifest.take(rows)), *noise])
