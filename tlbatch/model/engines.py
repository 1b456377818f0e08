"""A bundle's model, or its head alone -> an engine: `load_engine(bundle)` or `load_head(bundle)`, then `predict`.

An engine runs batches of one fixed shape and pads the last one. So nothing is compiled twice, and an image's scores depend
neither on its neighbors nor on their number.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.bundle import HEAD, MODEL, PROBE_TOLERANCE, Bundle
from tlbatch.model.openvino import XML, cut_head
from tlbatch.model.safe_load import load_safely

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

#: Images in a batch. OpenVINO runs one batch on each of its threads. With small batches the output of a layer is still in the
#: core's cache when the next layer reads it. MobileNetV2 at 160, OpenVINO 2026.4 on 2 cores with AVX-512: 534 images a second
#: in batches of 4, 477 in batches of 16, and 410 if both cores share one batch of 16. EfficientNetB0 at 224: 101, 77, 83. The
#: size makes no difference to ResNet50 and VGG16. A GPU needs larger batches: MobileNetV2 in half precision on an H200 does
#: 17,200 images a second in batches of 64, 34,600 in batches of 256, 38,500 in batches of 1,024.
OPENVINO_BATCH, TENSORFLOW_BATCH, GPU_BATCH = 4, 16, 256
#: The fewest images that each OpenVINO thread gets in a call: at the end of a call the threads wait for the last one.
_IMAGES_PER_THREAD = 32
#: Rows of features in a batch of a head alone.
HEAD_BATCH = 16

#: The largest difference on the probes at which half precision is used; above it float32 is used.
HALF_TOLERANCE = 0.02


class Outputs(NamedTuple):
    """float32 features (n, F), and scores (n, C); the scores are None if the bundle has no head."""

    features: np.ndarray
    scores: np.ndarray | None


class Engine(Protocol):
    """Any implementation that turns pixels into features and scores."""

    name: str
    #: The best number of images for one call of `predict`.
    at_once: int

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""


def load_engine(
    bundle: Bundle, engine: str = "auto", *, threads: int = 1, gpu: bool = False, batch_size: int | None = None
) -> Engine:
    """Load a bundle into an engine, and test the engine on the bundle's probes.

    Args:
        bundle: its files are first checked against their digests.
        engine: "auto" is tensorflow on a GPU; on a CPU it is openvino if the bundle has an OpenVINO model.
        threads: how many threads the engine may use.
        gpu: whether this process has a GPU; half precision is used there if the probes allow it.
        batch_size: images in a batch; the default suits engine and device.

    Raises:
        BundleError: a file is damaged, or the scores differ from those of the probes.
        ConfigError: a GPU is reserved, but TensorFlow does not see it.
    """
    if choose(bundle, engine, gpu=gpu) == "openvino":
        return _tested(OpenVinoEngine(bundle, threads, batch_size or OPENVINO_BATCH), bundle)
    batch = batch_size or (GPU_BATCH if gpu else TENSORFLOW_BATCH)
    if gpu:
        half = TensorFlowEngine(bundle, threads, batch, half=True, gpu=True)
        distance = _distance(half, bundle)
        if distance <= HALF_TOLERANCE:
            return half
        log.warning("Half precision differs by %.2g on the probes, and %s is allowed; using float32.", distance, HALF_TOLERANCE)
    return _tested(TensorFlowEngine(bundle, threads, batch, gpu=gpu), bundle)


class Head(Protocol):
    """Any implementation that turns features into scores."""

    name: str

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""


def load_head(bundle: Bundle, engine: str = "auto", *, threads: int = 1) -> Head:
    """Load a bundle's head without its base, and test it on the bundle's probes.

    Args:
        bundle: its files are first checked against their digests.
        engine: as for `load_engine`; "auto" is openvino if the bundle has an OpenVINO model.
        threads: how many threads the head may use.

    Raises:
        BundleError: a file is damaged, the bundle has no head, or the scores differ from those of the probes.
    """
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.location.url} has no head.")
    kind = OpenVinoHead if choose(bundle, engine, gpu=False) == "openvino" else TensorFlowHead
    head: Head = kind(bundle, threads)
    probes = bundle.probes()
    scores = head.predict(probes["features"])
    _require_shape(scores, probes["scores"], bundle)
    distance = float(np.abs(scores - probes["scores"]).max())
    if not distance <= PROBE_TOLERANCE:
        raise BundleError(
            f"The head of {bundle.location.url} fails its self-test on {head.name}: its scores differ from those of the probes "
            f"by {distance:.2g}, and {PROBE_TOLERANCE} is allowed."
        )
    return head


def choose(bundle: Bundle, engine: str, *, gpu: bool) -> str:
    """The engine that `auto` means for a bundle; raises ConfigError for an engine that the bundle does not support."""
    if engine == "openvino" and not bundle.has(XML):
        raise ConfigError(f"engine: the bundle {bundle.location.url} has no OpenVINO model; use --engine tensorflow.")
    if engine != "auto":
        return engine
    return "openvino" if bundle.has(XML) and not gpu else "tensorflow"


def _tested(engine: Engine, bundle: Bundle) -> Engine:
    """The engine; raises BundleError if it fails the self-test."""
    distance = _distance(engine, bundle)
    if distance > PROBE_TOLERANCE:
        raise BundleError(
            f"The bundle {bundle.location.url} fails its self-test on {engine.name}: its {_measured(bundle)} differ from those "
            f"of the probes by {distance:.2g}, and {PROBE_TOLERANCE} is allowed."
        )
    return engine


def _measured(bundle: Bundle) -> str:
    return "scores" if bundle.labels else "features"


def _distance(engine: Engine, bundle: Bundle) -> float:
    """The largest difference of the probes' scores or, without a head, of their features as a share of the largest feature.

    NaN counts as infinitely far.
    """
    probes = bundle.probes()
    if probes["pixels"].shape[1:] != (*bundle.size, 3):
        raise BundleError(
            f"The bundle {bundle.location.url} takes pixels of {bundle.size}, but its probes are {probes['pixels'].shape[1:]}."
        )
    given, expected = getattr(engine.predict(probes["pixels"]), _measured(bundle)), probes[_measured(bundle)]
    _require_shape(given, expected, bundle)
    scale = 1.0 if bundle.labels else max(1.0, float(np.abs(expected).max()))
    distance = float(np.abs(given - expected).max()) / scale
    log.info("%s on %d probes: the largest difference is %.1e", engine.name, len(expected), distance)
    return math.inf if math.isnan(distance) else distance


def _require_shape(given: np.ndarray, expected: np.ndarray, bundle: Bundle) -> None:
    """Raises BundleError if model or probes do not have one score per label or, without a head, the length of the features."""
    wanted = (len(given), len(bundle.labels) or bundle.features_length)
    for source, found in (("model gives", given), ("probes have", expected)):
        if found.shape != wanted:
            raise BundleError(
                f"The bundle {bundle.location.url} has {wanted[1]} {_measured(bundle)}, but its {source} {found.shape[-1]}."
            )


class OpenVinoEngine:
    """The engine for CPUs: it starts in a second, without importing TensorFlow. Each thread runs its own batches."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int, batch_size: int) -> None:
        import openvino

        model = openvino.Core().read_model(bundle.folder / XML)
        model.reshape([batch_size, *bundle.size, 3])
        compiled = _compiled(model, threads, at_once=threads)
        self._requests = [compiled.create_infer_request() for _ in range(threads)]
        self._batch = batch_size
        self.at_once = threads * max(batch_size, _IMAGES_PER_THREAD)
        self._names = [name for name in ("features", "scores") if any(name in port.get_names() for port in model.outputs)]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) uint8 pixels, for any n."""
        outputs: list[list[np.ndarray]] = []
        running: deque[Any] = deque()
        try:
            for request, batch in zip(itertools.cycle(self._requests), _fixed_batches(pixels, self._batch), strict=False):
                if len(running) == len(self._requests):
                    outputs.append(self._output(running.popleft()))
                request.start_async([batch])
                running.append(request)
            while running:
                outputs.append(self._output(running.popleft()))
        finally:
            for request in running:  # after an error: a request must have ended before it is started again
                with contextlib.suppress(RuntimeError):
                    request.wait()
        return _outputs(_joined(outputs, len(pixels)))

    def _output(self, request: Any) -> list[np.ndarray]:
        request.wait()
        return [request.get_tensor(name).data.copy() for name in self._names]


class OpenVinoHead:
    """The head for CPUs, cut out of the engine's model: its scores equal the engine's scores bit for bit."""

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
    """An OpenVINO model compiled for the CPU. It runs `at_once` batches at the same time, on `threads` threads in all.

    float32 is requested explicitly: on processors with bfloat16 it is not the default, and scores changed by up to 0.2.
    """
    import openvino

    hints = {"NUM_STREAMS": at_once, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", hints)


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
        return _in_fixed_batches(lambda batch: [np.asarray(self._model(batch, training=False))], features, HEAD_BATCH)[0]


class TensorFlowEngine:
    """The engine for GPUs (XLA), and for CPUs if the bundle has no OpenVINO model."""

    name = "tensorflow"

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
        outputs = self._step(batch)
        return [outputs[name].numpy() for name in self._names]


def to_half_precision(model: keras.Model) -> None:
    """Let the base of a bundle's model compute in float16; weights, pixel scaling, features and scores stay float32.

    On GPUs, float16 convolutions run on tensor cores and accumulate in float32. The model is changed in place.
    """
    import keras

    policy = keras.DTypePolicy("mixed_float16")
    for base in model.layers:
        if isinstance(base, keras.Model) and base.name != "head":
            for layer in _flat_layers(base):
                layer.dtype_policy = policy


def _flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    import keras

    nested = ((_flat_layers(layer) if isinstance(layer, keras.Model) else [layer]) for layer in model.layers)
    return [layer for layers in nested for layer in layers]


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


def _in_fixed_batches(infer: Callable[[np.ndarray], list[np.ndarray]], rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Call `infer` on batches of exactly `size`, the last one padded, and join the outputs."""
    outputs = [infer(batch) for batch in _fixed_batches(rows, size)]
    return _joined(outputs, len(rows))


def _fixed_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of exactly `size`, at least one, the last one padded with zeros."""
    for start in range(0, max(1, len(rows)), size):
        batch = rows[start : start + size]
        if len(batch) < size:
            batch = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), rows.dtype)])
        yield np.ascontiguousarray(batch)


def _joined(outputs: list[list[np.ndarray]], rows: int) -> list[np.ndarray]:
    """The outputs of all batches, without those of the padding."""
    return [np.concatenate(arrays)[:rows] for arrays in zip(*outputs, strict=True)]


def _outputs(joined: list[np.ndarray]) -> Outputs:
    return Outputs(joined[0], joined[1] if len(joined) > 1 else None)
