"""Rows of a table -> JPEGs of their images, read as the run read them. Small ones are kept in a bounded folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from tlbatch import schema
from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.decode import thumbnail, upright_jpeg
from tlbatch.images.reader import Patience, Reader
from tlbatch.output.run import Run
from tlbatch.output.table import manifest_groups
from tlbatch.schema import PixelRules

#: Pixels of the longer side of a small picture and, at most, of a whole one.
SMALL, WHOLE = 256, 2_048
#: A person waits for a picture: seconds for which a read is retried.
_PATIENCE = Patience(deadline=5.0)
#: Requests to the store at once, and shards of which rows are remembered that a page shows.
_REQUESTS, _SHARDS = 16, 64
#: Bytes of small pictures on this machine's disk, and pictures after which the folder is measured again.
_MOST_BYTES, _MEASURED_EVERY = 512 << 20, 500

#: A row of `predictions` with the columns of `catalog.SHOWN` and `run_id`.
Row = Mapping[str, Any]


class Pictures:
    """Pictures of the rows of some runs; safe to use from many threads.

    Args:
        runs: the runs that the rows are of.
        options: fsspec's options for the store.
        cache: the folder of small pictures.
    """

    def __init__(self, runs: Sequence[Run], options: Mapping[str, Any], cache: PictureCache) -> None:
        self._stores = {run.run_id: _Store(run, options) for run in runs}
        self._cache = cache
        self._expected: OrderedDict[str, dict[str, Row]] = OrderedDict()
        self._lock = threading.Lock()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def in_shards(self) -> bool:
        """Whether some of the images are in shards."""
        return any(store.has_shards() for store in self._stores.values())

    def expect(self, rows: Sequence[Row]) -> None:
        """Tell of rows that a page shows: where one of them is read from a shard, the others of this shard are read, too."""
        in_shards = [row for row in rows if self._stores[row["run_id"]].shard(row) is not None]
        with self._lock:
            for row in in_shards:
                self._expected.setdefault(row["uri"], {})[_name(row)] = row
                self._expected.move_to_end(row["uri"])
            while len(self._expected) > _SHARDS:
                self._expected.popitem(last=False)

    def small(self, row: Row) -> bytes | Failure:
        """A small JPEG; a Failure if the image cannot be read, has changed, or cannot be decoded."""
        name = _name(row)
        found = self._cache.get(name)
        if found is not None:
            return found
        store = self._stores[row["run_id"]]
        shard = store.shard(row)
        if shard is None:
            return self._keep(name, store.small(store.loose(row)))
        with self._lock:
            own = self._locks[row["uri"]]
        with own:
            found = self._cache.get(name)
            if found is not None:
                return found
            with self._lock:
                wanted = {**self._expected.pop(row["uri"], {}), name: row}
            made = {other: self._keep(other, store.small(data)) for other, data in store.members(shard, wanted).items()}
        return made[name]

    def whole(self, row: Row) -> bytes | Failure:
        """A JPEG of the upright image as large as it is, but not larger than `WHOLE`."""
        store, name = self._stores[row["run_id"]], _name(row)
        shard = store.shard(row)
        return store.whole(store.loose(row) if shard is None else store.members(shard, {name: row})[name], row)

    def _keep(self, name: str, picture: bytes | Failure) -> bytes | Failure:
        if isinstance(picture, bytes):
            self._cache.put(name, picture)
        return picture


class _Store:
    """How the images of one run are read and decoded."""

    def __init__(self, run: Run, options: Mapping[str, Any]) -> None:
        spec = run.facts["spec"]
        field, exclude = spec.get("image_field"), spec.get("exclude", ())
        self._run = run
        self._rules = PixelRules(**run.facts.get("pixel_rules", {}))
        self._reader = Reader(options, requests=_REQUESTS, image_field=field, exclude=exclude, patience=_PATIENCE)
        self._lock = threading.Lock()
        self._shards: dict[str, Mapping[str, Any]] | None = None

    def shard(self, row: Row) -> Mapping[str, Any] | None:
        """The manifest's row of the shard that an image is in; None for a loose image."""
        return self._known_shards().get(row["uri"])

    def has_shards(self) -> bool:
        """Whether the run has shards."""
        return bool(self._known_shards())

    def _known_shards(self) -> Mapping[str, Mapping[str, Any]]:
        with self._lock:
            if self._shards is None:
                pieces = manifest_groups(self._run, pc.field("format") != schema.IMAGE)
                self._shards = {one["uri"]: one for piece in pieces for one in piece.to_pylist()}
            return self._shards

    def loose(self, row: Row) -> bytes | Failure:
        """The bytes of a loose image, in the version that was classified."""
        return self._reader.image({"uri": row["uri"], "size": None, "etag": row["etag"]})

    def members(self, shard: Mapping[str, Any], wanted: Mapping[str, Row]) -> dict[str, bytes | Failure]:
        """The bytes of some images of a shard, by name. It is read from its beginning, up to the last of them."""
        missing = {(one["key"], one[schema.INDEX]): name for name, one in wanted.items()}
        found: dict[str, bytes | Failure] = {}
        for member in self._reader.members(shard):
            place = next((at for at in ((member.key, member.index), (member.key, None)) if at in missing), None)
            if place is not None:
                found[missing.pop(place)] = member.data
            if not missing:
                break
        gone = Failure("read", ErrorKind.NOT_FOUND, "the shard does not have this image any more")
        return found | dict.fromkeys(missing.values(), gone)

    def small(self, data: bytes | Failure) -> bytes | Failure:
        """A small JPEG of an encoded image."""
        return data if isinstance(data, Failure) else thumbnail(data, side=SMALL, rules=self._rules)

    def whole(self, data: bytes | Failure, row: Row) -> bytes | Failure:
        """A large JPEG of an encoded image."""
        if isinstance(data, Failure):
            return data
        width, height = row["width"] or 0, row["height"] or 0
        if not (width and height):
            return thumbnail(data, side=WHOLE // 2, rules=self._rules)
        scale = min(1.0, WHOLE / max(width, height))
        return upright_jpeg(data, (max(1, round(height * scale)), max(1, round(width * scale))), rules=self._rules)


def _name(row: Row) -> str:
    """What names the version of an image, as a file name."""
    named = "\0".join(str(row[name]) for name in ("uri", "key", "etag", schema.INDEX))
    return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()


class PictureCache:
    """A folder of small pictures that only its user can read; the oldest are removed where it grows above its limit.

    Args:
        folder: is made if it does not exist.
        most: bytes that all pictures may have.
    """

    def __init__(self, folder: Path, most: int = _MOST_BYTES) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._most = folder, most
        self._put = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """A picture; None if it is not there."""
        path = self._folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep a picture, if the disk takes it."""
        temporary = self._folder / f".{name}.{threading.get_ident()}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
        with self._lock:
            self._put += 1
            if self._put % _MEASURED_EVERY == 1:
                with contextlib.suppress(OSError):  # another process trims it, too
                    self._trim()

    def _trim(self) -> None:
        """Remove the pictures that were not looked at for longest, until a tenth of the room is free."""
        found = sorted((one.stat().st_mtime, one.stat().st_size, one.path) for one in os.scandir(self._folder))
        over = sum(size for _, size, _ in found) - self._most
        if over <= 0:
            return
        for _, size, path in found:
            Path(path).unlink(missing_ok=True)
            over -= size
            if over <= -self._most // 10:
                return
