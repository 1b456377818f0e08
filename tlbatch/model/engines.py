"""What executes a bundle's model, or its head alone: `load_engine(bundle)` or `load_head(bundle)`, and then `predict`.

An engine works in batches of one fixed shape, the last one padded, so that nothing is compiled twice and an image's scores
do not depend on its neighbours or on how many there are.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import HEAD, MODEL, PROBE_TOLERANCE, Bundle
from tlbatch.model.export import XML, without_base
from tlbatch.model.policy import load_harmless
from tlbatch.model.precision import to_half_precision

log = logging.getLogger(__name__)

#: Images an engine takes at once. MobileNetV2 at 160, OpenVINO 2026.4 on 2 cores: 886 images a second at 16, 814 at 32,
#: 782 at 64 (AVX-512); a GPU wants more to be busy.
CPU_BATCH, GPU_BATCH = 16, 256

#: How far half precision may be off on the probes; beyond, float32 is used.
HALF_TOLERANCE = 0.02


class Outputs(NamedTuple):
    """float32 features (n, F); scores (n, C), or None where the bundle has no head."""

    features: np.ndarray
    scores: np.ndarray | None


class Engine(Protocol):
    """Anything that turns pixels into features and scores."""

    name: str
    batch_size: int

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""


def load_engine(
    bundle: Bundle, engine: str = "auto", *, threads: int = 1, gpu: bool = False, batch_size: int | None = None
) -> Engine:
    """Load a bundle into an engine and let it prove itself on the bundle's probes.

    Args:
        bundle: its files are checked against their digests first.
        engine: "auto" is tensorflow on a GPU, on a CPU openvino where the bundle has it.
        threads: how many the engine may use.
        gpu: whether a GPU was given to this process; half precision is used there as far as the probes allow it.
        batch_size: images at once; by default what suits the device.

    Raises:
        BundleError: damaged files, or scores that are not those the bundle promises.
        ConfigError: a GPU was given, and TensorFlow does not see it.
    """
    batch = batch_size or (GPU_BATCH if gpu else CPU_BATCH)
    if choose(bundle, engine, gpu=gpu) == "openvino":
        return _proved(OpenVinoEngine(bundle, threads, batch), bundle)
    if gpu:
        half = TensorFlowEngine(bundle, threads, batch, half=True, gpu=True)
        distance = _distance(half, bundle)
        if distance <= HALF_TOLERANCE:
            return half
        log.warning("half precision is off by %.2g on the probes and %s is allowed: float32 it is", distance, HALF_TOLERANCE)
    return _proved(TensorFlowEngine(bundle, threads, batch, gpu=gpu), bundle)


class Head(Protocol):
    """Anything that turns features into scores."""

    name: str

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""


def load_head(bundle: Bundle, engine: str = "auto", *, threads: int = 1) -> Head:
    """Load a bundle's head alone and let it prove itself on the bundle's probes; no base is loaded.

    Args:
        bundle: its files are checked against their digests first.
        engine: as for `load_engine`; "auto" is openvino where the bundle has it.
        threads: how many it may use.

    Raises:
        BundleError: damaged files, a bundle without a head, or scores that are not those the bundle promises.
    """
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.place.url} has no head.")
    kind = OpenVinoHead if choose(bundle, engine, gpu=False) == "openvino" else TensorFlowHead
    head: Head = kind(bundle, threads)
    probes = bundle.probes()
    given = head.predict(probes["features"])
    _require_shape(given, probes["scores"], bundle)
    distance = float(np.abs(given - probes["scores"]).max())
    if not distance <= PROBE_TOLERANCE:
        raise BundleError(f"The head of {bundle.place.url} fails its self-test on {head.name}: off by {distance:.2g}.")
    return head


def choose(bundle: Bundle, engine: str, *, gpu: bool) -> str:
    """The engine that `auto` stands for here; raises ConfigError for one the bundle cannot serve."""
    if engine == "openvino" and not bundle.has(XML):
        raise ConfigError(f"engine: the bundle {bundle.place.url} has no OpenVINO model; use --engine tensorflow.")
    if engine != "auto":
        return engine
    return "openvino" if bundle.has(XML) and not gpu else "tensorflow"


def _proved(engine: Engine, bundle: Bundle) -> Engine:
    distance = _distance(engine, bundle)
    if distance > PROBE_TOLERANCE:
        raise BundleError(
            f"The bundle {bundle.place.url} fails its self-test on {engine.name}: {_measured(bundle)} of the probes are off by "
            f"{distance:.2g}, and {PROBE_TOLERANCE} is allowed."
        )
    return engine


def _measured(bundle: Bundle) -> str:
    return "scores" if bundle.labels else "features"


def _distance(engine: Engine, bundle: Bundle) -> float:
    """How far off the probes' scores are; without a head their features, in parts of the largest. No number counts as far."""
    probes = bundle.probes()
    if probes["pixels"].shape[1:] != (*bundle.size, 3):
        raise BundleError(
            f"The bundle {bundle.place.url} takes pixels of {bundle.size}, its probes are {probes['pixels'].shape[1:]}."
        )
    given, expected = getattr(engine.predict(probes["pixels"]), _measured(bundle)), probes[_measured(bundle)]
    _require_shape(given, expected, bundle)
    scale = 1.0 if bundle.labels else max(1.0, float(np.abs(expected).max()))
    distance = float(np.abs(given - expected).max()) / scale
    log.info("%s on %d probes: off by %.1e", engine.name, len(expected), distance)
    return math.inf if math.isnan(distance) else distance


