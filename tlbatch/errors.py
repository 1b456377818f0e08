"""The one exception tree, and the closed set of reasons for which a single image can fail.

    TlbatchError                    exit code 1: nothing was published
    ├── UsageError                  exit code 2: a person's mistake; one sentence, nothing written
    │   ├── ConfigError             an unknown key, a value out of range
    │   ├── StoreError              images that do not exist, or a store without one image
    │   ├── LabelsError             a labels file that does not fit its images
    │   ├── WeightsError            weights that do not fit their base, or cannot be had
    │   ├── BundleError             a folder that is no bundle, or not the one it says it is
    │   ├── OutputError             an output folder that belongs to something else
    │   └── ClusterError            a cluster that cannot be reached, or lets in everybody
    ├── BooksError                  a run whose rows do not add up
    ├── NotPromotedError            a run that is not what `promote_if` asks for; it is kept, the table is as it was
    └── UnfinishedError             exit code 4: run the same command again to continue
        ├── InterruptedRunError     Ctrl-C or SIGTERM
        ├── LeaseHeldError          another run is at work on this output
        └── StoreUnavailableError   the store itself is failing, not its images

An image that fails is no exception: it is a `Failure`, a value that travels in its row. What a store answers is an `OSError`
of Python's own, or one of the four here for which Python has no word.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple


class TlbatchError(Exception):
    """Anything tlbatch says in one sentence instead of a traceback."""

    exit_code = 1


class UsageError(TlbatchError):
    """A mistake in what was asked for; found before anything is written."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value that cannot be used."""


class StoreError(UsageError):
    """The images cannot be found, or there are none."""


class LabelsError(UsageError):
    """The labels file, or the class folders, cannot be trained on."""


class WeightsError(UsageError):
    """The weights cannot be had, or belong to another network."""


class BundleError(UsageError):
    """Not a bundle, or one whose files are not those it was made of."""


class OutputError(UsageError):
    """The output folder cannot take this run."""


class ClusterError(UsageError):
    """The cluster cannot take the job, or should not be given it."""


class CountsError(TlbatchError):
    """Listed, predicted and failed images do not add up; nothing is published."""


class NotPromotedError(TlbatchError):
    """A run is complete and is not published, because a condition does not hold."""


class UnfinishedError(TlbatchError):
    """The run stopped early and can be continued by the same command."""

    exit_code = 4


class InterruptedRunError(UnfinishedError):
    """A person or the system asked the run to stop."""


class LeaseHeldError(UnfinishedError):
    """Another run holds this output."""


class StoreUnavailableError(UnfinishedError):
    """The store does not answer; its images are not to blame."""


class ThrottledError(OSError):
    """The store asks for fewer requests."""


class RefusedError(OSError):
    """The store will not do this, however often it is asked."""


class ChangedError(OSError):
    """An object is not the version that was asked for."""


class CredentialsError(PermissionError):
    """The store does not know who is asking: credentials are missing, wrong or expired."""


@contextlib.contextmanager
def store_errors_end_the_run() -> Iterator[None]:
    """In a worker: an OSError that nobody made an image's failure of stops the run, to be continued."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(error_text(error)) from error


def error_text(error: OSError) -> str:
    """What the system or a store said: the folder and the reason, without numbers and the names of temporary files."""
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

    @property
    def advice(self) -> str:
        """What a person can do about it, in one sentence."""
        return _ADVICE[self]


_ADVICE = {
    ErrorKind.NOT_FOUND: "They were listed and are gone; the next listing will not have them.",
    ErrorKind.ACCESS_DENIED: "The store would not give them to this role: let it read them, and run the same command again.",
    ErrorKind.THROTTLED: "The store asked for fewer requests for a whole minute: run the same command again later.",
    ErrorKind.TIMEOUT: "The store did not answer in time: run the same command again.",
    ErrorKind.READ_FAILED: "They could not be read to the end: run the same command again.",
    ErrorKind.CHANGED: "They were replaced while the run was at work: run the same command again.",
    ErrorKind.EMPTY: "There is nothing in them: upload them again, or leave them out with --exclude.",
    ErrorKind.NOT_AN_IMAGE: "They hold something else than their name says: leave them out with --exclude.",
    ErrorKind.TRUNCATED: "They end before their end: upload them again.",
    ErrorKind.UNSUPPORTED: "This format is not decoded: convert them to JPEG, PNG or WebP.",
    ErrorKind.TOO_LARGE: "They are larger than a run allows; if you trust the source, raise max_pixels, max_side or max_bytes.",
    ErrorKind.DECODE_FAILED: "They are damaged: upload them again.",
    ErrorKind.PREDICT_FAILED: "The model gave no finite numbers for them: look at one, and at the bundle's probes.",
    ErrorKind.WORKER_LOST: "They end the process that reads them: look at one on a machine you can spare.",
}

#: Kinds whose cause may be gone by the next run; the others need another image, or another person.
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
    """Why one image failed: `stage` is read, decode or predict; `attempts` counts the reads it took to be sure."""

    stage: str
    kind: ErrorKind
    message: str
    attempts: int = 1

    @property
    def transient(self) -> bool:
        """Whether the next run should try this image again."""
        return self.kind in TRANSIENT_KINDS


def closest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or nothing: the end of a sentence about a misspelt word."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
