"""What a name says: which objects are litter, under which kind, and that both ways to ask agree."""

import pyarrow as pa
import pytest

from tlbatch.images import names

LITTER = {
    "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg": "@eaDir",
    "#recycle/old.jpg": "recycle bin",
    "$RECYCLE.BIN/S-1-5-21-1/$RA1B2C3.jpg": "recycle bin",
    "$Recycle.Bin/x.jpg": "recycle bin",
    "a/@Recycle/x.jpg": "recycle bin",
    "RECYCLER/S-1-5-21-1/Dc1.jpg": "recycle bin",
    "a/_vti_cnf/1.jpg": "_vti_cnf",
    "a/PaxHeaders.4711/1.jpg": "PaxHeaders",
    "PaxHeader/1.jpg": "PaxHeaders",
    "@tmp/1.jpg": "@tmp",
    "a/#snapshot/GMT-2026.11.27/x.jpg": "snapshot",
    "__MACOSX/cat/._1.jpg": "._*",
    "__MACOSX/cat/1.jpg": "__MACOSX",
    "./cat/._1.jpg": "._*",
    "cat/.ipynb_checkpoints/1-checkpoint.jpg": ".ipynb_checkpoints",
    ".@__thumb/s8001.jpg": "hidden",
    ".Trash-1000/files/1.jpg": "hidden",
    "a/..x.jpg": "hidden",
    "a/.DS_Store": "hidden",
    "Thumbs.db": "desktop file",
    "a/ehthumbs.db": "desktop file",
    "a/desktop.ini": "desktop file",
    "a/Icon\r": "desktop file",
    "System Volume Information/x.jpg": "System Volume Information",
    "lost+found/#131/x.jpg": "lost+found",
    "t/_temporary/0/task/part-0.parquet": "metadata of a table",
    "t/_delta_log/00000000000000000010.checkpoint.parquet": "metadata of a table",
    "t/_metadata": "metadata of a table",
    "out/runs/20261122T211455Z-bec8e5/predictions/part-00000.parquet": "output of tlbatch",
}
NO_LITTER = [
    "cat/1.jpg",
    "./cat/1.jpg",
    "../cat/1.jpg",
    "a/.../x.jpg"[:2] + "x.jpg",
    "recycled/1.jpg",  # a class of waste
    "recycler/1.jpg",
    "paxheaders.jpg",
    "tmp/1.jpg",
    "eaDir/1.jpg",
    "a@eaDir/1.jpg",
    "lost+found.jpg",
    "Thumbs.db.jpg",
    "_metadata.parquet",
    "runs/2026/1.jpg",
    "a b/$RA1B2C3.jpg",
    "#1.jpg",
    "a\n.jpg",
    "a..jpg",
]


@pytest.mark.parametrize("key", [*LITTER, *NO_LITTER])
def test_litter_is_known_by_its_name(key):
    assert names.litter_kind(key) == LITTER.get(key)
    assert names.is_litter(key) == (key in LITTER)


def test_columns_and_single_names_agree():
    keys = [*LITTER, *NO_LITTER]
    assert names.litter(pa.array(keys)).to_pylist() == [names.litter_kind(key) for key in keys]
    assert names.litter(pa.array([], pa.string())).to_pylist() == []


def test_whatever_looks_like_a_picture_is_one():
    endings = [".jpg", ".MPO", ".qoi", ".dds", ".hdr", ".jxr", ".pam", ".pfm", ".fits", ".eps", ".wmf", ".pef", ".srw", ".nrw"]
    keys = [f"a/x{ending}" for ending in (*endings, ".avifs", ".heics", ".tga", ".exr")]
    assert set(names.formats(pa.array(keys)).to_pylist()) == {"image"}
