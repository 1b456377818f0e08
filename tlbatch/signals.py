"""SIGTERM and Ctrl-C -> `KeyboardInterrupt` in the main thread, once, and only where it can be answered with a sentence.

Ray sets a handler of its own for SIGTERM when it starts, and its C++ code another one, which ends the process with a dump. The
command therefore blocks both signals in all its threads, and one thread waits for them. In a notebook nothing is taken, and
nothing here has an effect.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_EXIT_CODE = 4
#: Signals after which the process ends at once, whatever it is cleaning up.
_PATIENCE = 3
#: Seconds for which a block may hold a signal back: Ray can take a minute to reach a cluster that does not answer.
_SECONDS = 15.0
#: What the waiting thread sends to the main thread.
_WAKE = signal.SIGUSR2


class _State:
    """Whether the signals are taken, how many came, and whether the main thread can be interrupted."""

    def __init__(self) -> None:
        self.taken = False
        self.came = 0
        self.busy = 1
        self.raised = False
        self.over = False
        self.last_words: Callable[[], None] | None = None


_state = _State()


def take() -> None:
    """Take over SIGTERM and SIGINT of this process. Until `ready` they are only noted. An ignored signal stays ignored."""
    if _state.taken or threading.current_thread() is not threading.main_thread():
        return
    _state.taken = True
    numbers = {one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN}
    signal.signal(_WAKE, lambda *_: _raise_if_due())
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    os.register_at_fork(after_in_child=lambda: _begin_child(numbers))
    sys.unraisablehook = _raise_again(sys.unraisablehook)
    threading.Thread(target=_wait, args=(numbers,), name="tlbatch-signals", daemon=True).start()


def _begin_child(numbers: set[signal.Signals]) -> None:
    """What Ray's processes begin with, because Ray starts each with a function that runs in the child.

    Each has a group of its own: `timeout` and a shell send a signal to the whole group of a command, and a command whose Ray
    has ended before it ends with exit code 1 and no word, or waits for an answer. They end with the command nevertheless.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    with contextlib.suppress(OSError):  # it leads a session
        os.setpgid(0, 0)


def ready() -> None:
    """From now on a signal raises KeyboardInterrupt in the main thread; so does one that came before, now."""
    if _state.taken:
        _state.busy = 0
        _raise_if_due()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A block that is not interrupted: KeyboardInterrupt is raised behind it. For what cannot be ended half way."""
    _state.busy += 1
    try:
        yield
    finally:
        _state.busy -= 1
    if _state.taken and threading.current_thread() is threading.main_thread():
        _raise_if_due()


def finished() -> None:
    """The outcome of the command is certain: signals no longer change it."""
    _state.over = True


def came() -> bool:
    """Whether the command was told to end before its outcome was certain."""
    return _state.raised


def before_a_forced_end(say: Callable[[], None]) -> None:
    """Set what is called when the process ends at once, without an exception."""
    _state.last_words = say


def interrupt_main() -> None:
    """Interrupt the main thread with a signal that this process handles: a background process may ignore SIGINT."""
    if _state.taken:
        _state.came += 1
        _wake()
        return
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    if handled:
        signal.pthread_kill(threading.main_thread().ident or 0, handled[0])


def _wait(numbers: set[signal.Signals]) -> None:
    while True:
        signal.sigwait(numbers)
        if _state.over:
            continue
        _state.came += 1
        if _state.came > _PATIENCE:
            _end_at_once()
        _later(_SECONDS, _end_if_held)
        _wake()


def _later(seconds: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def _end_if_held() -> None:
    if not (_state.raised or _state.over):
        _end_at_once()


def _end_at_once() -> None:
    with contextlib.suppress(OSError):  # not to descriptor 2, which is captured while Ray starts
        os.write(sys.stderr.fileno(), b"tlbatch: interrupted; run the same command again.\n")
    if _state.last_words is not None:
        _state.last_words()
    os._exit(_EXIT_CODE)


def _wake() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)


def _raise_if_due() -> None:
    if _state.came and not (_state.busy or _state.raised or _state.over):
        _state.raised = True
        raise KeyboardInterrupt


def _raise_again(before: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], object]:
    """A hook for exceptions that Python drops, for instance in a destructor: the interruption is raised once more."""

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is KeyboardInterrupt and not _state.over:
            _state.raised = False
            _later(0.05, _wake)  # not in here, where it would be dropped again
        else:
            before(dropped)

    return hook
