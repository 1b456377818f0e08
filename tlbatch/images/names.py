"""An object's name -> what it is: an image, a shard of some format, or something that is skipped."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.schema import IMAGE, PARQUET, TAR, TFRECORD

#: Suffixes of pictures. A picture in a format that cannot be decoded gets a row of kind `unsupported`, so none disappears.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".ico", ".exr", ".psd", ".svg"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),  # cameras' raw files
    )
)
_SHARD_ENDINGS = {
    TAR: (".tar", ".tar.gz", ".tgz"),
    PARQUET: (".parquet",),
    TFRECORD: (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz"),
}


def suffix(key: str) -> str:
    """The lower-case suffix of a key's last part, with its dot; empty if there is none."""
    name = key.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def formats(keys: pa.Array) -> pa.Array:
    """The format of each key's object by its suffix: image, or a kind of shard; null if the suffix is unknown."""
    found = pa.nulls(len(keys), pa.string())
    for kind, endings in {IMAGE: tuple(IMAGE_SUFFIXES), **_SHARD_ENDINGS}.items():
        pattern = "(" + "|".join(re.escape(ending) for ending in sorted(endings)) + ")$"
        found = pc.if_else(pc.match_substring_regex(keys, pattern, ignore_case=True), kind, found)
    return found
