"""Other programs that classify a folder of JPEGs with a bundle's model, each written as its own documentation shows.

    .venv-peers/bin/python benchmarks/peers.py WAY FOLDER BUNDLE OUTPUT

`compare.py` runs them on one machine, in an environment made from `benchmarks/peers.txt`. All decode, resize, predict and write
key, label and score as Parquet. They do not account for images that fail.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SIZE, BATCH, CPUS = 160, 64, os.cpu_count() or 1


class KerasModel:
    """`model.predict` of Keras, as in a tutorial."""

    def __init__(self, bundle: str) -> None:
        import keras

        self._model = keras.saving.load_model(Path(bundle, "model.keras"), compile=False)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Scores (n, C) of pixels (n, 160, 160, 3)."""
        return self._model.predict(pixels, verbose=0)["scores"]


class OpenVinoModel:
    """The same network in OpenVINO, in float32 with a batch of 4 on each thread, as tlbatch runs it."""

    def __init__(self, bundle: str) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(Path(bundle, "openvino", "model.xml"))
        model.reshape([4, SIZE, SIZE, 3])
        hints = {"NUM_STREAMS": CPUS, "INFERENCE_NUM_THREADS": CPUS, "INFERENCE_PRECISION_HINT": "f32"}
        self._queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", hints), CPUS)
        self._found: dict[int, np.ndarray] = {}
        self._queue.set_callback(lambda request, start: self._found.update({start: request.get_tensor("scores").data.copy()}))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Scores (n, C) of pixels (n, 160, 160, 3)."""
        padded = np.concatenate([pixels, np.zeros((-len(pixels) % 4, SIZE, SIZE, 3), np.uint8)])
        for start in range(0, len(padded), 4):
            self._queue.start_async([padded[start : start + 4]], start)
        self._queue.wait_all()
        return np.concatenate([self._found.pop(start) for start in range(0, len(padded), 4)])[: len(pixels)]


def answers(scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The label and score of each image."""
    return {"label": labels[scores.argmax(1)], "score": scores.max(1)}


def labels_of(bundle: str) -> np.ndarray:
    """The bundle's labels in the order of its scores."""
    return np.array(json.loads(Path(bundle, "bundle.json").read_text())["labels"])


class RayPredictor:
    """The class from Ray's documentation: it loads the model once and calls it on each batch."""

    def __init__(self, bundle: str) -> None:
        self._model, self._labels = KerasModel(bundle), labels_of(bundle)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Paths with label and score."""
        return {"key": batch["path"], **answers(self._model(batch["image"]), self._labels)}


def ray_recipe(folder: str, bundle: str, output: str) -> None:
    """Run Ray's recipe for batch inference: `read_images`, an actor that calls `predict`, `write_parquet`."""
    import ray

    ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    images = ray.data.read_images(folder, size=(SIZE, SIZE), mode="RGB", include_paths=True)
    predicted = images.map_batches(
        RayPredictor, fn_constructor_args=(bundle,), batch_size=BATCH, compute=ray.data.ActorPoolStrategy(size=1)
    )
    predicted.write_parquet(output)


