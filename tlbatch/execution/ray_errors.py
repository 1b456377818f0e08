"""Exceptions of Ray -> errors of tlbatch, in one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from tlbatch import errors
from tlbatch.errors import InterruptedRunError, StoreUnavailableError, TlbatchError


@contextlib.contextmanager
def errors_say_how_to_continue(run_id: str) -> Iterator[None]:
    """Turn Ctrl-C, and a store that fails while the block runs, into errors that say how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Run {run_id} was interrupted; run the same command again to continue it.") from None
    except OSError as error:
        raise _stopped(run_id, errors.error_text(error)) from error


@contextlib.contextmanager
def ray_errors_as_sentences(run_id: str) -> Iterator[None]:
    """Turn exceptions of Ray while the block runs into errors of tlbatch."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise _in_one_sentence(error, run_id) from error


def _in_one_sentence(error: Exception, run_id: str) -> TlbatchError:
    """The reason why a worker failed, which Ray gives as text. If the text contains an error of tlbatch, that error."""
    named = re.findall(r"tlbatch\.errors\.(\w+): (.+)", str(error))
    if named:
        kind, sentence = named[-1]
        if kind == StoreUnavailableError.__name__:
            return _stopped(run_id, sentence)
        found: TlbatchError = getattr(errors, kind)(sentence)
        return found
    last = str(error).strip().splitlines()[-1].strip()
    return TlbatchError(
        f"Ray ended run {run_id}: {last}. Nothing is published. Run the same command again to continue, "
        "with --verbose for details."
    )


def _stopped(run_id: str, why: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Run {run_id} stopped: {why}. Nothing more is published. Solve the problem, then run the same command again."
    )
