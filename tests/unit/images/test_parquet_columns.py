"""Which column of a Parquet file holds its images and which its keys: by content, type and name, never by position."""

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hostile import picture, saved
from support.shards import example_of

from tlbatch.errors import ErrorKind
from tlbatch.images.members import may_hold_images, read_members
from tlbatch.images.shards import Member, ShardOptions
from tlbatch.schema import PARQUET

NAMES = ["a/1.png", "a/2.png", "b/1.png"]
DATA = [saved(picture(number), "PNG") for number in range(3)]
OTHERS = [saved(picture(number), "JPEG") for number in range(3, 6)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def written(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def members(columns: dict, field: str | None = None, wanted: ShardOptions | None = None) -> list[Member]:
    file = io.BytesIO(written(columns))
    assert may_hold_images(PARQUET, file)
    return list(read_members(PARQUET, file, wanted or ShardOptions("s/t", field, 1 << 20)))


def structs(values: list, paths: list) -> pa.Array:
    return pa.array([{"bytes": value, "path": path} for value, path in zip(values, paths, strict=True)], STRUCT)


def test_two_columns_of_one_name_are_a_sentence():
    for names in (["image", "image", "file_name"], ["image", "file_name", "file_name"]):
        columns = [pa.array(DATA) if name == "image" else pa.array(NAMES) for name in names]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, names), buffer)
        (one,) = read_members(PARQUET, buffer, ShardOptions("s/t", None, 1 << 20))
        twice = max(names, key=names.count)
        assert one.data.kind is ErrorKind.UNSUPPORTED
        assert f"2 of its columns are named '{twice}'" in one.data.message


@pytest.mark.parametrize("extension", ["ray.data.arrow_pickled_object", "daft.super_extension"])
def test_pixels_in_extensions_of_others_are_named(extension):
    """Ray stores arrays of unequal dimensions so, Daft images of one shape."""
    ray = extension.startswith("ray")
    pixels = pa.array([b"pickled"] * 3, pa.large_binary()) if ray else pa.array([[1, 2]] * 3, pa.list_(pa.uint8(), 2))
    field = pa.field("image", pixels.type, metadata={"ARROW:extension:name": extension})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pixels, pa.array(NAMES)], pa.schema([field, ("file_name", pa.string())])), buffer)
    found = list(read_members(PARQUET, buffer, ShardOptions("s/t", None, 1 << 20)))
    assert [one.key for one in found] == NAMES
    assert all(f"holds decoded pixels ({extension})" in one.data.message for one in found)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (NAMES, pa.string()),
        (NAMES, pa.large_string()),
        (NAMES, pa.string_view()),
        (NAMES, pa.dictionary(pa.int32(), pa.string())),
        (NAMES, pa.dictionary(pa.int8(), pa.large_string())),
        ([101, 0, -7], pa.int64()),
        ([3, 2, 1], pa.uint8()),
        ([7, 7, 9], pa.dictionary(pa.int32(), pa.int64())),
        (NAMES, pa.binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())])
def test_text_and_integers_of_any_type_are_keys(values, kind, image):
    keys = pa.array(values).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(values).dictionary_encode().cast(kind)
    images = pa.array(DATA).dictionary_encode() if pa.types.is_dictionary(image) else pa.array(DATA, image)
    found = members({"image": images, "file_name": keys})
    assert [(one.key, one.data) for one in found] == list(zip(map(str, values), DATA, strict=True))


def test_text_comes_before_integers_and_a_missing_key_is_the_number_of_the_row():
    columns = {"key": [1, 2, 3], "path": pa.array(["x", None, ""], pa.large_string()), "image": DATA}
    assert [one.key for one in members(columns)] == ["x", "s/t/00000001", "s/t/00000002"]
    assert [one.key for one in members({"weight": [0.5] * 3, "image": DATA})] == [f"s/t/0000000{n}" for n in range(3)]


def test_an_identifier_is_a_key_where_no_other_is():
    assert [one.key for one in members({"image": DATA, "id": [3, 1, 2]})] == ["3", "1", "2"]
    assert [one.key for one in members({"image": DATA, "id": [3, 1, 2], "image_name": NAMES})] == NAMES
    # An integer that was a key before stays one.
    assert [one.key for one in members({"image": DATA, "key": [3, 1, 2], "image_name": NAMES})] == ["3", "1", "2"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_dotted_key_may_be_a_column_or_a_field_of_a_struct(nested):
    """DataChain's."""
    kind = pa.struct([("source", pa.string()), ("path", pa.large_string()), ("size", pa.int64())])
    file = pa.array([{"source": "s3://b", "path": name, "size": 1} for name in NAMES], kind)
    columns = {"file": file, "data": DATA} if nested else {"file.path": NAMES, "data": DATA}
    assert [(one.key, one.data) for one in members(columns)] == list(zip(NAMES, DATA, strict=True))


@pytest.mark.parametrize("large", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)], ids=["list", "large", "fixed"])
def test_a_list_of_images_gives_each_of_them(large):
    rows = [[{"bytes": DATA[0], "path": "x.png"}, {"bytes": DATA[1], "path": None}]] * 2
    found = members({"images": pa.array(rows, large(STRUCT)), "key": ["k1", "k2"]})
    assert [one.key for one in found] == ["x.png", "k1/1", "x.png", "k2/1"]
    assert [one.data for one in found] == DATA[:2] * 2


