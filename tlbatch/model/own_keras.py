"""Keras as tlbatch needs it, whatever this process, its environment or `~/.keras/keras.json` set up for other work.

Keras takes its backend when it is imported. Its float type and the order of its axes belong to the process, its dtype policy
and the counters of its layer names to the thread. So what tlbatch does with Keras runs in a thread of its own, with the first
two set before and put back afterwards. `clear_session`, which would undo the settings of every thread, is never called.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tlbatch.errors import ConfigError
from tlbatch.stdio import import_quietly

P = ParamSpec("P")
T = TypeVar("T")


def import_keras(backend: str | None = None) -> Any:
    """Keras on a backend; without one, on the one that an engine chose before, or else on TensorFlow.

    Raises:
        ConfigError: this process has imported Keras on another backend.
    """
    wanted = backend or "tensorflow"
    if "keras" not in sys.modules:
        with _environment("KERAS_BACKEND", wanted):  # it comes before keras.json
            import_quietly("keras")
    keras = import_quietly("keras")
    found = keras.config.backend()
    if backend == found:
        _chosen.add(found)
    elif found != wanted and found not in _chosen:
        raise ConfigError(
            f"Keras already runs on {found} in this process, and tlbatch needs {wanted}: run tlbatch in a process of its own, "
            f"or set KERAS_BACKEND={wanted} before Keras is imported."
        )
    return keras


#: Backends that an engine has chosen.
_chosen: set[str] = set()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def with_own_keras(function: Callable[P, T]) -> Callable[P, T]:
    """A function that always works with Keras's usual settings: float32, channels last, no dtype policy, new layer names.

    Raises:
        ConfigError: this process has imported Keras on a backend for which tlbatch is not made.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _usual_settings(), ThreadPoolExecutor(1, thread_name_prefix="tlbatch-keras") as thread:
            return thread.submit(function, *args, **kwargs).result()

    return run


_settings_lock = threading.RLock()
_users = 0
_before: tuple[str, str] = ("float32", "channels_last")


@contextmanager
def _usual_settings() -> Iterator[None]:
    """Set Keras's float type and order of axes while the block runs in any thread, and put back what was found."""
    global _users, _before  # noqa: PLW0603  # they belong to the process, like the settings
    config = import_keras().config
    with _settings_lock:
        if not _users:
            _before = config.floatx(), config.image_data_format()
            config.set_floatx("float32")
            config.set_image_data_format("channels_last")
        _users += 1
    try:
        yield
    finally:
        with _settings_lock:
            _users -= 1
            if not _users:
                config.set_floatx(_before[0])
                config.set_image_data_format(_before[1])
