"""What a person corrects -> rows of a labels file, which several people may write at the same time."""

from __future__ import annotations

import csv
import getpass
import io
import time
from collections.abc import Mapping
from typing import NamedTuple

from tlbatch.errors import LabelsError, LeaseHeldError
from tlbatch.images.labels import ImageName
from tlbatch.storage.location import Location

_COLUMNS = ("uri", "key", "label", "by", "at")
#: How often a write is tried: each time, somebody else was faster.
_ATTEMPTS = 100


class Correction(NamedTuple):
    """The label that a person gave, who it was, and when (UTC)."""

    label: str
    by: str
    at: str


class Corrections:
    """A labels file with the newest correction of each image. `train --labels` and `evaluate --labels` take it.

    Each change replaces the file only if nobody else has changed it since it was read, so that none is lost.

    Args:
        location: the file; it is made by the first correction.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._by = _user()

    def read(self) -> dict[ImageName, Correction]:
        """All corrections, the oldest first.

        Raises:
            LabelsError: the file is not one of corrections.
        """
        return self._parsed(self._bytes())

    def put(self, name: ImageName, label: str | None) -> str | None:
        """Correct an image; None takes the correction back.

        Returns:
            The label of the correction that was there before; None if there was none.

        Raises:
            LabelsError: the file is not one of corrections.
            LeaseHeldError: others are faster all the time.
            OSError: the file cannot be written.
        """
        for _ in range(_ATTEMPTS):
            old = self._bytes()
            rows = self._parsed(old)
            before = rows.pop(name, None)
            if label is not None:
                rows[name] = Correction(label, self._by, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            elif before is None:
                return None
            if self.location.swap(_written(rows), old):
                return before.label if before else None
        raise LeaseHeldError(f"{self.location.url} is changed by others all the time; try again.")

    def _bytes(self) -> bytes | None:
        try:
            return self.location.read()
        except FileNotFoundError:
            return None

    def _parsed(self, data: bytes | None) -> dict[ImageName, Correction]:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline=""))) if data else [list(_COLUMNS)]
        if tuple(rows[0]) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
            raise LabelsError(
                f"{self.location.url} is not a file of corrections, whose columns are {', '.join(_COLUMNS)}; "
                "choose another name with --corrections."
            )
        return {(uri, key): Correction(label, by, at) for uri, key, label, by, at in rows[1:]}


def _written(rows: Mapping[ImageName, Correction]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((*name, *correction) for name, correction in rows.items())
    return buffer.getvalue().encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "somebody"
