"""What Ray raises -> one sentence of tlbatch's own."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from tlbatch import errors
from tlbatch.errors import InterruptedRunError, StoreUnavailableError, TlbatchError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def errors_say_how_to_continue(run_id: str) -> Iterator[None]:
    """Ctrl-C, and a store that fails while the block runs, as errors that say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"Run {run_id} was interrupted; run the same command again to continue it.") from None
    except OSError as error:
        raise _stopped(run_id, errors.error_text(error)) from error


@contextlib.contextmanager
def ray_errors_as_sentences(run_id: str) -> Iterator[None]:
    """What Ray raises while the block runs, as an error of tlbatch's own."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise _in_one_sentence(error, run_id) from error


def _in_one_sentence(error: Exception, run_id: str) -> TlbatchError:
    """What a worker died of. Ray gives its last words as text; an error of tlbatch's own is found in it and raised again."""
    said = re.findall(r"tlbatch\.errors\.(\w+): (.+)", str(error))
    if said:
        kind, sentence = said[-1]
        if kind == StoreUnavailableError.__name__:
            return _stopped(run_id, sentence)
        found: TlbatchError = getattr(errors, kind)(sentence)
        return found
    last = str(error).strip().splitlines()[-1].strip()
    return TlbatchError(
        f"Ray ended run {run_id}: {last}. Nothing is published; run the same command again to continue, "
        "with --verbose to see more."
    )


def _stopped(run_id: str, why: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"Run {run_id} stopped: {why}. The table is as it was; once this is mended, run the same command again."
    )
