"""A Parquet file with a column of encoded images -> its images.

Which column holds the images follows from its content, its type and its name, never from its position. A table without
encoded images, or with two columns that could be meant, gives one failure that names the columns.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images.shards import (
    BUFFER_BYTES,
    ID_FIELDS,
    IMAGE_FIELDS,
    KEY_FIELDS,
    ShardImages,
    ShardOptions,
    TornShardError,
    damage_as_torn_shard,
    looks_like_image,
)
from tlbatch.images.tfrecord import images_of_example, is_example

#: Rows that are in memory at a time: of a column with one image a row, and of one with a list of images.
_ROWS_AT_ONCE, _LISTS_AT_ONCE = 32, 4
#: Largest size in bytes of a Parquet file whose row groups are read in one piece.
_READ_AT_ONCE = 32 << 20

#: How a column holds images: as bytes; as Hugging Face's struct of bytes and path; as lists of either; as decoded pixels; in
#: serialized records of TensorFlow.
_Form = Literal["bytes", "struct", "list", "pixels", "examples"]


#: Extensions of Ray, for images of unequal dimensions, and of Daft, for images of one shape (as a list) among others.
_PICKLED, _OF_DAFT = "ray.data.arrow_pickled_object", "daft.super_extension"


class _Column(NamedTuple):
    """A column that may hold the images."""

    name: str
    form: _Form
    #: What an extension or a struct is, for a sentence about it.
    kind: str


def read_parquet(file: IO[bytes], wanted: ShardOptions) -> ShardImages:
    """Read a column of bytes, of Hugging Face's struct of bytes and path, or of lists of either.

    The key is the path in the struct, or else a column of text or integers with a usual name, or else the shard's key and the
    row number. In a list an image has its place in the list behind the key of the row. A table of serialized
    `tf.train.Example`, the Parquet form of TFDS, is read like a TFRecord.
    """
    with damage_as_torn_shard():
        parquet = _opened(file)
        examples = _examples_column(parquet)
        image, *others = [examples] if examples else _image_columns(parquet, wanted.field)
        key = _key_column(parquet.schema_arrow, image.name)
        _require_once(parquet.schema_arrow.names, image.name, key)
        position = 0
        for batch in _batches(parquet, image, key):
            keys = _keys_of(batch, key, [f"{wanted.key}/{position + row:08d}" for row in range(batch.num_rows)])
            position += batch.num_rows
            for other in others:
                wanted.skip(f"column {other.name}", batch.num_rows)
            if image.form == "pixels":
                yield from ((one, _decoded_pixels(image)) for one in keys)
                continue
            for one, value in zip(keys, _to_python(batch.column(image.name)), strict=True):
                is_record = image.form == "examples" and value
                yield from images_of_example(value, one, wanted) if is_record else _images_of(value, one, wanted)


def has_images(file: IO[bytes], field: str | None = None) -> bool:
    """Whether a Parquet file has images or decoded pixels, by the types and names of its columns.

    Columns of bytes are common in tables about images: digests, geometries. Of such a column, if its name is none of the usual
    ones, the first rows are read.
    """
    with damage_as_torn_shard():
        parquet = _opened(file)
        columns = [column for field in parquet.schema_arrow if (column := _column(field)) is not None]
        told = any(one.form != "bytes" or one.name in (*IMAGE_FIELDS, field) for one in columns)
        told = told or _examples_column(parquet) is not None
        return told or any(_may_be_image(_sample(parquet, one.name)) for one in columns)


def _opened(file: IO[bytes]) -> pq.ParquetFile:
    # A large file is read page by page, because one row group may be the whole file. A small file is not: in that mode Arrow
    # trusts the page size in the header, and fills 2 GB with zeros for a damaged file of 2 KB.
    buffer = BUFFER_BYTES if file.seek(0, io.SEEK_END) > _READ_AT_ONCE else 0
    return pq.ParquetFile(file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True)


def _may_be_image(sample: list[bytes]) -> bool:
    """Whether a column may hold images: one without any value in its first rows may hold them further on."""
    return not sample or any(map(looks_like_image, sample))


def _batches(parquet: pq.ParquetFile, image: _Column, key: str | None) -> Iterator[pa.RecordBatch]:
    """The columns that are needed, one row group at a time, so that damage in a group does not lose rows of the group before.

    Pixels are not read if there is another column to count the rows by.
    """
    names = [] if key is None else [key]
    if image.form != "pixels" or key is None:
        names.append(image.name)
    for group in range(parquet.num_row_groups):
        at_once = _LISTS_AT_ONCE if image.form == "list" else _ROWS_AT_ONCE
        yield from parquet.iter_batches(at_once, [group], names, use_threads=False)


def _images_of(value: Any, key: str, wanted: ShardOptions) -> Iterator[tuple[str, bytes | Failure]]:
    """The images of one cell, whatever its form."""
    if isinstance(value, list):
        if not value:
            wanted.skip("rows without images")
        for place, one in enumerate(value):
            yield from _images_of(one, f"{key}/{place}", wanted)
    elif isinstance(value, dict):
        path = value.get("path")
        name = _text(path) if path else key
        yield name, _only_a_path() if path and value["bytes"] is None else wanted.limited(value["bytes"])
    else:
        yield key, wanted.limited(value)


def _only_a_path() -> Failure:
    message = (
        "the shard has only a path for this image and no bytes; embed them (`datasets.table.embed_table_storage` of Hugging "
        "Face), or give the folder of the files as images"
    )
    return Failure("read", ErrorKind.UNSUPPORTED, message)


def _decoded_pixels(column: _Column) -> Failure:
    message = (
        f"the column {column.name!r} holds decoded pixels ({column.kind}) and no encoded images; store each image as the bytes "
        "of a PNG or JPEG file in a column of type binary"
    )
    return Failure("read", ErrorKind.UNSUPPORTED, message)


def _examples_column(parquet: pq.ParquetFile) -> _Column | None:
    """The only column of a table, if its first rows are serialized `tf.train.Example`."""
    names = parquet.schema_arrow.names
    column = _column(parquet.schema_arrow.field(0)) if len(names) == 1 else None
    sample = [] if column is None or column.form != "bytes" else _sample(parquet, column.name)
    return column._replace(form="examples") if column and sample and all(map(is_example, sample)) else None


def _image_columns(parquet: pq.ParquetFile, asked: str | None) -> list[_Column]:
    """The column with the images, then others that hold images as well.

    Raises:
        TornShardError: there is none, or two could be meant.
    """
    schema = parquet.schema_arrow
    columns = [column for field in schema if (column := _column(field)) is not None and asked in (None, field.name)]
    if not columns:
        missing = f"no column {asked!r} of bytes" if asked else "no column of bytes"
        raise TornShardError(f"the file has {missing}; its columns are {', '.join(schema.names)}", ErrorKind.UNSUPPORTED)
    encoded = [column for column in columns if column.form != "pixels"]
    if len(columns) == 1 or not encoded:
        return columns[:1]
    samples = {column.name: _sample(parquet, column.name) for column in encoded}
    images = [one for one in encoded if _may_be_image(samples[one.name])]
    if not images:
        return [next((one for one in columns if one.form == "pixels"), _usual(encoded) or encoded[0])]
    found = _usual(images)
    of_images = [one for one in images if one.form != "bytes"] or images
    if found is None and len(of_images) > 1 and any(samples.values()):
        names = " and ".join(repr(one.name) for one in of_images)
        message = f"the columns {names} all hold images; choose one with image_field (--image-field)"
        raise TornShardError(message, ErrorKind.UNSUPPORTED)
    found = found or of_images[0]
    return [found, *(one for one in images if one != found and samples[one.name])]


def _require_once(names: Sequence[str], *used: str | None) -> None:
    """Raise TornShardError if a column that is read has the name of another one."""
    twice = next((name for name in used if names.count(name) > 1), None)
    if twice is not None:
        message = f"{names.count(twice)} of its columns are named {twice!r}; give each a name of its own"
        raise TornShardError(message, ErrorKind.UNSUPPORTED)


def _usual(columns: Iterable[_Column]) -> _Column | None:
    by_name = {column.name: column for column in columns}
    return next((by_name[name] for name in IMAGE_FIELDS if name in by_name), None)


def _sample(parquet: pq.ParquetFile, name: str) -> list[bytes]:
    """The images of the first rows of a column, without those that are null; nothing of a damaged column."""
    try:
        with damage_as_torn_shard():
            if not parquet.num_row_groups:
                return []
            batch = next(parquet.iter_batches(_LISTS_AT_ONCE, [0], [name], use_threads=False), None)
            values = [] if batch is None else _to_python(batch.column(0))
    except TornShardError:
        return []
    images = _images_of(values, "", ShardOptions("", None, 1 << 62))
    return [data for _, data in images if isinstance(data, bytes)]


def _column(field: pa.Field) -> _Column | None:
    """What a column can hold; None if it holds neither images nor pixels."""
    kind = _plain(field.type)
    name = getattr(field.type, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(
        errors="replace"
    )
    if "tensor" in name:
        return None if _dimensions(field) == 1 else _Column(field.name, "pixels", name)
    if name == _PICKLED or (name == _OF_DAFT and _is_list(kind) and pa.types.is_integer(kind.value_type)):
        return _Column(field.name, "pixels", name)
    if pa.types.is_struct(kind) and {"data", "height", "width"} <= {child.name for child in kind}:
        return _Column(field.name, "pixels", f"a struct of {', '.join(child.name for child in kind)}")
    if _holds_bytes(kind):
        return _Column(field.name, "struct" if pa.types.is_struct(kind) else "bytes", "")
    return _Column(field.name, "list", "") if _is_list(kind) and _holds_bytes(_plain(kind.value_type)) else None


def _dimensions(field: pa.Field) -> int | None:
    """The number of dimensions of a column of tensors, as Arrow or Ray says it; one is a vector, and no picture."""
    shape = getattr(field.type, "shape", None)
    if shape is None:
        try:
            shape = json.loads((field.metadata or {}).get(b"ARROW:extension:metadata", b""))
        except ValueError:
            return None
        shape = shape.get("shape") if isinstance(shape, dict) else shape
    return len(shape) if isinstance(shape, list | tuple) else None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, without an extension or a dictionary around it."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(_plain(kind.field("bytes").type))
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _key_column(schema: pa.Schema, image: str) -> str | None:
    """The first usual column of text, or else of integers or bytes; `file.path` may be a column or the field of a struct.

    Columns of identifiers come after all others, because tables exist whose keys are those of the others.
    """
    kinds = {field.name: _plain(field.type) for field in schema}
    for parent, kind in list(kinds.items()):
        if pa.types.is_struct(kind):
            kinds |= {f"{parent}.{child.name}": _plain(child.type) for child in kind if f"{parent}.{child.name}" not in kinds}
    for fields in (KEY_FIELDS, ID_FIELDS):
        usual = [name for name in fields if name in kinds and name != image]
        texts = [name for name in usual if _is_text(kinds[name])]
        others = [name for name in usual if pa.types.is_integer(kinds[name]) or _is_bytes(kinds[name])]
        if texts or others:
            return (texts + others)[0]
    return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _keys_of(batch: pa.RecordBatch, name: str | None, otherwise: list[str]) -> list[str]:
    """The keys of the rows of a batch: those of a column, and `otherwise` where it has none."""
    if name is None:
        return otherwise
    if name in batch.schema.names:
        found = _to_python(batch.column(name))
    else:
        parent, _, child = name.partition(".")
        found = _to_python(_storage(batch.column(parent)).field(child))
    return [own if one is None or one in ("", b"") else _text(one) for one, own in zip(found, otherwise, strict=True)]


def _text(key: Any) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else str(key)


def _to_python(array: pa.Array) -> list[Any]:
    """The bytes, texts and integers of an array, in lists, and in the fields `bytes` and `path` of structs; None for the rest.

    No other value becomes a Python object: Ray registers an extension type whose `to_pylist` unpickles what it finds.
    """
    array = _storage(array)
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _to_python(array.dictionary_decode())
    if pa.types.is_struct(kind):
        names = [name for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
        rows = zip(*(_to_python(array.field(name)) for name in names), strict=True)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if known else None for row, known in zip(rows, valid, strict=True)]
    if _is_list(kind):
        values = iter(_to_python(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else list(itertools.islice(values, length)) for length in lengths]
    if _is_text(kind) or pa.types.is_integer(kind) or _is_bytes(kind):
        return list(array.to_pylist())
    return [None] * len(array)


def _storage(array: pa.Array) -> pa.Array:
    return _storage(array.storage) if isinstance(array.type, pa.BaseExtensionType) else array
