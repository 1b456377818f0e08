"""Shards give every image they hold; damage costs what is behind it, and says so in one row."""

import gzip
import io
import re
import subprocess
import sys
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command import PEAK
from support.shards import WRITERS, example_of, parquet_of, record_of, tar_of, tfrecord_of, zip_of

from tlbatch.errors import ErrorKind, Failure
from tlbatch.images import parquet, tar
from tlbatch.images.members import read_members
from tlbatch.images.names import formats
from tlbatch.images.shards import BUFFER_BYTES, Member, ShardOptions
from tlbatch.schema import PARQUET, TAR, TFRECORD, ZIP

IMAGES = {f"dir/{number:03d}.jpg": bytes([number]) * (1000 + 700 * number) for number in range(8)}


def members(kind: str, data: bytes, field: str | None = None, max_bytes: int = 1 << 30, **options) -> list[Member]:
    return list(read_members(kind, io.BytesIO(data), ShardOptions("s/shard", field, max_bytes, **options)))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_with_its_name_in_order(kind):
    found = members(kind, WRITERS[kind](IMAGES))
    assert [(one.index, one.key, one.data) for one in found] == [(n, *item) for n, item in enumerate(IMAGES.items())]


@pytest.mark.parametrize("kind", [TAR, TFRECORD])
def test_a_gzipped_shard_is_the_same_whatever_its_name(kind):
    assert members(kind, gzip.compress(WRITERS[kind](IMAGES))) == members(kind, WRITERS[kind](IMAGES))


