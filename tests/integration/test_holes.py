"""A hole in the store is no deletion and no verdict: what is away for a while keeps its rows, or is tried again."""

import os
import shutil
from pathlib import Path

import pytest
from support.pictures import encoded, noisy
from support.shards import tar_of

import tlbatch
from tlbatch.commands.classify import classify
from tlbatch.commands.plan import plan
from tlbatch.config import ReportConfig, RunConfig
from tlbatch.errors import ManyDeletedError
from tlbatch.images.listing import Selection, list_store
from tlbatch.report.run_report import write_report
from tlbatch.storage.resolve import resolve

pytestmark = pytest.mark.sampled(5)


@pytest.fixture
def night(tmp_path, tiny_url, ray_here):
    """Runs one incremental command over `store`; settings may be added."""

    def run(**more):
        settings = {"images": str(tmp_path / "store"), "bundle": tiny_url, "output": str(tmp_path / "out")}
        return tlbatch.classify(**{**settings, "incremental": True, "max_failed_ratio": 1.0, **more})

    return run


def fill(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:03d}.png").write_bytes(encoded(noisy((200, 30, 30), number, (40, 30)), "PNG"))


def rows(tmp_path: Path) -> int:
    return len(tlbatch.read_predictions(str(tmp_path / "out")))


def test_a_lost_mount_stops_the_night_and_the_table_stays(tmp_path, night, tiny_url):
    fill(tmp_path / "store/line1", 4)
    fill(tmp_path / "store/line2", 26, first=10)
    night()
    shutil.move(tmp_path / "store/line2", tmp_path / "elsewhere")
    (tmp_path / "store/line2").mkdir()  # the mount point without the mount
    sentence = r"26 of the table's 30 objects .* max_deleted_ratio=0.1 allows: in line2/ \(26\)\. Nothing was published"
    with pytest.raises(ManyDeletedError, match=sentence) as refused:
        night()
    assert refused.value.exit_code == 4
    assert rows(tmp_path) == 30
    config = RunConfig(
        images=str(tmp_path / "store"), bundle=tiny_url, output=str(tmp_path / "out"), incremental=True, num_gpus=0
    )
    assert "26 of the table's 30 objects" in plan(config)["refused"]
    shutil.rmtree(tmp_path / "store/line2")
    shutil.move(tmp_path / "elsewhere", tmp_path / "store/line2")
    assert night()["already_done"], "it is back as it was"


def test_what_is_meant_to_leave_leaves_and_the_page_says_from_where(tmp_path, night):
    fill(tmp_path / "store/line1", 4)
    fill(tmp_path / "store/line2", 26, first=10)
    night()
    shutil.rmtree(tmp_path / "store/line2")
    report = night(allow_deletes=True)
    assert report["counts"]["deleted"] == 26
    assert report["left"] == {"line2/": 26}
    assert rows(tmp_path) == 4
    page = Path(write_report(ReportConfig(output=str(tmp_path / "out")))["report"]).read_text()
    assert "no longer has them: 26 from line2/." in page


def test_a_few_objects_always_may_leave(tmp_path, night):
    fill(tmp_path / "store", 30)
    night()
    for number in range(20):
        (tmp_path / f"store/{number:03d}.png").unlink()
    report = night()
    assert report["counts"]["deleted"] == 20
    assert rows(tmp_path) == 10


def test_what_was_listed_and_not_found_is_tried_again(tmp_path, night, tiny_url):
    """A part of the store goes away while a night is at work, and is back, unchanged, before the next."""
    fill(tmp_path / "store/a", 3)
    fill(tmp_path / "store/b", 3, first=3)
    config = RunConfig(
        images=str(tmp_path / "store"),
        bundle=tiny_url,
        output=str(tmp_path / "out"),
        incremental=True,
        max_failed_ratio=1.0,
        num_gpus=0,
    )
    listing = list_store(resolve(config.images), Selection())
    shutil.move(tmp_path / "store/b", tmp_path / "away")
    report = classify(config, listing=listing)
    assert (report["predicted"], report["failed_by_kind"]) == (3, {"not_found": 3})
    shutil.move(tmp_path / "away", tmp_path / "store/b")
    report = night()
    assert report["counts"]["retry"] == 3
    assert rows(tmp_path) == 6


