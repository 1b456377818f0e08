"""An open shard of any format -> its images, one by one.

A torn shard gives every image before the tear and then one failure for the tear. A shard without an image gives one failure,
because an object that leaves no row would not be accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import IO

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.parquet import read_parquet
from tlbatch.images.shards import Member, ShardImages, ShardOptions, TornShardError
from tlbatch.images.tar import read_tar
from tlbatch.images.tfrecord import read_tfrecord
from tlbatch.schema import PARQUET, TAR, TFRECORD


def read_members(kind: str, file: IO[bytes], wanted: ShardOptions) -> Iterator[Member]:
    """Every image of a shard, in its order.

    Args:
        kind: `TAR`, `PARQUET` or `TFRECORD`.
        file: the shard; for Parquet it must be able to seek.
        wanted: how to read it.

    Raises:
        OSError: what the file raises when it cannot be read, for the caller who knows why. Damage is no exception.
    """
    index = 0
    try:
        for key, data in _READERS[kind](file, wanted):
            yield Member(index, key, data)
            index += 1
    except TornShardError as torn:
        yield Member(index, wanted.key, Failure("read", torn.kind, f"after {index} images: {torn}"))
        return
    if not index:
        yield Member(0, wanted.key, Failure("read", ErrorKind.EMPTY, "the shard holds no image"))


_READERS: Mapping[str, Callable[[IO[bytes], ShardOptions], ShardImages]] = {
    TAR: read_tar,
    PARQUET: read_parquet,
    TFRECORD: read_tfrecord,
}