def test_tensorflow_writes_what_is_read(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = str(tmp_path / "x.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for name, data in IMAGES.items():
            features = {
                "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data])),
                "image/filename": tf.train.Feature(bytes_list=tf.train.BytesList(value=[name.encode()])),
                "image/width": tf.train.Feature(int64_list=tf.train.Int64List(value=[3])),
                "weight": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 1.5])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    found = members(TFRECORD, (tmp_path / "x.tfrecord").read_bytes())
    assert {one.key: one.data for one in found} == IMAGES


@pytest.mark.parametrize("kind", [TAR, TFRECORD])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_torn_end_gives_all_before_it_and_one_row_for_the_tear(kind, packed):
    whole = WRITERS[kind](IMAGES)
    ends = []  # where each image is complete in the shard
    for count in range(1, 9):
        part = WRITERS[kind](dict(list(IMAGES.items())[:count]))
        ends.append(len(part.rstrip(b"\0")) if kind == TAR else len(part))
    for cut in range(600, ends[-1] - 1, 997):
        data = whole[:cut]
        if packed:
            data = gzip.compress(whole)
            data = data[: len(data) * cut // len(whole)]
        found = members(kind, data)
        good = [one for one in found if not isinstance(one.data, Failure)]
        assert [one.data for one in good] == list(IMAGES.values())[: len(good)]
        assert packed or abs(len(good) - sum(end <= cut for end in ends)) <= (kind == TAR)
        *_, last = found
        if cut in ends and kind == TFRECORD and not packed:
            continue
        assert (last.data.kind, last.key, last.index) == (ErrorKind.TRUNCATED, "s/shard", len(good))
        assert sum(isinstance(one.data, Failure) for one in found) == 1


def test_damage_between_the_members_of_a_tar_is_not_taken_for_its_end():
    data = bytearray(tar_of(IMAGES))
    second = data.index(b"dir/001.jpg")
    data[second + 148 : second + 156] = b"garbage!"
    found = members(TAR, bytes(data))
    assert [one.key for one in found] == ["dir/000.jpg", "s/shard"]
    assert found[1].data.kind is ErrorKind.TRUNCATED


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_archives_one_behind_the_other_are_read_to_the_last(pack):
    """As `cat a.tar b.tar` leaves them, with their end markers between them."""
    first, second = tar_of(dict(list(IMAGES.items())[:3])), tar_of(dict(list(IMAGES.items())[3:]))
    for data in (pack(first) + pack(second), pack(first + bytes(71_680) + second)):
        assert [one.data for one in members(TAR, data)] == list(IMAGES.values())
    found = members(TAR, pack(first + second[:-12_000]))
    assert [one.index for one in found] == list(range(len(found)))
    assert found[-1].data.kind is ErrorKind.TRUNCATED


def test_what_is_no_archive_behind_the_end_of_one_is_ignored_and_in_the_middle_it_is_damage():
    data = tar_of(IMAGES)
    assert len(members(TAR, data + b"signature" * 100)) == len(IMAGES)
    second = data.index(b"dir/001.jpg")
    found = members(TAR, data[:second] + bytes(512) + data[second + 512 :])  # its header was overwritten
    assert [one.key for one in found] == ["dir/000.jpg", "s/shard"]
    assert found[1].data.kind is ErrorKind.TRUNCATED


def test_labels_and_texts_beside_images_are_skipped():
    found = members(TAR, tar_of({"1.jpg": b"a", "1.cls": b"3", "1.json": b"{}", "1.txt": b"x", "2.WEBP": b"b", "2.jpeg": b"c"}))
    assert [(one.index, one.key) for one in found] == [(0, "1.jpg"), (1, "2.WEBP"), (2, "2.jpeg")]


SAMPLES = {f"s/{n}.{ending}": b"x" for n in ("0001", "0002.5") for ending in ("jpg", "seg.png", "depth.PNG", "json")}


@pytest.mark.parametrize("kind", [TAR, ZIP])
@pytest.mark.parametrize(
    ("field", "exclude", "keys", "skipped"),
    [
        (None, (), [name for name in SAMPLES if not name.endswith("json")], {"sidecars": 2}),
        ("seg.png", (), ["s/0001.seg.png"], {"sidecars": 2, ".jpg": 1, ".depth.png": 1, ".5.jpg": 1}),
        (".JPG", (), ["s/0001.jpg"], {"sidecars": 2, ".seg.png": 1, ".depth.png": 1, ".5.jpg": 1}),
        ("photo", (), [name for name in SAMPLES if not name.endswith("json")], {"sidecars": 2}),  # another shard's column
        (None, ("*.png", "*.PNG"), ["s/0001.jpg", "s/0002.5.jpg"], {"sidecars": 2, "excluded": 4}),
        (None, ("s/*.png", "0002*", "*.PNG"), ["s/0001.jpg"], {"sidecars": 1, "excluded": 6}),
        ("seg.png", ("s/",), ["s/shard"], {"excluded": 8}),
    ],
)
def test_of_a_sample_with_several_images_some_are_chosen(kind, field, exclude, keys, skipped):
    counted = Counter()
    found = members(kind, WRITERS[kind](SAMPLES), field, exclude=exclude, skipped=counted)
    assert [one.key for one in found] == keys
    assert skipped.items() <= counted.items()


def test_a_member_is_an_image_if_its_extension_is_asked_for():
    found = members(TAR, tar_of({"1.image": b"a", "1.txt": b"b", "2.image": b"c"}), "image")
    assert [(one.key, one.data) for one in found] == [("1.image", b"a"), ("2.image", b"c")]


@pytest.mark.parametrize("kind", [TAR, ZIP])
def test_litter_in_archives_is_skipped_and_counted(kind):
    names = ["./._a.jpg", "./a.jpg", "__MACOSX/a.jpg", "c/.ipynb_checkpoints/a-checkpoint.jpg", "c/@eaDir/a.jpg/THUMB.jpg"]
    counted = Counter()
    (only,) = members(kind, WRITERS[kind](dict.fromkeys(names, b"x")), skipped=counted)
    assert only.key == "a.jpg", "./ is what tar writes before every name, and no part of it"
    assert counted == {"._*": 1, "__MACOSX": 1, ".ipynb_checkpoints": 1, "@eaDir": 1}


def test_kinds_of_what_is_skipped_are_limited():
    counted = Counter()
    members(TAR, tar_of({f"a.{number:05d}": b"" for number in range(300)} | {"b." + "x" * 90: b""}), skipped=counted)
    assert counted.total() == 301
    assert len(counted) <= 65
    assert counted["other"] > 200


def test_links_folders_and_devices_in_a_tar_are_no_images():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.DIRTYPE), ("c.jpg", tarfile.CHRTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            header.linkname = "elsewhere.jpg"
            archive.addfile(header)
    skipped = Counter()
    (only,) = members(TAR, buffer.getvalue(), skipped=skipped)
    assert only.data.kind is ErrorKind.EMPTY
    assert only.data.message == "the shard contains no images, but others that were skipped: 1 links, 1 special files"
    assert skipped == {"links": 1, "special files": 1}


def test_a_name_over_the_limit_is_not_read(monkeypatch):
    data = tar_of({f"{'n' * 2000}.jpg": b"x"})
    (found,) = members(TAR, data)
    assert found.data == b"x"
    monkeypatch.setattr(tar, "_MAX_HEADER_BYTES", 2000)
    (tear,) = members(TAR, data)
    assert tear.data.kind is ErrorKind.TRUNCATED


@pytest.mark.parametrize("kind", WRITERS)
def test_names_that_occur_twice_stay_two_images(kind):
    if kind == TAR:
        data = tar_of({"a.jpg": b"1"})[:1024] + tar_of({"a.jpg": b"2"})
    elif kind == TFRECORD:
        data = tfrecord_of({"a.jpg": b"1"}) + tfrecord_of({"a.jpg": b"2"})
    elif kind == ZIP:
        data = zip_of({"a.jpg": b"1", "b.jpg": b"2"}).replace(b"b.jpg", b"a.jpg")
    else:
        kind_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": b"1", "path": "a.jpg"}, {"bytes": b"2", "path": "a.jpg"}], kind_)
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": column}), buffer)
        data = buffer.getvalue()
    assert [(one.index, one.key, one.data) for one in members(kind, data)] == [(0, "a.jpg", b"1"), (1, "a.jpg", b"2")]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_shard_without_an_image_is_one_row(kind):
    (only,) = members(kind, WRITERS[kind]({}))
    assert (only.key, only.data.kind) == ("s/shard", ErrorKind.EMPTY)


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_no_shard_at_all_is_one_row(kind):
    (only,) = members(kind, b"<html>not found</html>" * 100)
    assert (only.key, only.data.kind) == ("s/shard", ErrorKind.TRUNCATED)


@pytest.mark.parametrize("kind", WRITERS)
def test_too_many_bytes_cost_only_their_own_image(kind):
    found = members(kind, WRITERS[kind](IMAGES), max_bytes=3000 if kind != TFRECORD else 3100)
    assert [isinstance(one.data, Failure) for one in found] == [False] * 3 + [True] * 5
    assert {one.data.kind for one in found[3:]} == {ErrorKind.TOO_LARGE}


def test_a_parquet_column_of_plain_bytes_and_its_key():
    buffer = io.BytesIO()
    columns = {"thumb": [b"t"] * 3, "photo": [b"1", None, b"3"], "file_name": ["a", "b", None]}
    pq.write_table(pa.table(columns), buffer)
    found = members(PARQUET, buffer.getvalue(), field="photo")
    assert [(one.key, one.data) for one in found[::2]] == [("a", b"1"), ("s/shard/00000002", b"3")]
    assert (found[1].key, found[1].data.kind) == ("b", ErrorKind.EMPTY)
    assert members(PARQUET, buffer.getvalue())[0].data == b"t"


def test_a_parquet_file_without_bytes_says_what_it_has():
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "price": [1.0]}), buffer)
    (only,) = members(PARQUET, buffer.getvalue())
    assert only.data.kind is ErrorKind.UNSUPPORTED
    assert "its columns are key, price" in only.data.message


