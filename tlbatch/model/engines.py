"""A bundle's model, or its head alone -> an engine: `load_engine(bundle)` or `load_head(bundle)`, then `predict`.

Each engine has a module of its own. Here one is chosen, and tested on the bundle's probes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Protocol

import numpy as np

from tlbatch.errors import BundleError, ConfigError
from tlbatch.model.batches import Outputs
from tlbatch.model.bundle import ONNX, PROBE_TOLERANCE, Bundle
from tlbatch.model.jax_engine import JaxEngine, JaxHead, jax_sees_a_gpu
from tlbatch.model.openvino import XML
from tlbatch.model.openvino_engine import OpenVinoEngine, OpenVinoHead
from tlbatch.model.tensorflow_engine import TensorFlowEngine, TensorFlowHead, gpus_of_this_process

log = logging.getLogger(__name__)

#: Images in a batch. OpenVINO runs one batch on each of its threads. With small batches the output of a layer is still in the
#: core's cache when the next layer reads it. MobileNetV2 at 160, OpenVINO 2026.4 on 2 cores with AVX-512: 534 images a second
#: in batches of 4, 477 in batches of 16, and 410 if both cores share one batch of 16. EfficientNetB0 at 224: 101, 77, 83. The
#: size makes no difference to ResNet50 and VGG16. A GPU needs larger batches: MobileNetV2 in half precision on an H200 does
#: 17,200 images a second in batches of 64, 34,600 in batches of 256, 38,500 in batches of 1,024.
OPENVINO_BATCH, KERAS_BATCH, GPU_BATCH = 4, 16, 256

#: The largest difference on the probes at which half precision is used; above it float32 is used.
HALF_TOLERANCE = 0.02

_ON_KERAS: dict[str, type[JaxEngine] | type[TensorFlowEngine]] = {"jax": JaxEngine, "tensorflow": TensorFlowEngine}
_HEADS: dict[str, type[JaxHead] | type[OpenVinoHead] | type[TensorFlowHead]] = {
    "jax": JaxHead,
    "openvino": OpenVinoHead,
    "tensorflow": TensorFlowHead,
}


class Engine(Protocol):
    """Any implementation that turns pixels into features and scores."""

    name: str
    #: The best number of images for one call of `predict`.
    at_once: int
    #: How many threads may call `predict` at the same time.
    parallel: int

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) pixels from 0 to 255, for any n."""


