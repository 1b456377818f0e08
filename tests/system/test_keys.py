"""Names that strangers choose come back as they are, from loose objects and from shards, and nothing is written by them."""

import os
from pathlib import Path

import pytest
import s3fs
from support.command import run_cli
from support.pictures import COLORS, encoded, noisy
from support.s3_server import environment
from support.shards import parquet_of, tar_of, tfrecord_of

import tlbatch
from tlbatch.config import ReportConfig
from tlbatch.errors import StoreError
from tlbatch.images.listing import Selection, list_store
from tlbatch.images.reader import Reader
from tlbatch.report.run_report import write_report as report_page
from tlbatch.storage.resolve import resolve

#: Names of objects and members. Whoever takes one for a path would leave the folder, or lose some of it.
ODD = {
    "above": "a/../tlbatch-was-here.jpg",
    "here": "a/./b/./c.jpg",
    "empty parts": "a//b///c.jpg",
    "absolute": "/dev/null/tlbatch-was-here.jpg",
    "newlines": "a\nb\r\nc.jpg",
    "controls": "a\x01\t\x1b[31mb\x7f.jpg",
    "escapes": "%2e%2e%2fa%00+ %.jpg",
    "longest": ("k" * 199 + "/") * 5 + "k" * 15 + ".jpg",
    "turned": "a\u202egpj.exe.jpg",
    "no characters": "a\ufffe\U0010ffff.jpg",
    "markup": "<b>bold</b>.jpg",
    "shell": "$(true) `true`; true > tlbatch-was-here *.jpg",
    "windows": "C:\\..\\con.jpg",
}
NUL = "a\0b.jpg"
assert len(f"deep/{ODD['longest']}") == 1024


def picture(number: int) -> bytes:
    return encoded(noisy(COLORS["red"], number))


@pytest.fixture
def bucket(moto, monkeypatch):
    """A bucket with an object of each odd name, moto's server being unable to take one with a line's end."""
    import botocore.session

    for name, value in environment(moto).items():
        monkeypatch.setenv(name, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="keys")
    keys = sorted(f"deep/{key}" for key in [*ODD.values(), NUL] if "\n" not in key)
    for number, key in enumerate(keys):
        client.put_object(Bucket="keys", Key=key, Body=picture(number))
    yield keys
    for key in keys:
        client.delete_object(Bucket="keys", Key=key)
    client.delete_bucket(Bucket="keys")


def test_objects_of_a_bucket(bucket):
    listing = list_store(resolve("s3://keys"), Selection())
    assert sorted(listing.manifest["key"].to_pylist()) == bucket
    reader = Reader({})
    for row in listing.manifest.to_pylist():
        assert reader.image(row) == picture(bucket.index(row["key"])), row["key"]


def shards(folder: Path, names: list[str]) -> None:
    """The same pictures under the same names in each kind of shard; a tar cannot hold a name with a NUL."""
    content = {name: picture(number) for number, name in enumerate(names)}
    folder.mkdir()
    of_tar = {name: data for name, data in content.items() if "\0" not in name}
    (folder / "a.tar").write_bytes(tar_of({**of_tar, "caf\udce9.jpg": content[NUL]}))  # a byte that is no UTF-8
    (folder / "b.parquet").write_bytes(parquet_of(content))
    (folder / "c.tfrecord").write_bytes(tfrecord_of(content))


def outside() -> list[str]:
    """Files that a name could have led to."""
    return [name for name in ("tlbatch-was-here.jpg", "tlbatch-was-here") if Path(name).exists()]


def test_a_run_over_members_and_objects(bucket, bundle_url, ray_here, tmp_path):
    """Every name stands in the table to the letter, and the only files are those of an output."""
    names = [*ODD.values(), NUL]
    shards(tmp_path / "shards", names)
    output = tmp_path / "out"
    report = tlbatch.classify(images=str(tmp_path / "shards"), bundle=bundle_url, output=str(output))
    assert report["failed"] == 0
    keys = tlbatch.read_predictions(str(output))["key"].tolist()
    assert sorted(keys) == sorted([*ODD.values(), "caf\\xe9.jpg", *names, *names])
    assert tlbatch.verify(str(output))["ok"]
    report_page(ReportConfig(output=str(output)))
    done = run_cli("classify", "--images", "s3://keys", "--bundle", bundle_url, "--output", tmp_path / "out-s3")
    assert done.returncode == 0, done.stderr
    assert tlbatch.read_predictions(str(tmp_path / "out-s3"))["key"].tolist() == bucket
    report_page(ReportConfig(output=str(tmp_path / "out-s3")))
    assert outside() == []
    written = {path.name.split("-")[0].split(".")[0] for path in output.rglob("*") if path.is_file()}
    assert written <= {"latest", "lease", "run", "manifest", "progress", "report", "_SUCCESS", "part"}


def test_a_run_over_files_of_a_disk(bundle_url, ray_here, tmp_path):
    """What a disk allows: any byte but `/` and NUL. A name that is not valid UTF-8 is skipped and counted."""
    kept = [name for name in ODD.values() if not {"", ".", ".."} & set(name.split("/"))]
    for number, name in enumerate(kept):
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    (tmp_path / "store" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(picture(0))
    report = tlbatch.classify(images=str(tmp_path / "store"), bundle=bundle_url, output=str(tmp_path / "out"))
    assert (report["predicted"], report["failed"], report["skipped"]) == (len(kept), 0, 1)
    assert sorted(tlbatch.read_predictions(str(tmp_path / "out"))["key"]) == sorted(kept)
    assert outside() == []


@pytest.fixture
def fs(moto, monkeypatch):
    """A bucket `holes` on a server on which an object and a folder may have one name."""
    for name, value in environment(moto).items():
        monkeypatch.setenv(name, value)
    found = s3fs.S3FileSystem(skip_instance_cache=True)
    found.mkdir("holes")
    return found


def test_an_object_with_the_name_of_a_folder(fs):
    fs.pipe({"holes/img/a.png": picture(0), "holes/img/b.png": picture(1)})
    store = resolve("s3://holes/img")
    whole = list_store(store, Selection()).manifest["key"].to_pylist()
    fs.pipe("holes/img", b"")  # as programs write that make "folders"
    assert list_store(store, Selection()).manifest["key"].to_pylist() == whole == ["a.png", "b.png"]
    fs.pipe("holes/img", picture(2))
    with pytest.raises(StoreError, match=r"holes/img is an object of .* and s3://holes/img/ is a folder"):
        list_store(store, Selection())
    assert list_store(store, Selection(), folder=True).manifest["key"].to_pylist() == whole
    assert list_store(resolve("s3://holes/img/a.png"), Selection()).manifest["key"].to_pylist() == ["a.png"]