def test_a_damaged_row_group_costs_what_is_behind_it():
    data = bytearray(parquet_of(IMAGES, row_group_size=2))
    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(2).column(1)
    data[column.dictionary_page_offset : column.dictionary_page_offset + 20] = bytes(20)
    found = members(PARQUET, bytes(data))
    good = [one for one in found if not isinstance(one.data, Failure)]
    assert [one.key for one in good] == list(IMAGES)[: len(good)]
    assert len(good) == 4
    assert found[-1].data.kind is ErrorKind.TRUNCATED


def test_what_a_parser_of_headers_raises_is_a_tear():
    """Found by `make fuzz`: a record whose length is no number of this machine raised OverflowError, which ended the run."""
    text = b"99999999999999999999 path=x\n"
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, len(text)
    found = members(TAR, header.tobuf(tarfile.USTAR_FORMAT) + text.ljust(512, b"\0") + tar_of(IMAGES))
    assert [one.data.kind for one in found] == [ErrorKind.TRUNCATED]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_a_member_that_says_it_is_longer_than_its_archive_is_a_tear(pack, monkeypatch):
    """`make fuzz` found a member of an exabyte: tarfile reads on behind the end, a megabyte of nothing at a time."""
    whole = tar_of(IMAGES).rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    monkeypatch.setattr(tar, "MAX_DEFLATE_RATIO", 300)
    long = tarfile.TarInfo("dir/008.jpg")
    long.size = 400 * len(pack(whole)) if pack is gzip.compress else 10_000
    found = members(TAR, pack(whole + long.tobuf(tarfile.GNU_FORMAT) + b"and so on"))
    assert [one.key for one in found] == [*IMAGES, "s/shard"]
    assert f"a member of {long.size:,} bytes extends past the end of the archive" in found[-1].data.message


