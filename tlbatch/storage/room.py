"""How much memory and disk this machine has left, and whether many objects fit: one sentence before anything starts."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from tlbatch.errors import NoRoomError
from tlbatch.storage.temporary_rows import ROWS_IN_MEMORY, folder_of_temporary_files

#: Bytes on the disk for an object that is listed, and in memory for one that is to be done (docs/scale.md).
_BYTES_LISTED, _BYTES_TO_DO = 200, 100
#: Bytes that a process needs whatever it does.
_BYTES_ALWAYS = 256 << 20
_GIB = 1 << 30

_PROC = Path("/proc/meminfo")
#: A container's limit, what it uses, and what of this the kernel drops when memory is short; versions 2 and 1 of the groups.
_GROUPS = [
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", r"^(?:in)?active_file (\d+)$"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)$"),
]


def require_room_to_list(objects: int) -> None:
    """Raises NoRoomError if the listing of so many objects does not fit into the folder of temporary files."""
    folder = folder_of_temporary_files()
    free, needed = shutil.disk_usage(folder).free, objects * _BYTES_LISTED
    if objects > ROWS_IN_MEMORY and free < needed:
        raise NoRoomError(
            f"A listing of {objects:,} objects takes about {needed / _GIB:.1f} GiB in {folder}, which has {free / _GIB:.1f} "
            "GiB left. Make room, or set TMPDIR to a folder on a larger disk."
        )


def require_room_to_do(objects: int) -> None:
    """Raises NoRoomError if this machine's memory is too small for the work on so many objects."""
    left, needed = memory_left(), objects * _BYTES_TO_DO + _BYTES_ALWAYS
    if objects > ROWS_IN_MEMORY and left is not None and left < needed:
        raise NoRoomError(
            f"A run of {objects:,} objects takes about {needed / _GIB:.1f} GiB of memory on the machine of the driver, which "
            f"has {left / _GIB:.1f} GiB left. Use a larger machine, or divide the store into several runs by --include."
        )


def memory_left() -> int | None:
    """Bytes of memory that processes of this machine, or of this container, can still get; None if nothing says so."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        found += [int(kib) << 10 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB$", _PROC.read_text(), re.MULTILINE)]
    for group, limit, used, dropped in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
            files = sum(map(int, re.findall(dropped, (group / "memory.stat").read_text(), re.MULTILINE)))
            found.append(int((group / limit).read_text()) - int((group / used).read_text()) + files)
    return max(0, min(found)) if found else None
