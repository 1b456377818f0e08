"""One store with everything people leave in stores: each picture has a row, the rest a count, and nothing good is lost."""

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from unittest import mock

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import format_table
from support.command import run_here
from support.hostile import MAX_PIXELS, corpus
from support.pictures import encoded, noisy
from support.shards import example_of, parquet_of, tar_of, tfrecord_of, zip_of

from tlbatch.images.names import IMAGE_SUFFIXES
from tlbatch.schema import from_parquet

GOOD = 200
#: Beside each other in folders, a tar and a zip: what is skipped, by the kind under which it is counted.
LITTER = {
    "@eaDir/good-001.jpg/SYNOPHOTO_THUMB_M.jpg": "@eaDir",
    "#recycle/old.jpg": "recycle bin",
    "$RECYCLE.BIN/S-1-5/$R1.jpg": "recycle bin",
    "RECYCLER/S-1-5/Dc1.jpg": "recycle bin",
    "__MACOSX/good-001.jpg": "__MACOSX",
    "pictures/._good-002.jpg": "._*",
    "pictures/.ipynb_checkpoints/good-003-checkpoint.jpg": ".ipynb_checkpoints",
    "_temporary/0/part-0.jpg": "metadata of a table",
    "pictures/Thumbs.db": "desktop file",
}
OTHERS = {
    "readme.md": ".md",
    "labels.csv": ".csv",
    "pictures/notes.txt": ".txt",
    "model.onnx": ".onnx",
    "annotations.tar.bz2": ".bz2",
    "tables/.hoodie/hoodie.properties": "Hudi table",
    "more.lance/data/0.lance": "Lance data set",
    "streams/chunk-0-0.zstd.bin": "LitData data set",
    "streams/x.array_record-00000-of-00001": "ArrayRecord or Riegeli files",
}
#: What is known only by what is in it, or by the disk.
WITHOUT_IMAGES = {
    "tar without images": 1,
    "zip without images": 1,
    "Parquet without images": 1,
    "broken link": 2,
    "folder that cannot be opened": 1,
}
CLOSED = "closed"


def good(number: int) -> bytes:
    return encoded(noisy((220 - number, 30 + number, 20), number), "JPEG", quality=90)