def test_a_small_file_of_parquet_is_read_at_once_and_a_large_one_page_by_page(monkeypatch):
    """Page by page Arrow makes room for what a page says it has: `make fuzz` found 2 KB for which it filled 2 GB."""
    data, sizes = parquet_of(IMAGES), []
    opened = pq.ParquetFile
    monkeypatch.setattr(
        parquet.pq, "ParquetFile", lambda *args, **options: sizes.append(options["buffer_size"]) or opened(*args, **options)
    )
    at_once = members(PARQUET, data)
    monkeypatch.setattr(parquet, "_READ_AT_ONCE", len(data) - 1)
    assert members(PARQUET, data) == at_once
    assert sizes == [0, BUFFER_BYTES]


def test_a_page_that_says_it_is_longer_than_it_is_costs_no_memory(tmp_path):
    """It says that it has 64 MiB."""
    data = parquet_of(IMAGES, use_dictionary=False)
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).data_page_offset
    # The page's header: it is a data page, of a size unpacked and a size packed; a number ends with a byte below 128.
    header = re.compile(rb"\x15\x00\x15[\x80-\xff]*[\x00-\x7f]\x15").match(data, start)
    rest = re.compile(rb"[\x80-\xff]*[\x00-\x7f]").match(data, header.end())
    (tmp_path / "shard").write_bytes(data[: header.end()] + b"\x80\x80\x80\x40" + data[rest.end() :])
    (tmp_path / "whole").write_bytes(data)
    code = (
        "import io, sys\n"
        + PEAK
        + "from tlbatch.images.members import read_members\nfrom tlbatch.images.shards import ShardOptions\n"
        "list(read_members('parquet', io.BytesIO(open(sys.argv[2], 'rb').read()), ShardOptions('s', None, 99)))\n"
        "before = peak()\n"
        "(only,) = read_members('parquet', open(sys.argv[1], 'rb'), ShardOptions('s', None, 99))\n"
        "assert only.data.kind == 'truncated', only\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "shard", tmp_path / "whole"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 16 * 1024


def test_a_record_with_a_flipped_bit_costs_only_itself():
    records = [record_of(example_of({"image/encoded": data})) for data in IMAGES.values()]
    hurt = bytearray(records[2])
    hurt[500] ^= 1
    found = members(TFRECORD, b"".join([*records[:2], bytes(hurt), *records[3:]]))
    assert [isinstance(one.data, Failure) for one in found] == [False, False, True, *[False] * 5]
    assert found[2].data.kind is ErrorKind.DECODE_FAILED
    assert found[3].key == "s/shard/00000003"


def test_an_example_without_the_field_says_what_it_has():
    data = record_of(example_of({"jpeg": b"1", "label": b"cat"}))
    assert "its features are jpeg, label" in members(TFRECORD, data)[0].data.message
    assert members(TFRECORD, data, field="jpeg")[0].data == b"1"


def test_a_record_names_its_image_by_text_or_a_number():
    """TFDS, COCO and Kaggle; an `int64_list` by hand, as protobuf packs it."""
    number = b"\x0a\x0d\x0a\x02id\x12\x07\x1a\x05\x0a\x03\xe5\x8e\x26"
    wrapped = b"\x0a" + bytes([len(number)]) + number
    image = example_of({"image": b"1"})
    data = record_of(image + wrapped) + record_of(example_of({"image": b"2", "image_name": b"x.png", "image/filename": b""}))
    assert [(one.key, one.data) for one in members(TFRECORD, data)] == [("624485", b"1"), ("x.png", b"2")]


def test_all_images_of_a_record_are_read():
    values = b"".join(b"\x0a" + bytes([len(one)]) + one for one in (b"first", b"second"))
    entry = b"\x0a\x05image\x12" + bytes([2 + len(values)]) + b"\x0a" + bytes([len(values)]) + values
    data = record_of(b"\x0a" + bytes([2 + len(entry)]) + b"\x0a" + bytes([len(entry)]) + entry)
    found = members(TFRECORD, data)
    assert [(one.key, one.data) for one in found] == [("s/shard/00000000/0", b"first"), ("s/shard/00000000/1", b"second")]


def test_images_of_features_that_are_not_read_are_counted():
    jpeg = b"\xff\xd8\xff"
    data = record_of(example_of({"image": jpeg + b"1", "depth/encoded": jpeg, "label": b"cat", "image/filename": b"x.png"}))
    for field, skipped in ((None, {"feature depth/encoded": 1}), ("image", {})):
        counted = Counter()
        assert [one.data for one in members(TFRECORD, data, field=field, skipped=counted)] == [jpeg + b"1"]
        assert counted == skipped


@pytest.mark.parametrize("name", ["x.array_record-00000-of-00002", "x.riegeli", "x-00000-of-00002"])
def test_array_record_is_named(name):
    begins = b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f" if name.startswith("x-") else bytes(8)
    (only,) = read_members(TFRECORD, io.BytesIO(begins + bytes(56)), ShardOptions(name, None, 9))
    assert only.data.kind is ErrorKind.UNSUPPORTED
    assert "it is an ArrayRecord or Riegeli file" in only.data.message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x-train.tfrecord-00000-of-00005", TFRECORD),
        ("a/x.tfrecord-00001-of-00005.gz", TFRECORD),
        ("train-00000-of-01024", TFRECORD),
        ("coco.record-00000-of-00010", TFRECORD),
        ("a/train.record", TFRECORD),
        ("my_tfrecord-00000-of-00001", TFRECORD),
        ("train00-1338.tfrec", TFRECORD),
        ("x.array_record-00000-of-00002", None),
        ("train-00000-of-00001.parquet", PARQUET),
        ("x-train.parquet-00000-of-00005", PARQUET),
        ("train.ZIP", ZIP),
        ("variables.data-00000-of-00001", None),
        ("model-00001-of-00002.safetensors", None),
    ],
)
def test_the_number_of_a_shard_may_be_the_end_of_its_name(name, kind):
    assert formats(pa.array([name])).to_pylist() == [kind]


def test_endings_tell_what_an_object_is():
    keys = ["a.JPG", "b.tar", "c.tar.gz", "d.parquet", "e.tfrecord", "f.txt", "tar", "g.tgz", "h.jpg.tar", "i.tfrecords.gz"]
    kinds = ["image", "tar", "tar", "parquet", "tfrecord", None, None, "tar", "tar", "tfrecord"]
    assert formats(pa.array(keys)).to_pylist() == kinds
