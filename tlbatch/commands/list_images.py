"""The store of a configuration -> its listing, with progress; a command lists it once, or again if the table changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.config import RunConfig, TrainConfig
from tlbatch.errors import ConfigError, InterruptedRunError
from tlbatch.images.inventory import Inventory, find_inventory
from tlbatch.images.listing import Listing, Selection, list_store
from tlbatch.output.commit import RunInput
from tlbatch.output.progress import Watcher
from tlbatch.output.run import OutputState, Pointer
from tlbatch.schema import ARCHIVED, IMAGE
from tlbatch.storage.location import Location
from tlbatch.storage.resolve import resolve
from tlbatch.storage.room import require_room_to_list

_PROGRESS_SECONDS = 0.5


def store_of(config: RunConfig | TrainConfig) -> Location | Inventory:
    """The store of a configuration, or the inventory of it that is at the address of `images`.

    The address of an inventory is another one every day. The store is the bucket, whether it is listed or not.

    Raises:
        StoreError: the inventory cannot be used.
    """
    location = resolve(config.images, config.storage_options)
    inventory = None
    if not config.images.endswith("/"):
        inventory = find_inventory(location, partial(resolve, options=config.storage_options))
    return inventory or location


def list_images(
    config: RunConfig | TrainConfig,
    avoid: Location,
    watch: Watcher | None = None,
    stop: threading.Event | None = None,
    bounds: Sequence[str] = (),
) -> Listing:
    """List the store of a configuration.

    Args:
        config: its `images`, `include`, `exclude`, `format` and `max_images`.
        avoid: the folder that is written to, which is not listed even if it is inside the store.
        watch: called now and then with the number of objects.
        stop: ends a listing in another thread when it is set.
        bounds: some keys of the store, sorted, between which a bucket is listed concurrently.
    """
    store = store_of(config)
    selection = Selection(config.include, config.exclude, config.format, config.image_field)
    progress = _ListingProgress(watch, stop or threading.Event())
    locate = partial(resolve, options=config.storage_options)
    listing = list_store(
        store,
        selection,
        avoid=avoid,
        max_images=config.max_images,
        progress=progress,
        locate=locate,
        folder=config.images.endswith("/"),
        bounds=bounds,
    )
    _require_use(config, listing)
    return listing


def run_input(listing: Listing) -> RunInput:
    """The whole of a store as the input of a run."""
    return RunInput(
        listing.manifest,
        listing.skipped,
        listing.seconds,
        skipped_by_kind=listing.skipped_by_kind,
        unreadable=listing.unreadable,
        away=listing.away,
        check=listing.check,
        inventory=listing.check.inventory.facts if listing.check else {},
    )


def _require_use(config: RunConfig | TrainConfig, listing: Listing) -> None:
    """Raise ConfigError if a setting would do nothing for this store."""
    if config.image_field is None:
        return
    if not set(pc.unique(listing.manifest["format"]).to_pylist()) - {IMAGE, ARCHIVED}:
        raise ConfigError(
            f"image_field: {config.images} has no shards, only loose images, so this setting does nothing; remove it."
        )


class ListedStore:
    """The store of one command: listed when it is first asked for, and again if another run was published since then.

    An older listing would remove from the table what the other run has added.

    Args:
        config: which store.
        states: the outputs of the command, read before anything is listed.
        avoid: the folder that is written to.
        watch: called now and then with the number of objects.
        listing: the images, if the caller has chosen them.
    """

    def __init__(
        self,
        config: RunConfig,
        states: Sequence[OutputState],
        avoid: Location,
        watch: Watcher | None,
        listing: Listing | None = None,
    ) -> None:
        self._config, self._avoid, self._watch = config, avoid, watch
        self._listing = listing
        self._pointers: dict[str, Pointer] = {state.output.url: state.pointer for state in states}
        self._stop = threading.Event()

    def listing(self, state: OutputState) -> Listing:
        """A listing that is not older than what `state` has published."""
        if self._listing is None or self._pointers[state.output.url] != state.pointer:
            require_room_to_list(max((run.facts["objects"] for run in state.table), default=0))
            self._listing = list_images(self._config, self._avoid, self._watch, self._stop, state.bounds)
            self._pointers[state.output.url] = state.pointer
        return self._listing

    @property
    def manifest(self) -> pa.Table | None:
        """The objects of the store; None if it was not listed."""
        return self._listing.manifest if self._listing is not None else None

    @property
    def seconds(self) -> float:
        """How long the listing took; 0 if there was none."""
        return self._listing.seconds if self._listing is not None else 0.0

    def stop(self) -> None:
        """End a listing that runs in another thread."""
        self._stop.set()


class _ListingProgress:
    """Reports the progress of a long listing, and ends it when it is stopped."""

    def __init__(self, watch: Watcher | None, stop: threading.Event) -> None:
        self._watch = watch
        self._stop = stop
        self._began = self._reported = time.monotonic()

    def __call__(self, objects: int) -> None:
        if self._stop.is_set():
            raise InterruptedRunError("The listing was stopped.")
        now = time.monotonic()
        if self._watch is not None and now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self._watch({"stage": "list", "objects": objects, "seconds": now - self._began})
