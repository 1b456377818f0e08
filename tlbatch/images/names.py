"""An object's name -> what it is: an image, a shard of some format, or something that is skipped."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from tlbatch.schema import IMAGE, PARQUET, TAR, TFRECORD, ZIP

#: Suffixes of pictures. A picture in a format that cannot be decoded gets a row of kind `unsupported`, so none disappears.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".ico", ".exr", ".psd", ".svg"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),  # cameras' raw files
    )
)
#: Number of a shard, which TFDS, Beam and the ImageNet scripts append to the name: `train.tfrecord-00000-of-00005`.
_NUMBER = r"-\d{5,}-of-\d{5,}"
#: Regular expressions of the ends of shards' names. ArrayRecord and Riegeli, which TFDS writes in the place of TFRecord, are
#: among them so that each file has a row that says what it is (`images/tfrecord.py`).
_SHARD_ENDINGS = {
    TAR: r"\.(tar|tar\.gz|tgz)$",
    PARQUET: r"\.parquet$",
    TFRECORD: (
        rf"(\.(tfrecords?|tfrec)({_NUMBER})?(\.gz)?|tf_?records?(\.gz)?{_NUMBER}(\.gz)?|\.record{_NUMBER}"
        rf"|\.(array_record|riegeli)({_NUMBER})?|(^|/)[^./]+{_NUMBER})$"
    ),
    ZIP: r"\.zip$",
}
_LITTER = re.compile(r"(^|/)(__MACOSX|\.ipynb_checkpoints|@eaDir|#recycle|\$RECYCLE\.BIN)/|(^|/)\._[^/]*$")


def suffix(key: str) -> str:
    """The lower-case suffix of a key's last part, with its dot; empty if there is none."""
    name = key.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def formats(keys: pa.Array) -> pa.Array:
    """The format of each key's object by its suffix: image, or a kind of shard; null if the suffix is unknown."""
    found = pa.nulls(len(keys), pa.string())
    images = r"\.(" + "|".join(sorted(ending[1:] for ending in IMAGE_SUFFIXES)) + ")$"
    for kind, pattern in {IMAGE: images, **_SHARD_ENDINGS}.items():
        found = pc.if_else(pc.match_substring_regex(keys, pattern, ignore_case=True), kind, found)
    return found


def is_litter(key: str) -> bool:
    """Whether an object is what a desktop, a network disk or a notebook left between images, such as `._x.jpg`."""
    return _LITTER.search(key) is not None


def glob_matcher(glob: str) -> Callable[[str], object]:
    """Matches keys with a glob: one without a slash with the last part, one with a slash with the whole key.

    `*` also matches slashes.
    """
    pattern = re.compile(fnmatch.translate(glob))
    if "/" in glob:
        return pattern.match
    return lambda key: pattern.match(key.rsplit("/", 1)[-1])
