"""What executes a bundle's model, or its head alone: `load_engine(bundle)` or `load_head(bundle)`, and then `predict`.

An engine works in batches of one fixed shape, the last one padded, so that nothing is compiled twice and an image's scores
do not depend on its neighbours or on how many there are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import HEAD, MODEL, PROBE_TOLERANCE, Bundle
from tlbatch.model.openvino import XML, cut_head
from tlbatch.model.precision import to_half_precision
from tlbatch.model.safe_load import load_safely

log = logging.getLogger(__name__)

#: Images in a batch. OpenVINO runs one on each of its threads, and what a layer gives for so few is still in that core's cache
#: when the next one takes it. MobileNetV2 at 160, OpenVINO 2026.4 on 2 cores with AVX-512: 534 images a second, 477 with 16;
#: with both at one batch of 16, 410. EfficientNetB0 at 224: 101, 77, 83. ResNet50 and VGG16 do not mind. A GPU wants more:
#: MobileNetV2 in half precision on an H200 does 17,200 in batches of 64, 34,600 of 256, 38,500 of 1,024.
OPENVINO_BATCH, TENSORFLOW_BATCH, GPU_BATCH = 4, 16, 256
#: Images that each thread of OpenVINO is given at a time, at least: at the end of a call the threads wait for the last.
_A_THREAD = 32
#: Rows of features in a batch of a head alone.
HEAD_BATCH = 16

#: How far half precision may be off on the probes; beyond, float32 is used.
HALF_TOLERANCE = 0.02


class Outputs(NamedTuple):
    """float32 features (n, F); scores (n, C), or None where the bundle has no head."""

    features: np.ndarray
    scores: np.ndarray | None


class Engine(Protocol):
    """Anything that turns pixels into features and scores."""

    name: str
    #: Images that are best given at a time.
    at_once: int

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
        batch_size: images in a batch; by default what suits engine and device.

    Raises:
        BundleError: damaged files, or scores that are not those the bundle promises.
        ConfigError: a GPU was given, and TensorFlow does not see it.
    """
    if choose(bundle, engine, gpu=gpu) == "openvino":
        return _proved(OpenVinoEngine(bundle, threads, batch_size or OPENVINO_BATCH), bundle)
    batch = batch_size or (GPU_BATCH if gpu else TENSORFLOW_BATCH)
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
        raise BundleError(f"The bundle {bundle.location.url} has no head.")
    kind = OpenVinoHead if choose(bundle, engine, gpu=False) == "openvino" else TensorFlowHead
    head: Head = kind(bundle, threads)
    probes = bundle.probes()
    given = head.predict(probes["features"])
    _require_shape(given, probes["scores"], bundle)
    distance = float(np.abs(given - probes["scores"]).max())
    if not distance <= PROBE_TOLERANCE:
        raise BundleError(f"The head of {bundle.location.url} fails its self-test on {head.name}: off by {distance:.2g}.")
    return head


def choose(bundle: Bundle, engine: str, *, gpu: bool) -> str:
    """The engine that `auto` stands for here; raises ConfigError for one the bundle cannot serve."""
    if engine == "openvino" and not bundle.has(XML):
        raise ConfigError(f"engine: the bundle {bundle.location.url} has no OpenVINO model; use --engine tensorflow.")
    if engine != "auto":
        return engine
    return "openvino" if bundle.has(XML) and not gpu else "tensorflow"


def _proved(engine: Engine, bundle: Bundle) -> Engine:
    distance = _distance(engine, bundle)
    if distance > PROBE_TOLERANCE:
        raise BundleError(
            f"The bundle {bundle.location.url} fails its self-test on {engine.name}: {_measured(bundle)} of the probes are off "
            f"by {distance:.2g}, and {PROBE_TOLERANCE} is allowed."
        )
    return engine


def _measured(bundle: Bundle) -> str:
    return "scores" if bundle.labels else "features"


def _distance(engine: Engine, bundle: Bundle) -> float:
    """How far off the probes' scores are; without a head their features, in parts of the largest. No number counts as far."""
    probes = bundle.probes()
    if probes["pixels"].shape[1:] != (*bundle.size, 3):
        raise BundleError(
            f"The bundle {bundle.location.url} takes pixels of {bundle.size}, its probes are {probes['pixels'].shape[1:]}."
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
                f"The bundle {bundle.location.url} names {said[1]} {_measured(bundle)}, its {who} {found.shape[-1]}."
            )


