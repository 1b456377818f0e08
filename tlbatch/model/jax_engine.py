"""A bundle's Keras model through JAX as an engine, and its head alone: what runs on GPUs, without TensorFlow.

Keras reads the model with its JAX backend, and XLA compiles it for one batch shape. The calls of JAX return before their work
is done. So while the GPU computes one batch, the next one is copied to it and the last one's results are copied back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlbatch.errors import ConfigError
from tlbatch.model.batches import HEAD_BATCH, Outputs, fixed_batches, in_fixed_batches, joined, outputs_of
from tlbatch.model.bundle import HEAD, MODEL, Bundle
from tlbatch.model.own_keras import import_keras
from tlbatch.model.precision import to_half_precision
from tlbatch.model.safe_load import load_safely
from tlbatch.stdio import import_quietly

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

#: Batches that are on their way through the GPU at a time: one is copied to it while another one is computed.
_IN_FLIGHT = 2
#: Batches in one call of `predict`.
_BATCHES_AT_ONCE = 2


class JaxEngine:
    """The engine for GPUs. It also runs on CPUs, where OpenVINO is faster."""

    name = "jax"
    parallel = 2

    def __init__(self, bundle: Bundle, threads: int, batch_size: int, *, half: bool = False, gpu: bool = False) -> None:
        device = _start(threads, gpu=gpu)
        model = load_safely(bundle.folder / MODEL)
        if half:
            to_half_precision(model)
        names = [name for name in ("features", "scores") if name in model.output]
        self._step = _compiled(model, device, (batch_size, *bundle.size, 3), bundle.pixel_rules.dtype, names, half=half)
        self._batch = batch_size
        self.at_once = _BATCHES_AT_ONCE * batch_size

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) pixels from 0 to 255, for any n. Two threads may call it at once."""
        outputs: list[list[np.ndarray]] = []
        running: deque[list[Any]] = deque()
        for batch in fixed_batches(pixels, self._batch):
            results = self._step(batch)
            for result in results:
                result.copy_to_host_async()
            running.append(results)
            if len(running) == _IN_FLIGHT:
                outputs.append([np.asarray(result) for result in running.popleft()])
        outputs += [[np.asarray(result) for result in results] for results in running]
        return outputs_of(joined(outputs, len(pixels)))


class JaxHead:
    """The head alone."""

    name = "jax"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        device = _start(threads, gpu=False)
        model = load_safely(bundle.folder / HEAD)
        self._step = _compiled(model, device, (HEAD_BATCH, bundle.features_length), "float32")

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        rows = features.astype(np.float32, copy=False)
        return in_fixed_batches(lambda batch: [np.asarray(self._step(batch)[0])], rows, HEAD_BATCH)[0]


def jax_sees_a_gpu() -> bool:
    """Whether JAX is installed in this process's environment and finds a GPU."""
    if importlib.util.find_spec("jax") is None:
        return False
    _grow_as_needed()
    try:
        return bool(import_quietly("jax").devices("gpu"))
    except RuntimeError:  # JAX without CUDA, or no driver
        return False


def _start(threads: int, *, gpu: bool) -> Any:
    """Import JAX, and Keras on top of it.

    Returns:
        The device of JAX to use: the GPU of this process, or its CPUs.

    Raises:
        ConfigError: JAX is not installed, a GPU is reserved and JAX does not see it, or Keras runs on another backend here.
    """
    if importlib.util.find_spec("jax") is None:
        raise ConfigError(
            "engine: JAX is not installed here; install tlbatch[gpu-jax], or jax alone, or set engine=tensorflow."
        )
    _grow_as_needed()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not gpu and "jax" not in sys.modules:
        os.environ.setdefault("NPROC", str(threads))  # XLA's threads; it has no setting of its own
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Ray leaves the GPUs in sight of an actor that reserves none
    jax = import_quietly("jax")
    if gpu and not jax_sees_a_gpu():
        raise ConfigError(
            "num_gpus: a GPU is reserved, but JAX does not see it; install tlbatch[gpu-jax] and NVIDIA's driver (580 or newer) "
            "on the workers, or set num_gpus=0."
        )
    _compile_once(jax)
    import_keras("jax")
    return jax.devices("gpu" if gpu else "cpu")[0]


def _compile_once(jax: Any) -> None:
    """Keep what is compiled in a folder of this machine's user, for the next actor.

    Keras on JAX also compiles a program for the first random values of each weight, which the stored ones then replace: with
    MobileNetV2 8 s of a start on a CPU, and 2 s with the cache.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    cache = Path(tempfile.gettempdir(), f"tlbatch-jax-{os.getuid()}")
    try:
        cache.mkdir(mode=0o700, exist_ok=True)
        found = cache.lstat()
    except OSError as error:
        log.warning("What JAX compiles is not kept: %s", error)
        return
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        log.warning("%s belongs to another user or is open to others; what JAX compiles is not kept.", cache)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _grow_as_needed() -> None:
    """By default JAX takes three quarters of a GPU's memory at once, and two actors could not share one."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _compiled(
    model: keras.Model, device: Any, shape: tuple[int, ...], dtype: str, names: list[str] | None = None, *, half: bool = False
) -> Callable[[np.ndarray], list[Any]]:
    """The model compiled for one input shape, with its weights on the device: rows -> the named outputs, or the only one.

    A float32 model is computed as such, and not in TF32, which NVIDIA's GPUs use by default. In half precision the float32 head
    is left to that default.
    """
    import jax

    def step(weights: Any, rows: Any) -> list[Any]:
        outputs, _ = model.stateless_call(*weights, rows, training=False)
        return [outputs] if names is None else [outputs[name] for name in names]

    here = jax.sharding.SingleDeviceSharding(device)
    variables = (model.trainable_variables, model.non_trainable_variables)
    weights = tuple([jax.device_put(variable.value, here) for variable in group] for group in variables)
    with contextlib.nullcontext() if half else jax.default_matmul_precision("highest"):
        compiled = jax.jit(step).lower(weights, jax.ShapeDtypeStruct(shape, dtype, sharding=here)).compile()
    return lambda rows: list(compiled(weights, jax.device_put(rows, here)))
