"""Whether many objects fit on this machine, said before anything starts."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from tlbatch.errors import NoRoomError
from tlbatch.storage import room
from tlbatch.storage.room import memory_left, require_room_to_do, require_room_to_list


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB of memory left, in which a container may have 1 GiB and uses a half of that, a quarter as files."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    for name, text in {
        "memory.max": f"{1 << 30}\n",
        "memory.current": f"{1 << 29}\n",
        "memory.stat": f"anon 1\ninactive_file {1 << 27}\nactive_file {1 << 27}\nfile 1\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(room, "_PROC", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_GROUPS", [(tmp_path, *room._GROUPS[0][1:]), (tmp_path / "none", *room._GROUPS[1][1:])])
    return tmp_path


def test_a_container_has_what_its_limit_leaves(machine):
    assert memory_left() == 3 << 28
    (machine / "memory.max").write_text("max\n")
    assert memory_left() == 8 << 30
    (machine / "meminfo").unlink()
    assert memory_left() is None
    require_room_to_do(10**12)


def test_too_many_objects_for_the_memory_are_a_sentence_with_the_numbers(machine):
    require_room_to_do(5_000_000)
    with pytest.raises(NoRoomError, match=r"A run of 100,000,000 objects takes about 9\.6 GiB .* which has 0\.8 GiB left"):
        require_room_to_do(100_000_000)


def test_too_many_objects_for_the_disk_are_a_sentence_with_the_numbers(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 << 30))
    require_room_to_list(50_000_000)
    with pytest.raises(NoRoomError, match=r"A listing of 100,000,000 objects takes about 18\.6 GiB in .* 10\.0 GiB left\."):
        require_room_to_list(100_000_000)


def test_few_objects_always_fit(machine, monkeypatch):
    (machine / "memory.max").write_text("0\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    require_room_to_do(10_000)
    require_room_to_list(10_000)
