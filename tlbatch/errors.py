"""All exceptions of tlbatch in one tree, and the closed set of reasons why a single image can fail.

    TlbatchError                    exit code 1: nothing was published
    ├── UsageError                  exit code 2: a mistake by the user; one sentence, nothing written
    │   ├── ConfigError             an unknown key, or a value out of range
    │   ├── StoreError              images that do not exist, or a store without images
    │   ├── LabelsError             a labels file that does not fit its images
    │   ├── WeightsError            weights that do not fit their base, or are not available
    │   ├── BundleError             a folder that is not a bundle, or whose files do not match its digests
    │   ├── OutputError             an output folder that belongs to something else
    │   └── ClusterError            a cluster that does not take the job, or that accepts jobs from anyone
    ├── CountsError                 a run whose counts do not reconcile; `BooksError` is an alias
    ├── NotPromotedError            a run that fails its `promote_if` condition; it is kept, and the table is unchanged
    └── UnfinishedError             exit code 4: run the same command again to continue
        ├── InterruptedRunError     Ctrl-C or SIGTERM
        ├── NoRoomError             this machine has too little memory, or too little room for temporary files
        ├── ManyDeletedError        too much of the table has left the store, which may be a part that is away
        ├── LeaseHeldError          another run is writing to this output
        └── StoreUnavailableError   the store itself is failing, not its images

A failed image does not raise an exception. Its row carries a `Failure` value instead. A storage error is one of Python's own
`OSError` classes, or one of the six subclasses defined here for cases that Python does not distinguish.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import textwrap
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

#: Most characters of a line that is quoted.
_MOST_TEXT = 300


class TlbatchError(Exception):
    """An error that tlbatch reports in one sentence instead of a traceback."""

    exit_code = 1


class UsageError(TlbatchError):
    """A mistake in the command or its input, found before anything is written."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value that cannot be used."""


class StoreError(UsageError):
    """The images do not exist, cannot be read, or there are none."""


class LabelsError(UsageError):
    """The labels file, or the class folders, cannot be used for training."""


class WeightsError(UsageError):
    """The weights are not available, or belong to another network."""


class BundleError(UsageError):
    """The folder is not a bundle, or its files do not match the recorded digests."""


class OutputError(UsageError):
    """The output folder cannot be used for this run."""


class ClusterError(UsageError):
    """The cluster cannot run the job, or is not safe to send it to."""


class CountsError(TlbatchError):
    """The counts of listed, predicted and failed images do not reconcile; nothing is published."""


#: Alias of `CountsError`, kept for callers of earlier versions.
BooksError = CountsError


class NotPromotedError(TlbatchError):
    """A run is complete but not published, because its `promote_if` condition does not hold."""


class UnfinishedError(TlbatchError):
    """The run stopped early; the same command continues it."""

    exit_code = 4


class InterruptedRunError(UnfinishedError):
    """Ctrl-C or SIGTERM stopped the run."""


class NoRoomError(UnfinishedError):
    """This machine has too little memory, or too little room for temporary files."""


class ManyDeletedError(UnfinishedError):
    """More of the table has left the store than may: a part of the store may only be away."""


class LeaseHeldError(UnfinishedError):
    """Another run holds the lease of this output."""


class StoreUnavailableError(UnfinishedError):
    """The store itself is failing, not its images."""


class ThrottledError(OSError):
    """The store throttles requests."""


class RefusedError(OSError):
    """The store does not support this request; a retry would not help."""


class NoRangesError(RefusedError):
    """The store sends whole objects only."""


class ChangedError(OSError):
    """An object is not the requested version."""


class ArchivedError(PermissionError):
    """The store keeps an object in an archive, from which it must be restored before it can be read."""


class CredentialsError(PermissionError):
    """Credentials are missing, wrong or expired."""


@contextlib.contextmanager
def store_errors_end_the_run() -> Iterator[None]:
    """In a worker, turn an OSError that was not recorded as an image's failure into StoreUnavailableError.

    StoreUnavailableError stops the run, and the same command continues it.
    """
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(error_text(error)) from error


def line_of(error: BaseException, number: int = 0) -> str:
    """One line of what an error of another library says, without its full stop; the name of its class if it says nothing.

    Args:
        error: the error.
        number: which line: 0 for the first, -1 for the last.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[number], _MOST_TEXT, placeholder=" …").rstrip(".")


def error_text(error: OSError) -> str:
    """The folder and the reason of a system or storage error, without error numbers and names of temporary files."""
    if error.strerror is None:
        return str(error)
    where = f"{os.path.dirname(error.filename)}: " if isinstance(error.filename, str) else ""
    return f"{where}{error.strerror}"


class ErrorKind(StrEnum):
    """Why one image could not be classified."""

    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    THROTTLED = "throttled"
    TIMEOUT = "timeout"
    READ_FAILED = "read_failed"
    CHANGED = "changed"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    DECODE_FAILED = "decode_failed"
    PREDICT_FAILED = "predict_failed"
    WORKER_LOST = "worker_lost"
    ARCHIVED = "archived"

    @property
    def advice(self) -> str:
        """What happened and what a user can do about it."""
        return _ADVICE[self]


_ADVICE = {
    ErrorKind.NOT_FOUND: "These files were listed, but were not there when they were read. The next run looks for them again.",
    ErrorKind.ACCESS_DENIED: "The store denied access. Let this role read these files, and run the same command again.",
    ErrorKind.THROTTLED: "The store throttled requests for a whole minute. Run the same command again later.",
    ErrorKind.TIMEOUT: "The store did not answer in time. Run the same command again.",
    ErrorKind.READ_FAILED: "These files could not be read completely. Run the same command again.",
    ErrorKind.CHANGED: "These files were replaced during the run. Run the same command again.",
    ErrorKind.EMPTY: "These files are empty. Upload them again, or skip them with --exclude.",
    ErrorKind.NOT_AN_IMAGE: "These files are not images, despite their names. Skip them with --exclude.",
    ErrorKind.TRUNCATED: "These files are truncated. Upload them again.",
    ErrorKind.UNSUPPORTED: "tlbatch does not support this format. Convert these files to JPEG, PNG or WebP.",
    ErrorKind.TOO_LARGE: "These files exceed a size limit. If you trust the source, raise max_pixels, max_side or max_bytes.",
    ErrorKind.DECODE_FAILED: "These files are damaged. Upload them again.",
    ErrorKind.PREDICT_FAILED: "The model returned non-finite values. Inspect one of these images and the bundle's probes.",
    ErrorKind.ARCHIVED: "The store keeps these files in an archive. Restore them first; the next run then classifies them.",
    ErrorKind.WORKER_LOST: "These files kill or hang the process that reads them. Inspect one on a spare machine.",
}

#: Kinds whose cause may be gone by the next run. The other kinds need another image or a person's intervention.
TRANSIENT_KINDS = frozenset(
    {
        ErrorKind.ACCESS_DENIED,
        ErrorKind.THROTTLED,
        ErrorKind.TIMEOUT,
        ErrorKind.READ_FAILED,
        ErrorKind.CHANGED,
    }
)


class Failure(NamedTuple):
    """Why one image failed.

    `stage` is read, decode or predict. `attempts` is the number of reads before the failure was certain.
    """

    stage: str
    kind: ErrorKind
    message: str
    attempts: int = 1

    @property
    def transient(self) -> bool:
        """Whether the next run should try this image again."""
        return self.kind in TRANSIENT_KINDS


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a message about a misspelled word: `; did you mean 'x'?` with the closest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