def load_engine(
    bundle: Bundle, engine: str = "auto", *, threads: int = 1, gpu: bool = False, batch_size: int | None = None
) -> Engine:
    """Load a bundle into an engine, and test the engine on the bundle's probes.

    Args:
        bundle: its files are first checked against their digests.
        engine: "auto" is what `choose` says.
        threads: how many threads the engine may use.
        gpu: whether this process has a GPU; half precision is used there if the probes allow it.
        batch_size: images in a batch; the default suits engine and device.

    Raises:
        BundleError: a file is damaged, or the scores differ from those of the probes.
        ConfigError: the engine is not installed, or a GPU is reserved that it does not see.
    """
    name = choose(bundle, engine, gpu=gpu)
    if name == "openvino":
        return _tested(OpenVinoEngine(bundle, threads, batch_size or OPENVINO_BATCH), bundle)
    batch, on_keras = batch_size or (GPU_BATCH if gpu else KERAS_BATCH), _ON_KERAS[name]
    if gpu:
        half = on_keras(bundle, threads, batch, half=True, gpu=True)
        distance = _distance(half, bundle)
        if distance <= HALF_TOLERANCE:
            return half
        log.warning("Half precision differs by %.2g on the probes, and %s is allowed; using float32.", distance, HALF_TOLERANCE)
    return _tested(on_keras(bundle, threads, batch, gpu=gpu), bundle)


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
        ConfigError: the engine is not installed.
    """
    if not bundle.labels:
        raise BundleError(f"The bundle {bundle.location.url} has no head.")
    head: Head = _HEADS[choose(bundle, engine, gpu=False)](bundle, threads)
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
    """The engine that `auto` means for a bundle; raises ConfigError for an engine that the bundle does not support.

    On a GPU it is jax, whatever is installed in this process: the actors run elsewhere. On a CPU it is openvino if the bundle
    has an OpenVINO model, else tensorflow.
    """
    if engine == "openvino" and not bundle.has(XML):
        raise ConfigError(f"engine: the bundle {bundle.location.url} has no OpenVINO model; use --engine tensorflow.")
    if bundle.has(ONNX) and (gpu or engine not in ("auto", "openvino")):
        raise ConfigError(
            f"engine: the bundle {bundle.location.url} comes from ONNX, which runs in OpenVINO on CPUs; leave engine out "
            "and set num_gpus=0."
        )
    if bundle.quantized and (gpu or engine not in ("auto", "openvino")):
        raise ConfigError(
            f"engine: the base of the bundle {bundle.location.url} is in int8, which runs in OpenVINO on CPUs; leave engine "
            "out and set num_gpus=0."
        )
    if engine != "auto":
        return engine
    if gpu:
        return "jax"
    return "openvino" if bundle.has(XML) else "tensorflow"


def calls_at_once(engine: str) -> int:
    """How many calls of `predict` one actor has under way at a time."""
    return _ON_KERAS[engine].parallel if engine in _ON_KERAS else OpenVinoEngine.parallel


def engine_on_gpu(engine: str) -> str:
    """Which engine sees a GPU in this process: `engine` itself or, for "auto", jax before tensorflow; empty if none does."""
    if engine in ("auto", "jax") and jax_sees_a_gpu():
        return "jax"
    installed = importlib.util.find_spec("tensorflow") is not None
    if engine in ("auto", "tensorflow") and installed and gpus_of_this_process():
        return "tensorflow"
    return ""


def _tested(engine: Engine, bundle: Bundle) -> Engine:
    """The engine; raises BundleError if it fails the self-test."""
    if bundle.quantized:
        _require_same_bits(engine, bundle)
    distance = _distance(engine, bundle)
    if distance > PROBE_TOLERANCE:
        raise BundleError(
            f"The bundle {bundle.location.url} fails its self-test on {engine.name}: its {_measured(bundle)} differ from those "
            f"of the probes by {distance:.2g}, and {PROBE_TOLERANCE} is allowed."
        )
    return engine


def _require_same_bits(engine: Engine, bundle: Bundle) -> None:
    """Raises BundleError unless a base in int8 gives the features of the probes to the bit.

    A last bit that another processor computes otherwise becomes a whole step of int8, so no tolerance could tell right from
    wrong. AMX changes few images (one of twenty, OpenVINO 2026.4), so the probes alone would not show it.
    """
    if isinstance(engine, OpenVinoEngine) and engine.uses_amx:
        raise BundleError(
            f"The bundle {bundle.location.url} has a base in int8, of which OpenVINO computes some features differently with "
            "AMX, and this process has it do that. Do not set ONEDNN_MAX_CPU_ISA, and use tlbatch before OpenVINO itself."
        )
    probes = _probes_of(bundle)
    given = engine.predict(probes["pixels"]).features
    if not np.array_equal(given, probes["features"]):
        share = float((given != probes["features"]).mean()) if given.shape == probes["features"].shape else 1.0
        raise BundleError(
            f"The bundle {bundle.location.url} fails its self-test on {engine.name}: its base is in int8, and {share:.1%} of "
            "the probes' features differ on this processor. It runs on x86 processors with AVX2 or more; on others, use a "
            "bundle that was trained without --quantize."
        )


def _measured(bundle: Bundle) -> str:
    return "scores" if bundle.labels else "features"


def _distance(engine: Engine, bundle: Bundle) -> float:
    """The largest difference of the probes' scores or, without a head, of their features as a share of the largest feature.

    NaN counts as infinitely far.
    """
    probes = _probes_of(bundle)
    given, expected = getattr(engine.predict(probes["pixels"]), _measured(bundle)), probes[_measured(bundle)]
    _require_shape(given, expected, bundle)
    scale = 1.0 if bundle.labels else max(1.0, float(np.abs(expected).max()))
    distance = float(np.abs(given - expected).max()) / scale
    log.info("%s on %d probes: the largest difference is %.1e", engine.name, len(expected), distance)
    return math.inf if math.isnan(distance) else distance


def _probes_of(bundle: Bundle) -> dict[str, np.ndarray]:
    """The probes; raises BundleError if their pixels are not what the model takes."""
    probes = bundle.probes()
    if probes["pixels"].shape[1:] != (*bundle.size, 3):
        raise BundleError(
            f"The bundle {bundle.location.url} takes pixels of {bundle.size}, but its probes are {probes['pixels'].shape[1:]}."
        )
    return probes


def _require_shape(given: np.ndarray, expected: np.ndarray, bundle: Bundle) -> None:
    """Raises BundleError if model or probes do not have one score per label or, without a head, the length of the features."""
    wanted = (len(given), len(bundle.labels) or bundle.features_length)
    for source, found in (("model gives", given), ("probes have", expected)):
        if found.shape != wanted:
            raise BundleError(
                f"The bundle {bundle.location.url} has {wanted[1]} {_measured(bundle)}, but its {source} {found.shape[-1]}."
            )
