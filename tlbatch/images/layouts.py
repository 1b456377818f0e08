"""Names of objects -> data sets in layouts that tlbatch does not read, each with a sentence about what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc


class Layout(NamedTuple):
    """A layout of other software.

    Attributes:
        name: what it is called; its objects are counted under this name.
        pattern: matches keys that only this layout has.
        advice: how its images become readable.
        common: whether such files often lie beside images and mean nothing there; then they are named only without images.
    """

    name: str
    pattern: str
    advice: str
    common: bool = False


_TABLE = (
    "its Parquet files are read as they lie there, with rows that the table may have deleted or replaced; to be exact, give a "
    "list of the current files (a CSV with a column uri)"
)

LAYOUTS = (
    Layout("Delta table", r"(^|/)_delta_log/", _TABLE),
    Layout("Iceberg table", r"(^|/)metadata/([^/]*\.metadata\.json|snap-[^/]*\.avro)$", _TABLE),
    Layout("Hudi table", r"(^|/)\.hoodie(/|$)", _TABLE),
    Layout("Lance data set", r"\.lance(/|$)", "write its images to Parquet (lance.dataset(URL).to_batches())"),
    Layout("MDS data set (MosaicML Streaming)", r"\.mds(\.[a-z0-9]+)?$", "write its samples to tar or Parquet shards"),
    Layout("LitData data set", r"(^|/)chunk-\d+-\d+(\.[a-z0-9]+)?\.bin$", "write its samples to tar or Parquet shards"),
    Layout("Arrow data set (Hugging Face save_to_disk)", r"-\d{5}-of-\d{5}\.arrow$", "write it with to_parquet()"),
    Layout(
        "ArrayRecord or Riegeli files",
        r"\.(array_?record|riegeli)(-\d{5,}-of-\d{5,})?$",
        "write the data set as TFRecord (TFDS: `file_format='tfrecord'`)",
    ),
    Layout("RecordIO files (MXNet)", r"\.rec$", "write their images to tar shards", common=True),
    Layout("FFCV files", r"\.beton$", "give the images from which they were made"),
    Layout("LMDB", r"(^|/)data\.mdb$", "write its images to tar shards", common=True),
    Layout("HDF5 files", r"\.(h5|hdf5)$", "write their images to files or tar shards", common=True),
    Layout("NumPy arrays", r"\.(npy|npz)$", "write their images to files or tar shards", common=True),
    Layout("Zarr store", r"\.zarr/|(^|/)(\.zgroup|\.zarray|zarr\.json)$", "write its images to files or tar shards"),
)


def layout_kinds(keys: pa.Array) -> pa.Array:
    """The name of the layout that each key belongs to; null if it belongs to none."""
    found = pa.nulls(len(keys), pa.string())
    for one in LAYOUTS:
        matches = pc.match_substring_regex(keys, one.pattern, ignore_case=True)
        if pc.any(matches).as_py():
            found = pc.coalesce(found, pc.if_else(matches, one.name, pa.scalar(None, pa.string())))
    return found


def sentences(kinds: set[str], *, alone: bool) -> Iterator[str]:
    """A sentence about each layout whose name is among `kinds`; `alone` if the store has no images."""
    for one in LAYOUTS:
        if one.name in kinds and (alone or not one.common):
            yield f"Found in the store: {one.name}. tlbatch does not read this layout; {one.advice}."