def test_a_row_without_images_in_its_list_is_counted():
    wanted = ShardOptions("s/t", None, 1 << 20)
    found = members({"images": pa.array([[DATA[0]], [], None, [None, DATA[1]]], pa.list_(pa.binary()))}, wanted=wanted)
    assert [one.key for one in found] == ["s/t/00000000/0", "s/t/00000002", "s/t/00000003/0", "s/t/00000003/1"]
    assert [getattr(one.data, "kind", None) for one in found] == [None, ErrorKind.EMPTY, ErrorKind.EMPTY, None]
    assert wanted.skipped == {"rows without images": 1}


def test_bytes_that_are_no_image_are_not_taken_for_one():
    digests = pa.array([hashlib.sha256(data).digest() for data in DATA], pa.binary())
    for others in ({"picture": structs(DATA, NAMES)}, {"picture": DATA, "key": NAMES}):
        assert [one.data for one in members({"sha256": digests, **others})] == DATA
    # Not even under a usual name.
    assert [one.data for one in members({"data": digests, "picture": structs(DATA, NAMES)})] == DATA


def test_a_usual_name_comes_before_others_and_a_struct_before_bytes():
    assert [one.data for one in members({"mask": structs(OTHERS, NAMES), "image": DATA})] == DATA
    assert [one.data for one in members({"thumb": OTHERS, "photo": structs(DATA, NAMES)})] == DATA


def test_images_of_columns_that_are_not_read_are_counted():
    wanted = ShardOptions("s/t", None, 1 << 20)
    digests = [hashlib.sha256(data).digest() for data in DATA]
    columns = {"mask": structs(OTHERS, NAMES), "image": DATA, "sha256": digests, "none": pa.nulls(3, pa.binary())}
    assert [one.data for one in members(columns, wanted=wanted)] == DATA
    assert wanted.skipped == {"column mask": 3}
    wanted = ShardOptions("s/t", "mask", 1 << 20)
    assert [one.data for one in members(columns, wanted=wanted)] == OTHERS
    assert not wanted.skipped


def test_of_two_equals_none_is_guessed():
    columns = {"source_image": structs(DATA, NAMES), "edited_image": structs(OTHERS, NAMES)}
    (only,) = members(columns)
    assert (only.key, only.data.kind) == ("s/t", ErrorKind.UNSUPPORTED)
    assert all(word in only.data.message for word in ("'source_image'", "'edited_image'", "image_field"))
    assert [one.data for one in members(columns, "edited_image")] == OTHERS
    (only,) = members(columns, "mask")
    assert "no column 'mask' of bytes; its columns are source_image, edited_image" in only.data.message


def test_a_path_without_bytes_says_how_to_embed_them():
    found = members({"image": structs([None, DATA[1], None], ["/x/1.png", "2.png", None])})
    assert [one.key for one in found] == ["/x/1.png", "2.png", "s/t/00000002"]
    assert found[0].data.kind is ErrorKind.UNSUPPORTED
    assert "only a path" in found[0].data.message
    assert found[1].data == DATA[1]
    assert found[2].data.kind is ErrorKind.EMPTY
    # The type tells, if there are no bytes anywhere.
    columns = {"sha256": [b"1" * 32] * 3, "picture": structs([None] * 3, NAMES)}
    assert [one.key for one in members(columns)] == NAMES


class _TrapScalar(pa.ExtensionScalar):
    def as_py(self, **_):
        raise AssertionError("a value became an object")