class RayEngine:
    """An actor that loads only the engine; it decodes and predicts."""

    def __init__(self, bundle: str) -> None:
        self._model, self._labels = OpenVinoModel(bundle), labels_of(bundle)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Paths with label and score."""
        from PIL import Image

        pixels = [np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE))) for path in batch["item"]]
        return {"key": batch["item"], **answers(self._model(np.stack(pixels)), self._labels)}


def ray_engine(folder: str, bundle: str, output: str) -> None:
    """Run the smallest program that starts the engine: Ray Data, one actor, `write_parquet`."""
    import ray

    ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    paths = ray.data.from_items(sorted(map(str, Path(folder).glob("*.jpg"))))
    predicted = paths.map_batches(RayEngine, fn_constructor_args=(bundle,), compute=ray.data.ActorPoolStrategy(size=1))
    predicted.write_parquet(output)


def daft_with(model: type, folder: str, bundle: str, output: str) -> None:
    """Run Daft with its own glob, download, decoder and resize, and one of its classes for the model."""
    import daft
    from daft.functions import decode_image, download, resize

    kind = daft.DataType.struct({"label": daft.DataType.string(), "score": daft.DataType.float32()})

    @daft.cls(max_concurrency=1)
    class Predictor:
        def __init__(self) -> None:
            self.model, self.labels = model(bundle), labels_of(bundle)

        @daft.method.batch(return_dtype=kind, batch_size=BATCH)
        def predict(self, images: daft.Series) -> list[dict[str, object]]:
            found = answers(self.model(np.stack(images.to_pylist())), self.labels)
            return [{"label": str(label), "score": float(score)} for label, score in zip(*found.values(), strict=True)]

    frame = daft.from_glob_path(f"{folder}/*.jpg")
    images = resize(decode_image(download(daft.col("path")), mode="RGB"), SIZE, SIZE)
    found = Predictor().predict(images)
    frame.select(daft.col("path").alias("key"), found.alias("found")).write_parquet(output)


def daft_keras(folder: str, bundle: str, output: str) -> None:
    """Run Daft with Keras."""
    daft_with(KerasModel, folder, bundle, output)


def daft_openvino(folder: str, bundle: str, output: str) -> None:
    """Run Daft with the engine of tlbatch."""
    daft_with(OpenVinoModel, folder, bundle, output)


def tf_data(folder: str, bundle: str, output: str) -> None:
    """Run one process: a parallel, prefetched `tf.data` pipeline into `model.predict`."""
    import tensorflow as tf

    def decoded(path: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return tf.cast(tf.image.resize(image, (SIZE, SIZE), antialias=True), tf.uint8)

    paths = sorted(map(str, Path(folder).glob("*.jpg")))
    images = tf.data.Dataset.from_tensor_slices(paths).map(decoded, num_parallel_calls=tf.data.AUTOTUNE)
    model = KerasModel(bundle)
    scores = model(images.batch(BATCH).prefetch(tf.data.AUTOTUNE))
    write(output, paths, answers(scores, labels_of(bundle)))


def by_hand(folder: str, bundle: str, output: str) -> None:
    """Run tlbatch's decoder and engine without Ray: a decoding thread per CPU, three batches ahead of the engine."""
    from tlbatch.images.decode import decode
    from tlbatch.model.bundle import load_bundle
    from tlbatch.model.engines import load_engine

    loaded = load_bundle(bundle)
    engine = load_engine(loaded, "openvino", threads=CPUS)
    paths = sorted(Path(folder).glob("*.jpg"))
    scores = []
    with ThreadPoolExecutor(CPUS) as pool:
        waiting: deque[Future] = deque()
        coming = iter(paths)
        for _ in paths[::BATCH]:
            waiting.extend(
                pool.submit(lambda path: decode(path.read_bytes(), loaded.size, rules=loaded.pixel_rules), path)
                for path in itertools.islice(coming, 4 * BATCH - len(waiting))
            )
            batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
            scores.append(engine.predict(np.stack([one.result().array for one in batch])).scores)
    write(output, [str(path) for path in paths], answers(np.concatenate(scores), labels_of(bundle)))


def write(output: str, keys: list[str], found: dict[str, np.ndarray]) -> None:
    """Write one Parquet file."""
    Path(output).mkdir(parents=True)
    pq.write_table(pa.table({"key": keys, **found}), Path(output, "predictions.parquet"))


WAYS = {way.__name__: way for way in (ray_recipe, ray_engine, daft_keras, daft_openvino, tf_data, by_hand)}

if __name__ == "__main__":
    began = time.perf_counter()
    WAYS[sys.argv[1]](*sys.argv[2:5])
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