def test_what_a_list_names_is_looked_for_until_it_is_there(tmp_path, night):
    """Not by a command that does everything again: a list may name what never existed."""
    fill(tmp_path / "store", 2)
    (tmp_path / "list.txt").write_text("store/000.png\nstore/001.png\nstore/002.png\n")
    images = str(tmp_path / "list.txt")
    assert night(images=images)["failed_by_kind"] == {"not_found": 1}
    assert night(images=images, incremental=False)["already_done"]
    fill(tmp_path / "store", 1, first=2)
    assert night(images=images)["counts"]["retry"] == 1
    assert rows(tmp_path) == 3


def test_a_shard_counts_as_its_images(tmp_path, night):
    for shard in range(4):
        images = {f"{shard}/{number}.png": encoded(noisy((200, 30, 30), number, (40, 30)), "PNG") for number in range(10)}
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / f"store/{shard}.tar").write_bytes(tar_of(images))
    night()
    for shard in (0, 1):
        (tmp_path / f"store/{shard}.tar").unlink()
    assert night()["counts"]["deleted"] == 2, "20 rows may always leave"
    fill(tmp_path / "store", 30)
    night()
    for shard in (2, 3):
        (tmp_path / f"store/{shard}.tar").unlink()
    (tmp_path / "store/000.png").unlink()
    with pytest.raises(ManyDeletedError, match="3 objects with 21 of the table's 50 rows are no longer in the store"):
        night()
    assert rows(tmp_path) == 50


@pytest.mark.parametrize("name", ["line2", "2026.11.27"])
def test_a_folder_that_a_link_no_longer_reaches_is_not_deleted(tmp_path, night, name):
    fill(tmp_path / "store", 3)
    fill(tmp_path / "disk", 15, first=3)
    (tmp_path / "store" / name).symlink_to(tmp_path / "disk")
    night()
    shutil.move(tmp_path / "disk", tmp_path / "elsewhere")
    night(max_failed_ratio=1.0)
    assert rows(tmp_path) == 18
    shutil.move(tmp_path / "elsewhere", tmp_path / "disk")
    night()
    assert rows(tmp_path) == 18


def test_what_a_whole_run_no_longer_has_is_said(tmp_path, night, caplog):
    fill(tmp_path / "store/line1", 4)
    fill(tmp_path / "store/line2", 26, first=10)
    night(incremental=False)
    shutil.rmtree(tmp_path / "store/line2")
    report = night(incremental=False)
    assert (report["left"], rows(tmp_path)) == ({"line2/": 26}, 4)
    assert "26 objects of the table are not in this listing, and leave the table: in line2/ (26)" in caplog.text


def test_files_of_folders_that_exchange_their_names_are_changed(tmp_path, night):
    """Equal in size and in both times: only the inodes tell."""
    fill(tmp_path / "store/a", 1)
    (tmp_path / "store/b").mkdir()
    red, blue = tmp_path / "store/a/000.png", tmp_path / "store/b/000.png"
    blue.write_bytes(red.read_bytes())
    for path in (red, blue):
        os.utime(path, ns=(10**18, 10**18))
    night()
    exchanged = tmp_path / "x"
    (tmp_path / "store/a").rename(exchanged)
    (tmp_path / "store/b").rename(tmp_path / "store/a")
    exchanged.rename(tmp_path / "store/b")
    assert night()["counts"]["changed"] == 2


def test_a_link_that_leads_nowhere_has_a_row_and_is_no_deletion(tmp_path, night):
    fill(tmp_path / "cache", 10)
    (tmp_path / "store").mkdir()
    for path in (tmp_path / "cache").iterdir():
        (tmp_path / "store" / path.name).symlink_to(path)
    night()
    for number in range(7):
        (tmp_path / f"cache/{number:03d}.png").rename(tmp_path / f"{number}")
    report = night()
    assert report["counts"]["deleted"] == 0
    assert report["failed_by_kind"] == {"not_found": 7}
    for number in range(7):
        (tmp_path / f"{number}").rename(tmp_path / f"cache/{number:03d}.png")
    night()
    assert rows(tmp_path) == 10


def test_files_of_one_size_and_time_that_change_places_are_changed(tmp_path, night):
    store = tmp_path / "store"
    store.mkdir()
    for number in range(4):
        path = store / f"{number}.bmp"
        path.write_bytes(encoded(noisy((60 * number, 60, 60), number, (40, 30)), "BMP"))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    night()
    for name, to in (("0", "x"), ("1", "0"), ("x", "1")):
        (store / f"{name}.bmp").rename(store / f"{to}.bmp")
    assert night()["counts"] == {"new": 0, "changed": 2, "retry": 0, "stale": 0, "unchanged": 2, "deleted": 0}
