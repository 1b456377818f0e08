"""A bundle's Keras model through TensorFlow as an engine, and its head alone."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np

from tlbatch.errors import ConfigError
from tlbatch.model.batches import HEAD_BATCH, Outputs, in_fixed_batches, outputs_of
from tlbatch.model.bundle import HEAD, MODEL, Bundle
from tlbatch.model.precision import to_half_precision
from tlbatch.model.safe_load import load_safely

log = logging.getLogger(__name__)


class TensorFlowHead:
    """The head of a bundle without an OpenVINO model."""

    name = "tensorflow"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        _bind_threads(tf, threads)
        self._model = load_safely(bundle.folder / HEAD)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return in_fixed_batches(lambda batch: [np.asarray(self._model(batch, training=False))], features, HEAD_BATCH)[0]


class TensorFlowEngine:
    """The engine for CPUs if the bundle has no OpenVINO model, and for GPUs (XLA) without JAX."""

    name = "tensorflow"
    parallel = 1

    def __init__(self, bundle: Bundle, threads: int, batch_size: int, *, half: bool = False, gpu: bool = False) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        gpus = gpus_of_this_process()
        if gpu and not gpus:
            raise ConfigError(
                "num_gpus: a GPU is reserved, but TensorFlow does not see it; install tlbatch[gpu] on the workers, or set "
                "num_gpus=0."
            )
        _bind_threads(tf, threads)
        model = load_safely(bundle.folder / MODEL)
        if half:
            to_half_precision(model)
        signature = tf.TensorSpec((batch_size, *bundle.size, 3), bundle.pixel_rules.dtype)
        self._step = tf.function(
            lambda pixels: model(pixels, training=False), input_signature=[signature], jit_compile=bool(gpus)
        )
        self._batch = batch_size
        self.at_once = 2 * batch_size
        self._names = [name for name in ("features", "scores") if name in model.output]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) pixels from 0 to 255, for any n."""
        return outputs_of(in_fixed_batches(self._infer, pixels, self._batch))

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        outputs = self._step(batch)
        return [outputs[name].numpy() for name in self._names]


def gpus_of_this_process() -> int:
    """How many GPUs TensorFlow sees in this process. It will allocate their memory as needed instead of all at once."""
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    for device in found:
        tf.config.experimental.set_memory_growth(device, True)
    return len(found)


def _bind_threads(tf: Any, threads: int) -> None:
    """Set TensorFlow's thread counts; it accepts them only before its first operation."""
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        log.debug("TensorFlow has already started; its thread counts stay as they are.")
