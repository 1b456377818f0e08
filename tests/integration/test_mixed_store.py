"""One store with everything people leave in stores: each picture has a row, the rest a count, and nothing good is lost."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from support import format_table
from support.hostile import MAX_PIXELS, corpus
from support.pictures import encoded, noisy
from support.shards import parquet_of, tar_of, tfrecord_of, zip_of

import tlbatch
from tlbatch.images.names import IMAGE_SUFFIXES
from tlbatch.schema import from_parquet

GOOD = 200
#: Beside each other in folders, a tar and a zip: what is passed over, by the kind under which it is counted.
LITTER = {
    "@eaDir/good-001.jpg/SYNOPHOTO_THUMB_M.jpg": "@eaDir",
    "#recycle/old.jpg": "recycle bin",
    "$RECYCLE.BIN/S-1-5/$R1.jpg": "recycle bin",
    "__MACOSX/good-001.jpg": "__MACOSX",
    "pictures/._good-002.jpg": "._*",
    "pictures/.ipynb_checkpoints/good-003-checkpoint.jpg": ".ipynb_checkpoints",
    "_temporary/0/part-0.jpg": "metadata of a table",
    "pictures/Thumbs.db": "desktop file",
}
OTHERS = {"readme.md": ".md", "labels.csv": ".csv", "pictures/notes.txt": ".txt", "model.onnx": ".onnx"}


def good(number: int) -> bytes:
    return encoded(noisy((220 - number, 30 + number, 20), number), "JPEG", quality=90)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """`good` has the good images alone; `mixed` has them among everything else."""
    folder = tmp_path_factory.mktemp("reality")
    pictures = {f"pictures/good-{number:03d}.jpg": good(number) for number in range(GOOD)}
    odd = {f"odd/{number:03d}-{one.name}": one.data for number, one in enumerate(corpus())}
    odd = {name: data for name, data in odd.items() if Path(name).suffix.lower() in IMAGE_SUFFIXES}
    forms = {f"forms/{number:02d}.jpg": data for number, (_, data, _) in enumerate(format_table.files())}
    some = {f"inside-{number}.jpg": good(number) for number in range(3)}
    littered = {**some, **dict.fromkeys(LITTER, b"litter"), "inside-0.json": b"{}"}
    shards = {
        "shards/a.tar": tar_of(littered),
        "shards/b.zip": zip_of(littered),
        "shards/c.parquet": parquet_of(some),
        "shards/train.tfrecord-00000-of-00001": tfrecord_of(some),
        "shards/torn.tar": tar_of(some)[:-9_000],
    }
    rest = {**{name: good(1) for name in LITTER}, **dict.fromkeys(OTHERS, b"text")}
    for store, files in {"good": pictures, "mixed": {**pictures, **odd, **forms, **shards, **rest}}.items():
        for name, data in files.items():
            path = folder / store / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def runs(stores, tiny_url, ray_here) -> dict[str, dict]:
    settings = {"bundle": tiny_url, "max_failed_ratio": 1.0, "max_pixels": MAX_PIXELS}
    return {
        store: tlbatch.classify(images=str(stores / store), output=str(stores / f"out-{store}"), **settings)
        for store in ("good", "mixed")
    }


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
    loose = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES and name not in LITTER]
    assert [name for name in loose if keys[name] != 1] == []
    assert failed["message"].str.len().min() > 0
    assert set(failed["kind"]) <= {"truncated", "decode_failed", "unsupported", "too_large", "not_an_image", "empty"}


def test_what_is_skipped_is_counted_by_kind_in_folders_and_shards(runs):
    report, litter = runs["mixed"], Counter(LITTER.values())
    assert report["skipped_by_kind"] == litter + Counter(OTHERS.values())
    assert report["skipped_in_shards"] == litter + litter + Counter({"sidecars": 2})


def test_shards_give_their_images_beside_everything_else(stores, runs):
    predicted = rows(stores, runs, "mixed", "predictions")
    for shard in ("a.tar", "b.zip", "c.parquet", "train.tfrecord-00000-of-00001"):
        own = predicted[predicted["uri"].str.endswith(f"shards/{shard}")]
        assert own["index"].tolist() == [0, 1, 2], shard
