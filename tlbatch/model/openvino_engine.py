"""A bundle's OpenVINO model as an engine, and its head alone: what runs on CPUs."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from typing import Any

import numpy as np

from tlbatch.model.batches import HEAD_BATCH, Outputs, fixed_batches, in_fixed_batches, joined, outputs_of
from tlbatch.model.bundle import Bundle
from tlbatch.model.openvino import BIN, XML, Files, cut_head, import_openvino

#: The fewest images that each OpenVINO thread gets in a call: at the end of a call the threads wait for the last one.
_IMAGES_PER_THREAD = 32
#: The largest batch. In larger ones, from 17 images on, OpenVINO 2026.4 takes other kernels on processors without AVX-512 (an
#: AMD EPYC), and features differ by up to 3e-5; in all batches up to 16 they are the same bits. Small ones are faster, too.
_MOST_AT_ONCE = 16


class OpenVinoEngine:
    """The engine for CPUs: it starts in a second, without importing TensorFlow. Each thread runs its own batches.

    Attributes:
        name: what the user calls it.
        parallel: calls of `predict` that are of use at a time.
        at_once: images of a call that keep its threads busy.
        uses_amx: whether a base in int8 is computed with AMX, and then differently in a few images.
    """

    name = "openvino"
    parallel = 1

    def __init__(self, bundle: Bundle, threads: int, batch_size: int) -> None:
        openvino = import_openvino()
        batch_size = bundle.batch or min(batch_size, _MOST_AT_ONCE)
        model = openvino.Core().read_model(bundle.folder / XML)
        model.reshape([batch_size, *bundle.size, 3])
        compiled = _compiled(model, threads, at_once=threads)
        self.uses_amx = bundle.quantized is not None and _uses_amx(compiled)
        self._requests = [compiled.create_infer_request() for _ in range(threads)]
        self._batch = batch_size
        self.at_once = threads * max(batch_size, _IMAGES_PER_THREAD)
        self._names = [name for name in ("features", "scores") if any(name in port.get_names() for port in model.outputs)]

    def predict(self, pixels: np.ndarray) -> Outputs:
        """Features and scores of (n, height, width, 3) pixels from 0 to 255, for any n."""
        outputs: list[list[np.ndarray]] = []
        running: deque[Any] = deque()
        try:
            for request, batch in zip(itertools.cycle(self._requests), fixed_batches(pixels, self._batch), strict=False):
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
        return outputs_of(joined(outputs, len(pixels)))

    def _output(self, request: Any) -> list[np.ndarray]:
        request.wait()
        return [request.get_tensor(name).data.copy() for name in self._names]


class OpenVinoHead:
    """The head for CPUs, cut out of the engine's model: its scores equal the engine's scores bit for bit."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int) -> None:
        openvino = import_openvino()
        model = cut_head(openvino.Core().read_model(bundle.folder / XML))
        model.reshape([HEAD_BATCH, bundle.features_length])
        self._request = _compiled(model, threads, at_once=1).create_infer_request()

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Scores (n, C) float32 of (n, F) features, for any n."""
        return in_fixed_batches(self._infer, features.astype(np.float32, copy=False), HEAD_BATCH)[0]

    def _infer(self, batch: np.ndarray) -> list[np.ndarray]:
        self._request.infer([batch])
        return [self._request.get_output_tensor(0).data.copy()]


def features_of_files(base: Files, pixels: np.ndarray) -> np.ndarray:
    """Features (n, F) by the OpenVINO files of a base, as the engine computes them."""
    model = import_openvino().Core().read_model(base[XML], base[BIN])
    batch = min(len(pixels), _MOST_AT_ONCE)
    model.reshape([batch, *pixels.shape[1:]])
    request = _compiled(model, 1, at_once=1).create_infer_request()

    def infer(rows: np.ndarray) -> list[np.ndarray]:
        request.infer([rows])
        return [request.get_output_tensor(0).data.copy()]

    return in_fixed_batches(infer, pixels, batch)[0]


def _uses_amx(compiled: Any) -> bool:
    """Whether any kernel of a compiled model has AMX in its name."""
    kernels = (operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops())
    return any("amx" in str(facts["primitiveType"].value) for facts in kernels if "primitiveType" in facts)


def _compiled(model: Any, threads: int, *, at_once: int) -> Any:
    """An OpenVINO model compiled for the CPU. It runs `at_once` batches at the same time, on `threads` threads in all.

    float32 is requested explicitly: on processors with bfloat16 it is not the default, and scores changed by up to 0.2.
    """
    openvino = import_openvino()
    hints = {"NUM_STREAMS": at_once, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", hints)