class OpenVinoEngine:
    """The CPU's engine: starts in a second, without importing TensorFlow. Each thread runs a batch of its own."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int, batch_size: int) -> None:
        import openvino

        model = openvino.Core().read_model(bundle.folder / XML)
        model.reshape([batch_size, *bundle.size, 3])
        compiled = _compiled(model, threads, at_once=threads)
        self._requests = [compiled.create_infer_request() for _ in range(threads)]
        self._batch = batch_size
        self.at_once = threads * max(batch_size, _A_THREAD)
        self._names = [name for name in ("features", "scores") if any(name in port.get_names() for port in model.outputs)]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""
        given: list[list[np.ndarray]] = []
        under_way: deque[Any] = deque()
        try:
            for request, batch in zip(itertools.cycle(self._requests), _fixed_batches(pixels, self._batch), strict=False):
                if len(under_way) == len(self._requests):
                    given.append(self._outcome(under_way.popleft()))
                request.start_async([batch])
                under_way.append(request)
            while under_way:
                given.append(self._outcome(under_way.popleft()))
        finally:
            for request in under_way:  # after an error: none may be at work when it is asked again
                with contextlib.suppress(RuntimeError):
                    request.wait()
        return _outputs(_joined(given, len(pixels)))

    def _outcome(self, request: Any) -> list[np.ndarray]:
        request.wait()
        return [request.get_tensor(name).data.copy() for name in self._names]


class OpenVinoHead:
    """The head of the CPU's engine, cut from the same model: its scores are the engine's to the bit."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        import openvino

        model = cut_head(openvino.Core().read_model(bundle.folder / XML))
        model.reshape([HEAD_BATCH, bundle.features_length])
        self._request = _compiled(model, threads, at_once=1).create_infer_request()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return _in_fixed_batches(self._infer, features.astype(np.float32, copy=False), HEAD_BATCH)[0]

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        self._request.infer([batch])
        return [self._request.get_output_tensor(0).data.copy()]


def _compiled(model: Any, threads: int, *, at_once: int) -> Any:
    """An OpenVINO model on the CPU that runs so many batches at once, on so many threads together.

    float32 is asked for by name: on processors with bfloat16 it is not the default, and scores moved by up to 0.2.
    """
    import openvino

    hints = {"NUM_STREAMS": at_once, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", hints)


class TensorFlowHead:
    """The head where there is no OpenVINO model."""

    name = "tensorflow"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        _bind_threads(tf, threads)
        self._model = load_safely(bundle.folder / HEAD)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return _in_fixed_batches(lambda batch: [np.asarray(self._model(batch, training=False))], features, HEAD_BATCH)[0]


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
        model = load_safely(bundle.folder / MODEL)
        if half:
            to_half_precision(model)
        signature = tf.TensorSpec((batch_size, *bundle.size, 3), tf.uint8)
        self._step = tf.function(
            lambda pixels: model(pixels, training=False), input_signature=[signature], jit_compile=bool(gpus)
        )
        self._batch = batch_size
        self.at_once = 2 * batch_size
        self._names = [name for name in ("features", "scores") if name in model.output]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""
        return _outputs(_in_fixed_batches(self._infer, pixels, self._batch))

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
    """Call `infer` on batches of exactly `size`, the last one padded, and join what it gives."""
    given = [infer(batch) for batch in _fixed_batches(rows, size)]
    return _joined(given, len(rows))


def _fixed_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of exactly `size`, at least one, the last one padded with zeros."""
    for start in range(0, max(1, len(rows)), size):
        batch = rows[start : start + size]
        if len(batch) < size:
            batch = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), rows.dtype)])
        yield np.ascontiguousarray(batch)


def _joined(given: list[list[np.ndarray]], rows: int) -> list[np.ndarray]:
    """What batches gave, without the padding's share."""
    return [np.concatenate(arrays)[:rows] for arrays in zip(*given, strict=True)]


def _outputs(joined: list[np.ndarray]) -> Outputs:
    return Outputs(joined[0], joined[1] if len(joined) > 1 else None)
