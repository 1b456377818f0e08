"""An open shard of any format -> its images, one by one.

A damaged shard gives every image before the damage and then one failure for the rest. A shard without images gives one
failure, because every object of the manifest must have a row for the counts to reconcile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import IO

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images import tar, zip_archive
from tlbatch.images.parquet import has_images, read_parquet
from tlbatch.images.shards import Member, ShardImages, ShardOptions, TornShardError
from tlbatch.images.tfrecord import read_tfrecord
from tlbatch.schema import PARQUET, TAR, TFRECORD, ZIP


def read_members(kind: str, file: IO[bytes], wanted: ShardOptions) -> Iterator[Member]:
    """Read every image of a shard, in the order of the shard.

    Args:
        kind: `TAR`, `PARQUET`, `TFRECORD` or `ZIP`.
        file: the shard; for Parquet and zip it must be seekable.
        wanted: how to read it; its `skipped` is complete when the last image was read.

    Raises:
        OSError: `file` could not be read; the caller knows the cause. Damage in the shard gives a failure instead.
    """
    index = 0
    try:
        for key, data in _READERS[kind](file, wanted):
            yield Member(index, key, data)
            index += 1
    except TornShardError as torn:
        after = f" after {index} images" if index else ""
        yield Member(index, wanted.key, Failure("read", torn.kind, f"the shard cannot be read{after}: {torn}"))
        return
    if not index:
        others = ", ".join(f"{count} {kind}" for kind, count in wanted.skipped.most_common(3))
        message = "the shard contains no images" + (f", but others that were skipped: {others}" if others else "")
        yield Member(0, wanted.key, Failure("read", ErrorKind.EMPTY, message))


def may_hold_images(kind: str, file: IO[bytes], field: str | None = None) -> bool:
    """Whether an object with the name of a shard can be one, by what a few small reads of it tell.

    A Parquet file without images is none, and neither is a tar or zip without a member that is named like an image. What is
    damaged may be one, so that its row says what is wrong with it.

    Args:
        kind: `TAR`, `PARQUET`, `TFRECORD` or `ZIP`.
        file: the object, seekable.
        field: column or feature with the images, or extension of the members, if not the usual ones.

    Raises:
        OSError: `file` could not be read.
    """
    try:
        return kind not in _CHECKS or _CHECKS[kind](file, field)
    except TornShardError:
        return True


_CHECKS: Mapping[str, Callable[[IO[bytes], str | None], bool]] = {
    TAR: tar.has_image_names,
    PARQUET: has_images,
    ZIP: zip_archive.has_image_names,
}
_READERS: Mapping[str, Callable[[IO[bytes], ShardOptions], ShardImages]] = {
    TAR: tar.read_tar,
    PARQUET: read_parquet,
    TFRECORD: read_tfrecord,
    ZIP: zip_archive.read_zip,
}
