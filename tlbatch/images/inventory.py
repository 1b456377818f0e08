"""An inventory that S3 writes of a bucket -> the objects of the bucket, as a listing gives them, without one LIST request.

Amazon documents the form: `manifest.json` names data files of CSV, ORC or Parquet in the inventory's own bucket. Each file is
copied to this machine, compared with its MD5 digest, and read in pieces.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from typing import IO, Any, NamedTuple, cast
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import orc

from tlbatch.errors import ChangedError, CredentialsError, RefusedError, StoreError, line_of
from tlbatch.storage.location import EVERYTHING, LISTED, Location, WalkRules, objects_below
from tlbatch.storage.remote import RemoteLocation
from tlbatch.storage.resolve import not_permitted
from tlbatch.storage.s3_listing import ARCHIVES
from tlbatch.storage.temporary_rows import digested_copy, mapped

log = logging.getLogger(__name__)

#: The location of an object by its uri.
Locate = Callable[[str], Location]

_NAME, _CHECKSUM = "manifest.json", "manifest.checksum"
#: What makes a JSON document an inventory's manifest.
_KEYS = {"sourceBucket", "fileFormat", "fileSchema", "files"}
#: Columns by the plain form of their names: CSV files call one `ETag`, the others `e_tag`. All but the first two are optional.
_COLUMNS = ("bucket", "key", "size", "etag", "storageclass", "islatest", "isdeletemarker")
#: Rows, and bytes of a file, that are in memory at a time.
_ROWS_AT_ONCE, _PIECE = 65_536, 8 << 20
#: Downloads of a data file: over plain HTTP a bit may flip.
_ATTEMPTS = 2
#: Objects that are asked for at the same time.
_ASKED_AT_ONCE = 32


class DataFile(NamedTuple):
    """A data file of an inventory: its key in the destination bucket, its size in bytes, and its MD5 digest in hex."""

    key: str
    size: int
    md5: str


@dataclass
class Inventory:
    """An inventory of a bucket, in whose place it is walked.

    Attributes:
        address: the address of its `manifest.json`.
        bucket: the bucket whose objects it has.
        destination: the bucket of its data files.
        created: when S3 began to make it.
        kind: the format of its data files.
        schema: their columns, which only CSV files do not have themselves.
        files: its data files.
        locate: gives the location of a uri.
        objects: how many objects the last walk has found so far.
    """

    address: str
    bucket: str
    destination: str
    created: datetime
    kind: str
    schema: str
    files: Sequence[DataFile]
    locate: Locate
    objects: int = 0

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return f"s3://{self.bucket}"

    @property
    def facts(self) -> dict[str, Any]:
        """What documents say of it."""
        created = self.created.strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"of": self.url, "manifest": self.address, "created": created, "objects": self.objects}

    def walk(self, rules: WalkRules = EVERYTHING) -> Iterator[pa.RecordBatch]:
        """Every object of the bucket as `LISTED`, in any order: the newest version of each, without delete markers.

        Args:
            rules: what is told of objects that are named like folders; no folder is skipped.

        Raises:
            StoreError: a data file is missing, damaged or of another form, or there is no such bucket.
        """
        self.objects = 0
        bucket = cast("RemoteLocation", self.locate(self.url))
        if not bucket.may_have_bucket():
            raise StoreError(f"The inventory {self.address} is of {self.url}, and there is no such bucket.")
        for file in self.files:
            with self._copy(file) as copy:
                try:
                    for columns in _READERS[self.kind](copy, self.schema):
                        found = _listed(columns)
                        self.objects += found.num_rows
                        yield objects_below(found, "", rules)
                except _MissingColumnError as error:
                    raise StoreError(f"The inventory {self.address} {error}.") from None
                except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError) as error:
                    raise StoreError(f"{self._named(file)} cannot be parsed as {self.kind}: {line_of(error)}.") from None

    def etags(self, keys: Sequence[str]) -> list[str | None]:
        """The versions that the store has now of some objects of the bucket, each asked for by itself.

        An object that the store says is gone has None, one of which it says nothing has an empty string.
        """
        bucket = cast("RemoteLocation", self.locate(self.url))

        def ask(key: str) -> str | None:
            try:
                return bucket.join(*key.split("/")).head_etag()
            except CredentialsError:
                raise
            except (PermissionError, RefusedError):  # the second one, for example, without the key of its encryption
                return ""

        with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="tlbatch-head") as pool:
            return list(pool.map(ask, keys))

    @contextmanager
    def _copy(self, file: DataFile) -> Iterator[IO[bytes]]:
        """A copy of a data file on this machine, while the block runs."""
        location, found = self.locate(f"s3://{self.destination}/{file.key}"), ""
        for _ in range(_ATTEMPTS):
            digest = hashlib.md5(usedforsecurity=False)
            try:
                copy = digested_copy(location, file.size, digest)
            except FileNotFoundError:
                raise StoreError(f"{self._named(file)} does not exist.") from None
            except PermissionError as error:
                raise StoreError(f"{self._named(file)} may not be read: {line_of(error)}.") from None
            except ChangedError:
                raise StoreError(f"{self._named(file)} is shorter than the inventory says; it is truncated.") from None
            with copy:
                found = digest.hexdigest()
                if found == file.md5:
                    copy.seek(0)
                    yield copy
                    return
        raise StoreError(f"{self._named(file)} is damaged or truncated: its MD5 is {found}, and not {file.md5}.")

    def _named(self, file: DataFile) -> str:
        return f"The data file s3://{self.destination}/{file.key} of the inventory {self.address}"


@dataclass(frozen=True)
class InventoryCheck:
    """Asks the store about single objects of a table, which may be newer than an inventory.

    Attributes:
        inventory: the inventory that was read.
        selects: for an array of keys, which of them are classified at all.
    """

    inventory: Inventory
    selects: Callable[[pa.Array], pa.Array]
    _told: list[bool] = field(default_factory=list)

    def gone(self, missing: pa.Table) -> pa.Table:
        """Of objects of the table that were not listed (uri and key), those that have left the store or the selection."""
        keys = missing["key"].combine_chunks()
        asked = self.selects(keys).to_numpy(zero_copy_only=False)
        found = self.inventory.etags(keys.filter(pa.array(asked)).to_pylist())
        if "" in found and not self._told:
            self._told.append(True)
            log.warning(
                "Some objects of the table are not in the inventory of %s, and the store refuses to say whether they exist: "
                "they stay in the table. Permit s3:ListBucket, so that it says so.",
                self.inventory.url,
            )
        left = np.ones(len(keys), bool)
        left[asked] = [etag is None for etag in found]
        return missing.filter(pa.array(left))

    def current(self, known: pa.Table) -> np.ndarray:
        """(n,) bool: of which objects (key and etag) the store now has exactly this version."""
        found = self.inventory.etags(known["key"].to_pylist())
        return np.array([bool(etag) and etag == now for etag, now in zip(known["etag"].to_pylist(), found, strict=True)], bool)


def find_inventory(location: Location, locate: Locate) -> Inventory | None:
    """The inventory whose manifest is at an address; None if something else is there, or nothing.

    Args:
        location: the address. The manifest may be a copy: the data files are read from the bucket that it names.
        locate: gives the location of a uri.

    Raises:
        StoreError: it is an inventory that cannot be used.
    """
    if location.url.rsplit("/", 1)[-1] != _NAME:
        return None
    try:
        data = location.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise not_permitted(location, error) from None
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(manifest, dict) and manifest.keys() >= _KEYS):
        return None
    _require_checksum(location, data, locate)
    return _of(location.url, manifest, locate)


def _require_checksum(location: Location, data: bytes, locate: Locate) -> None:
    """Raises StoreError if the manifest is not the one whose MD5 digest lies beside it."""
    try:
        wanted = locate(f"{location.url.rsplit('/', 1)[0]}/{_CHECKSUM}").read().decode(errors="replace").strip()
    except (FileNotFoundError, PermissionError):  # without ListBucket, Amazon refuses what does not exist
        return
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != wanted.lower():
        raise StoreError(f"The inventory {location.url} is damaged: its MD5 is {found}, and {_CHECKSUM} says {wanted[:40]!r}.")


def _of(address: str, manifest: Mapping[str, Any], locate: Locate) -> Inventory:
    try:
        files = [DataFile(str(one["key"]), int(one["size"]), str(one["MD5checksum"]).lower()) for one in manifest["files"]]
        inventory = Inventory(
            address,
            str(manifest["sourceBucket"]),
            str(manifest["destinationBucket"]).rsplit(":", 1)[-1],  # Amazon's own have arn:aws:s3:::bucket
            datetime.fromtimestamp(int(manifest["creationTimestamp"]) / 1000, UTC),
            str(manifest["fileFormat"]),
            str(manifest["fileSchema"]),
            files,
            locate,
        )
    except KeyError as error:
        raise StoreError(f"The inventory {address} lacks {error} in its manifest.") from None
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise StoreError(f"The inventory {address} has a manifest of an unknown form: {line_of(error)}.") from None
    if inventory.kind not in _READERS:
        known = ", ".join(_READERS)
        raise StoreError(f"The inventory {address} has files of the format {inventory.kind[:40]!r}; the formats are {known}.")
    if not files:
        raise StoreError(f"The inventory {address} has no files: {inventory.url} was empty, or it was not completed.")
    return inventory


class _MissingColumnError(Exception):
    """A column is missing without which objects have no name."""


def _columns_of(names: Sequence[str]) -> dict[str, str]:
    """The columns that are read: their names by the plain form."""
    found = {name.replace("_", "").lower(): name for name in names}
    missing = [plain.capitalize() for plain in _COLUMNS[:2] if plain not in found]
    if missing:
        raise _MissingColumnError(f"has no column {missing[0]}; its columns are {', '.join(names)}")
    return {plain: found[plain] for plain in _COLUMNS[1:] if plain in found}


#: Some rows of a data file: arrays by the plain form of their names.
_Rows = Mapping[str, pa.Array]


def _of_parquet(file: IO[bytes], _: str) -> Iterator[_Rows]:
    whole = pq.ParquetFile(mapped(file))
    columns = _columns_of(whole.schema_arrow.names)
    for batch in whole.iter_batches(_ROWS_AT_ONCE, columns=list(columns.values()), use_threads=False):
        yield {plain: batch[name] for plain, name in columns.items()}


def _of_orc(file: IO[bytes], _: str) -> Iterator[_Rows]:
    whole = orc.ORCFile(file)
    columns = _columns_of(whole.schema.names)
    for stripe in range(whole.nstripes):
        rows = whole.read_stripe(stripe, columns=list(columns.values()))
        for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
            batch = rows.slice(start, _ROWS_AT_ONCE)
            yield {plain: batch[name] for plain, name in columns.items()}


def _of_csv(file: IO[bytes], schema: str) -> Iterator[_Rows]:
    """Without a header. Keys are written as in a URL, so that a line is a row."""
    names = [name.strip() for name in schema.split(",")]
    columns = _columns_of(names)
    convert = pacsv.ConvertOptions(
        include_columns=list(columns.values()),
        column_types={name: pa.int64() if plain == "size" else pa.string() for plain, name in columns.items()},
        null_values=[""],
        strings_can_be_null=True,
    )
    for block in _lines(cast("IO[bytes]", gzip.GzipFile(fileobj=file))):
        read = pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1)
        rows = pacsv.read_csv(pa.BufferReader(block), read, convert_options=convert).combine_chunks()
        for batch in rows.to_batches():
            found = {plain: batch[name] for plain, name in columns.items()}
            yield {**found, "key": _decoded(found["key"])}


_READERS: Mapping[str, Callable[[IO[bytes], str], Iterator[_Rows]]] = {"CSV": _of_csv, "ORC": _of_orc, "Parquet": _of_parquet}


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """A file in blocks of whole lines."""
    rest = b""
    while piece := file.read(_PIECE):
        lines, newline, after = piece.rpartition(b"\n")
        if newline:
            yield rest + lines + newline
            rest = after
        else:
            rest += piece
    if rest:
        yield rest


def _decoded(keys: pa.Array) -> pa.Array:
    """Keys that are written as in a URL, a space as a plus sign."""
    plain = pc.replace_substring(pc.replace_substring(keys, "+", " "), "%2F", "/")
    escaped = pc.match_substring(plain, "%")
    rest = [unquote(key, errors="strict") for key in plain.filter(escaped).to_pylist()]
    return pc.replace_with_mask(plain, escaped, pa.array(rest, pa.string())) if rest else plain


def _listed(rows: _Rows) -> pa.RecordBatch:
    """Rows of a data file as `LISTED`, without older versions and delete markers. What the inventory lacks is null."""
    count = len(rows["key"])
    size, etag = (rows.get(name, pa.nulls(count)) for name in ("size", "etag"))
    classes = rows.get("storageclass", pa.nulls(count)).cast(pa.string())
    found = [
        rows["key"].cast(pa.string()),
        size.cast(pa.int64()),
        pc.replace_substring(etag.cast(pa.string()), '"', ""),
        pc.is_in(classes, pa.array(sorted(ARCHIVES))),
    ]
    batch = pa.RecordBatch.from_arrays(found, schema=LISTED)
    flags = [
        pc.fill_null(pc.equal(pc.utf8_lower(rows[name].cast(pa.string())), wanted), True)
        for name, wanted in (("islatest", "true"), ("isdeletemarker", "false"))
        if name in rows
    ]
    return batch.filter(reduce(pc.and_, flags)) if flags else batch