def _require_shape(given: np.ndarray, expected: np.ndarray, bundle: Bundle) -> None:
    """Raises BundleError where the model gives other than the bundle says: there is one score for each label."""
    said = (len(given), len(bundle.labels) or bundle.features_length)
    for who, found in (("model gives", given), ("probes have", expected)):
        if found.shape != said:
            raise BundleError(
                f"The bundle {bundle.place.url} names {said[1]} {_measured(bundle)}, its {who} {found.shape[-1]}."
            )


class OpenVinoEngine:
    """The CPU's engine: starts in a second, without importing TensorFlow."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int, batch_size: int) -> None:
        import openvino

        model = openvino.Core().read_model(bundle.folder / XML)
        model.reshape([batch_size, *bundle.size, 3])
        self._model = _compiled(model, threads)
        self._request = self._model.create_infer_request()
        self.batch_size = batch_size
        self._names = [name for name in ("features", "scores") if any(name in port.get_names() for port in model.outputs)]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""
        return _outputs(_in_fixed_batches(self._infer, pixels, self.batch_size))

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        self._request.infer([batch])
        return [self._request.get_tensor(name).data.copy() for name in self._names]


class OpenVinoHead:
    """The head of the CPU's engine, cut from the same model and in the same batches: its scores are the engine's to the bit."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        import openvino

        model = without_base(openvino.Core().read_model(bundle.folder / XML))
        model.reshape([CPU_BATCH, bundle.features_length])
        self._request = _compiled(model, threads).create_infer_request()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return _in_fixed_batches(self._infer, features.astype(np.float32, copy=False), CPU_BATCH)[0]

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        self._request.infer([batch])
        return [self._request.get_output_tensor(0).data.copy()]


def _compiled(model: Any, threads: int) -> Any:
    """An OpenVINO model on the CPU.

    float32 is asked for by name: on processors with bfloat16 it is not the default, and scores moved by up to 0.2.
    """
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", hints)


class TensorFlowHead:
    """The head where there is no OpenVINO model."""

    name = "tensorflow"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        _bind_threads(tf, threads)
        self._model = load_harmless(bundle.folder / HEAD)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return _in_fixed_batches(lambda batch: [np.asarray(self._model(batch, training=False))], features, CPU_BATCH)[0]


class TensorFlowEngine:
    """The GPU's engine (XLA), and the CPU's where there is no OpenVINO model."""

    name = "tensorflow"

    def __init__(self, bundle: Bundle, threads: int, batch_size: int, *, half: bool = False, gpu: bool = False) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        gpus = gpus_of_this_process()
        if gpu and not gpus:
            raise ConfigError(
                "num_gpus: a GPU is reserved, but TensorFlow sees none there; install tlbatch[gpu] on the workers, or set "
                "num_gpus=0."
            )
        _bind_threads(tf, threads)
        model = load_harmless(bundle.folder / MODEL)
        if half:
            to_half_precision(model)
        signature = tf.TensorSpec((batch_size, *bundle.size, 3), tf.uint8)
        self._step = tf.function(
            lambda pixels: model(pixels, training=False), input_signature=[signature], jit_compile=bool(gpus)
        )
        self.batch_size = batch_size
        self._names = [name for name in ("features", "scores") if name in model.output]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""
        return _outputs(_in_fixed_batches(self._infer, pixels, self.batch_size))

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        given = self._step(batch)
        return [given[name].numpy() for name in self._names]


def gpus_of_this_process() -> int:
    """How many GPUs TensorFlow sees here; it will take their memory as it needs it, and not all at once."""
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    for device in found:
        tf.config.experimental.set_memory_growth(device, True)
    return len(found)


def _bind_threads(tf: Any, threads: int) -> None:
    """TensorFlow takes its thread counts before its first operation only; later it keeps those it has."""
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        log.debug("TensorFlow has started already; its thread counts stay")


def _in_fixed_batches(infer: Callable[[np.ndarray], list[np.ndarray]], rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Call `infer` on batches of exactly `size`, the last one padded with zeros, and join what it gives."""
    given: list[list[np.ndarray]] = []
    for start in range(0, max(1, len(rows)), size):
        batch = rows[start : start + size]
        real = len(batch)
        if real < size:
            batch = np.concatenate([batch, np.zeros((size - real, *batch.shape[1:]), rows.dtype)])
        given.append([array[:real] for array in infer(np.ascontiguousarray(batch))])
    return [np.concatenate(arrays) for arrays in zip(*given, strict=True)]


def _outputs(joined: list[np.ndarray]) -> Outputs:
    return Outputs(joined[0], joined[1] if len(joined) > 1 else None)