class _Trap(pa.ExtensionType):
    """Like Ray's `ray.data.arrow_pickled_object`, whose scalar unpickles what is stored."""

    def __init__(self, storage: pa.DataType):
        super().__init__(storage, "tlbatch.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, _: bytes) -> "_Trap":
        return cls(storage)

    def __arrow_ext_scalar_class__(self) -> type:
        return _TrapScalar


def test_no_value_of_a_file_becomes_an_object():
    """The types that Ray registers are those of a whole process, and a file chooses among them."""
    texts = pa.ExtensionArray.from_storage(_Trap(pa.string()), pa.array(NAMES))
    stored = pa.ExtensionArray.from_storage(_Trap(pa.binary()), pa.array(DATA))
    structs_ = pa.StructArray.from_arrays([pa.array(DATA), texts, stored], ["bytes", "path", "more"])
    pa.register_extension_type(_Trap(pa.binary()))
    try:
        for columns in (
            {"image": stored, "key": texts},
            {"image": structs_},
            {"image": stored, "file": pa.StructArray.from_arrays([texts], ["path"])},
            {"image": pa.ListArray.from_arrays([0, 1, 2, 3], structs_)},
        ):
            file = io.BytesIO(written(columns))
            assert "trap" in str(pq.read_schema(file))
            found = list(read_members(PARQUET, file, ShardOptions("s", None, 1 << 20)))
            assert [(one.key, one.data) for one in found] == list(zip(NAMES, DATA, strict=True))
    finally:
        pa.unregister_extension_type("tlbatch.trap")


def ray_tensor() -> pa.Table:
    """As `ray.data.read_images` writes it."""
    kind = pa.list_(pa.uint8())
    told = {"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": json.dumps([2, 2, 3])}
    field = pa.field("image", kind, metadata=told)
    columns = [pa.array([[0] * 12] * 3, kind), pa.array(NAMES)]
    return pa.Table.from_arrays(columns, schema=pa.schema([field, pa.field("path", pa.string())]))


def arrow_tensor() -> pa.Table:
    kind = pa.fixed_shape_tensor(pa.uint8(), [2, 2, 3])
    values = pa.ExtensionArray.from_storage(kind, pa.array([[0] * 12] * 3, kind.storage_type))
    return pa.table({"image": values, "path": NAMES})


def daft_image() -> pa.Table:
    names = ("data", "channel", "height", "width", "mode")
    kinds = (pa.large_list(pa.uint8()), pa.uint16(), pa.uint32(), pa.uint32(), pa.uint8())
    one = dict(zip(names, ([0] * 12, 3, 2, 2, 3), strict=True))
    columns = {"path": pa.array(NAMES, pa.large_string())}
    return pa.table({**columns, "image": pa.array([one] * 3, pa.struct(list(zip(names, kinds, strict=True))))})


@pytest.mark.parametrize(
    ("make", "words"), [(ray_tensor, "ray.data"), (arrow_tensor, "fixed_shape"), (daft_image, "struct of data")]
)
@pytest.mark.parametrize("named", [True, False])
def test_decoded_pixels_are_refused_one_row_an_image(make, words, named):
    table = make() if named else make().drop_columns(["path"])
    columns = {name: table[name] for name in table.column_names}
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    found = list(read_members(PARQUET, buffer, ShardOptions("s/t", None, 1 << 20)))
    assert [one.key for one in found] == (NAMES if named else [f"s/t/0000000{n}" for n in range(3)])
    assert {one.data.kind for one in found} == {ErrorKind.UNSUPPORTED}
    assert all(word in found[0].data.message for word in (words, "decoded pixels", "PNG or JPEG"))
    # Encoded images beside them are taken, and a digest is not.
    beside = pa.table({**columns, "encoded": DATA}, pa.schema([*table.schema, pa.field("encoded", pa.binary())]))
    buffer = io.BytesIO()
    pq.write_table(beside, buffer)
    assert [one.data for one in read_members(PARQUET, buffer, ShardOptions("s", None, 1 << 20))] == DATA
    beside = beside.set_column(beside.num_columns - 1, "encoded", pa.array([b"x" * 16] * 3))
    buffer = io.BytesIO()
    pq.write_table(beside, buffer)
    assert "decoded pixels" in next(read_members(PARQUET, buffer, ShardOptions("s", None, 1 << 20))).data.message


def test_tables_about_images_hold_none():
    assert not may_hold_images(PARQUET, io.BytesIO(written({"file_name": NAMES, "width": [1, 2, 3]})))
    assert may_hold_images(PARQUET, io.BytesIO(b"no Parquet at all")), "its row says what is wrong"


def test_serialized_examples_are_read_like_a_tfrecord():
    """As TFDS writes `file_format="parquet"`: one column `data`."""
    records = [example_of({"image": data, "file_name": name.encode()}) for name, data in zip(NAMES, DATA, strict=True)]
    found = members({"record": records})
    assert [(one.key, one.data) for one in found] == list(zip(NAMES, DATA, strict=True))
    records = [example_of({"image": data, "image/encoded": b"x"}) for data in DATA]
    found = members({"data": [*records, None]}, "image/encoded")
    assert [(one.key, one.data) for one in found[:3]] == [(f"s/t/{row:08d}", b"x") for row in range(3)]
    assert found[3].data.kind is ErrorKind.EMPTY
    assert [one.data for one in members({"data": DATA})] == DATA