def tar_with_a_link(images: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO(tar_of(images))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "inside-0.jpg"
        archive.addfile(link)
    return buffer.getvalue()


def shards() -> dict[str, bytes]:
    some = {f"inside-{number}.jpg": good(number) for number in range(3)}
    littered = {**some, **dict.fromkeys(LITTER, b"litter"), "inside-0.json": b"{}"}
    records, table = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table({"data": [example_of({"image": data}) for data in some.values()]}), records)
    pq.write_table(pa.table({"file_name": list(some), "sha256": [b"\x01" * 32] * 3}), table)
    texts = {"Annotations/1.xml": b"<a/>"}
    return {
        "shards/a.tar": tar_with_a_link(littered),
        "shards/b.zip": zip_of(littered),
        "shards/c.parquet": parquet_of(some),
        "shards/x.parquet-00000-of-00001": records.getvalue(),
        "shards/train.tfrecord-00000-of-00001": tfrecord_of(some),
        "shards/joined.tar": tar_of(dict(list(some.items())[:1])) + tar_of(dict(list(some.items())[1:])),
        "shards/torn.tar": tar_of(some)[:-9_000],
        "annotations.tar.gz": gzip.compress(tar_of(texts)),
        "annotations.zip": zip_of(texts),
        "pictures/metadata.parquet": table.getvalue(),
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """`good` has the good images alone; `mixed` has them among everything else."""
    folder = tmp_path_factory.mktemp("reality")
    pictures = {f"pictures/good-{number:03d}.jpg": good(number) for number in range(GOOD)}
    odd = {f"odd/{number:03d}-{one.name}": one.data for number, one in enumerate(corpus())}
    odd = {name: data for name, data in odd.items() if Path(name).suffix.lower() in IMAGE_SUFFIXES}
    forms = {f"forms/{number:02d}.jpg": data for number, (_, data, _) in enumerate(format_table.files())}
    rest = {**{name: good(1) for name in LITTER}, **dict.fromkeys(OTHERS, b"text"), f"{CLOSED}/1.jpg": good(1)}
    for store, files in {"good": pictures, "mixed": {**pictures, **odd, **forms, **shards(), **rest}}.items():
        for name, data in files.items():
            path = folder / store / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    mixed = folder / "mixed"
    for name, target in {"linked.jpg": "pictures/good-000.jpg", "gone.jpg": "x.jpg", "gone": "x", "loop": "."}.items():
        (mixed / name).symlink_to(mixed / target)
    return folder


@pytest.fixture(scope="module")
def ends(stores, tiny_url, ray_here) -> dict[str, tuple[int, dict]]:
    """The exit code and the report of a run over each store, and of a second night over the mixed one."""
    listdir = os.listdir

    def closed(path):
        if os.path.basename(path) == CLOSED:  # also for root, whom no permission keeps out
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    found = {}
    with mock.patch.object(os, "listdir", closed):
        for name in ("good", "mixed", "night"):
            store = "good" if name == "good" else "mixed"
            words = ["classify", "--images", stores / store, "--bundle", tiny_url, "--output", stores / f"out-{store}"]
            done = run_here(*words, "--set", f"max_pixels={MAX_PIXELS}", "--incremental", "--json")
            found[name] = done.returncode, json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def runs(ends) -> dict[str, dict]:
    return {store: report for store, (_, report) in ends.items()}


def rows(stores: Path, runs: dict[str, dict], store: str, table: str) -> pd.DataFrame:
    folder = stores / f"out-{store}" / "runs" / runs[store]["run_id"] / table
    return pd.concat(from_parquet(path.read_bytes()).to_pandas() for path in sorted(folder.glob("*.parquet")))


def test_nothing_good_is_lost_or_changed(stores, runs):
    mixed, alone = (rows(stores, runs, store, "predictions").set_index("key") for store in ("mixed", "good"))
    found = mixed.loc[alone.index]
    assert len(alone) == len(found) == GOOD
    assert (found["score"] == alone["score"]).all()
    assert (found["label"] == alone["label"]).all()


def test_each_picture_has_one_row_and_the_rest_a_count(stores, runs):
    report = runs["mixed"]
    predicted, failed = (rows(stores, runs, "mixed", table) for table in ("predictions", "errors"))
    assert report["listed"] == report["predicted"] + report["failed"] == len(predicted) + len(failed)
    keys = Counter([*predicted["key"], *failed["key"]])
    files = [path.relative_to(stores / "mixed").as_posix() for path in (stores / "mixed").rglob("*") if path.is_file()]
    files = [name for name in files if name not in LITTER and not name.startswith(CLOSED)]
    loose = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    assert [name for name in loose if keys[name] != 1] == []
    assert failed["message"].str.len().min() > 0
    kinds = {"truncated", "decode_failed", "unsupported", "too_large", "not_an_image", "empty"}
    assert set(failed["kind"]) <= {*kinds, "not_found"}
    assert failed.loc[failed["kind"] == "not_found", "key"].tolist() == ["gone.jpg"]


def test_what_is_skipped_is_counted_by_kind_in_folders_and_shards(runs):
    report, litter = runs["mixed"], Counter(LITTER.values())
    assert report["skipped_by_kind"] == litter + Counter(OTHERS.values()) + Counter(WITHOUT_IMAGES)
    assert report["skipped_in_shards"] == litter + litter + Counter({"sidecars": 2, "links": 1})
    assert report["unreadable"] == [f"{CLOSED}/"]


def test_a_run_ends_with_3_once_and_what_is_known_is_no_news(ends):
    assert [code for code, _ in ends.values()] == [0, 3, 0]
    assert ends["night"][1].get("failed_new", 0) == 0
    assert ends["night"][1]["predicted"] == 0


def test_shards_give_their_images_beside_everything_else(stores, runs):
    predicted = rows(stores, runs, "mixed", "predictions")
    for name in shards():
        shard = name.removeprefix("shards/")
        if shard in (name, "torn.tar"):
            continue
        own = predicted[predicted["uri"].str.endswith(f"shards/{shard}")]
        assert own["index"].tolist() == [0, 1, 2], shard
