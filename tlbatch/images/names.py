"""An object's name -> what it is: an image, a shard of some format, litter, or something else that is skipped."""

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
        *(".avif", ".avifs", ".heic", ".heics", ".heif", ".hif", ".mpo"),
        *(".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jls", ".jxr", ".wdp", ".hdp"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".pam", ".pfm", ".tga", ".ico", ".qoi", ".dds", ".exr", ".hdr", ".fits", ".psd"),
        *(".svg", ".eps", ".wmf"),
        *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".pef", ".raf", ".rw2", ".srw"),  # cameras' raw files
    )
)
#: The same by length, the common ones first: comparing the end of a key costs a tenth of a regular expression.
_IMAGE_ENDINGS = [
    (length, pa.array(sorted(ending for ending in IMAGE_SUFFIXES if len(ending) == length)))
    for length in sorted({len(ending) for ending in IMAGE_SUFFIXES}, key=lambda length: (abs(length - 4), length))
]
#: Number of a shard, which TFDS, Beam and the ImageNet scripts append to the name: `train.tfrecord-00000-of-00005`.
_NUMBER = r"-\d{5,}-of-\d{5,}"
_NUMBERED = re.compile(f"{_NUMBER}$")
#: Regular expressions of the ends of shards' names.
_SHARD_ENDINGS = {
    TAR: r"\.(tar|tar\.gz|tgz)$",
    PARQUET: rf"\.parquet({_NUMBER})?$",
    TFRECORD: (
        rf"(\.(tfrecords?|tfrec)({_NUMBER})?(\.gz)?|tf_?records?(\.gz)?{_NUMBER}(\.gz)?|\.record({_NUMBER})?"
        rf"|(^|/)[^./]+{_NUMBER})$"
    ),
    ZIP: r"\.zip$",
}

#: Kinds of litter whose folders are not opened: they may hold a copy of the whole store, or be closed to everybody.
UNOPENED = frozenset({"hidden", "snapshot", "System Volume Information", "lost+found", "output of tlbatch"})

#: The list of litter: what desktops, network disks, notebooks and programs leave between pictures (docs/formats.md). A pattern
#: is matched with a whole part of a key, or with its last part; the word beside it is the kind under which litter is counted.
_PARTS = {
    r"\._[^/]*": "._*",  # macOS's attributes of a file, under the name of the file
    r"\.ipynb_checkpoints": ".ipynb_checkpoints",
    r"\.(?:[^./]|\.[^/])[^/]*": "hidden",
    r"@eaDir": "@eaDir",  # Synology's thumbnails
    r"@tmp": "@tmp",  # Synology's unfinished copies
    # QNAP's, Synology's and Windows's; that of Windows XP only as it is written there, because a class may be called recycler.
    r"@Recycle|#recycle|\$RECYCLE\.BIN|(?-i:RECYCLER)": "recycle bin",
    r"@Recently-Snapshot|#snapshot|~snapshot": "snapshot",  # copies of the whole store
    r"System Volume Information": "System Volume Information",
    r"lost\+found": "lost+found",
    r"__MACOSX": "__MACOSX",  # in zip archives made on macOS
    r"_vti_cnf": "_vti_cnf",  # FrontPage's notes on each file, under the name of the file
    r"PaxHeaders?(?:\.[0-9X]+)?": "PaxHeaders",  # headers of a tar that an old program wrote to files
    r"_temporary|_delta_log|_spark_metadata": "metadata of a table",
}
_LAST_PARTS = {
    r"(?:eh)?Thumbs\.db|desktop\.ini|Icon\r": "desktop file",
    r"_metadata|_common_metadata|_SUCCESS|_committed_\d+|_started_\d+": "metadata of a table",
    r"runs/\d{8}T\d{6}Z-[0-9a-f]{6}/.*": "output of tlbatch",
}
_LITTER = [
    *((f"(?is)(?:^|/)(?:{part})(?:/|$)", kind) for part, kind in _PARTS.items()),
    *((f"(?is)(?:^|/)(?:{part})$", kind) for part, kind in _LAST_PARTS.items()),
]
_ANY_LITTER = f"(?is)(?:^|/)(?:(?:{'|'.join(_PARTS)})(?:/|$)|(?:{'|'.join(_LAST_PARTS)})$)"
_COMPILED = [(re.compile(pattern), kind) for pattern, kind in _LITTER]
_ANY_COMPILED = re.compile(_ANY_LITTER)


def suffix(key: str) -> str:
    """The lower-case suffix of a key's last part, with its dot; empty if there is none."""
    name = key.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else ""


def kind_of_name(key: str) -> str:
    """The kind under which an object of an unknown format is counted: its suffix, without the number of a shard."""
    return suffix(_NUMBERED.sub("", key)) or "no suffix"


def is_litter(key: str) -> bool:
    """Whether an object, or a member of a shard, is on the list of litter by its name or that of a folder above it."""
    return _ANY_COMPILED.search(key) is not None


def litter_kind(key: str) -> str | None:
    """The kind under which an object is counted as litter; None if it is not on the list."""
    return next((kind for pattern, kind in _COMPILED if pattern.search(key)), None) if is_litter(key) else None


def litter(keys: pa.Array) -> pa.Array:
    """`litter_kind` of each key."""
    found = pc.match_substring_regex(keys, _ANY_LITTER)
    kinds = [litter_kind(key) for key in keys.filter(found).to_pylist()]
    return pc.replace_with_mask(pa.nulls(len(keys), pa.string()), found, pa.array(kinds, pa.string()))


def formats(keys: pa.Array) -> pa.Array:
    """The format of each key's object by its suffix: image, or a kind of shard; null if the suffix is unknown."""
    found = pa.nulls(len(keys), pa.string())
    for length, endings in _IMAGE_ENDINGS:
        ends = pc.ascii_lower(pc.binary_slice(keys.cast(pa.binary()), -length, None).view(pa.string()))
        found = pc.if_else(pc.is_in(ends, endings), IMAGE, found)
        if not found.null_count:
            return found
    unknown = pc.is_null(found)
    rest = keys.filter(unknown)
    kinds = pa.nulls(len(rest), pa.string())
    for kind, pattern in _SHARD_ENDINGS.items():
        kinds = pc.if_else(pc.match_substring_regex(rest, pattern, ignore_case=True), kind, kinds)
    return pc.replace_with_mask(found, unknown, kinds)


def glob_matcher(glob: str) -> Callable[[str], object]:
    """Matches keys with a glob: one without a slash with the last part, one with a slash with the whole key.

    `*` also matches slashes, a glob that ends with a slash means a folder with everything below it, and `**/` at the beginning
    means any folder, or none.
    """
    anywhere = glob.removeprefix("**/")
    pattern = fnmatch.translate(f"{anywhere}*" if glob.endswith("/") else anywhere)
    match = re.compile(pattern if anywhere == glob else f"(?s:.*/)?{pattern}").match
    if "/" in glob:
        return match
    return lambda key: match(key.rsplit("/", 1)[-1])
