"""Makes `tests/golden/keras2.zip`: small classifiers as Keras 2 writes them, and what each scores.

python tests/support/keras2.py      (TensorFlow 2.15.1 and its Keras 2.15.0, Python 3.11)
"""

import json
import os
import tempfile
import zipfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf

keras = tf.keras
ARCHIVE = Path(__file__).parents[1] / "golden" / "keras2.zip"


def base() -> "keras.Model":
    inputs = keras.Input((48, 48, 3))
    maps = keras.layers.Conv2D(8, 3, strides=4)(inputs)
    maps = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(maps))
    return keras.Model(inputs, keras.layers.DepthwiseConv2D(3, strides=2)(maps), name="small")


def dense(units: int, **more):
    return keras.layers.Dense(units, kernel_initializer=keras.initializers.RandomNormal(0, 3, seed=7), **more)


def tutorial(preprocess) -> "keras.Model":
    """Augmentation, preprocessing in the graph, a frozen base, a mean, dropout, a dense layer."""
    inputs = keras.Input((48, 48, 3))
    maps = base()(preprocess(keras.Sequential([keras.layers.RandomFlip("horizontal")])(inputs)), training=False)
    pooled = keras.layers.Dropout(0.2)(keras.layers.GlobalAveragePooling2D()(maps))
    return keras.Model(inputs, dense(3, activation="softmax")(pooled))


def teachable_machine() -> "keras.Model":
    """A Sequential of two, the second without a bias."""
    features = keras.Sequential([base(), keras.layers.GlobalAveragePooling2D()])
    head = keras.Sequential([dense(10, activation="relu", input_shape=(8,)), dense(3, activation="softmax", use_bias=False)])
    model = keras.Sequential([features, head])
    model.build((None, 48, 48, 3))
    return model


def main() -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (11, 48, 48, 3), np.uint8).astype("float32")
    modes = keras.applications
    made = {
        "tf": (tutorial(modes.mobilenet_v2.preprocess_input), pixels),
        "caffe": (tutorial(modes.vgg16.preprocess_input), pixels),
        "torch": (tutorial(modes.densenet.preprocess_input), pixels),
        "layer": (tutorial(keras.layers.Rescaling(1 / 127.5, -1)), pixels),
        "machine": (teachable_machine(), pixels / 127.5 - 1),
    }
    scores = {}
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (model, numbers) in made.items():
            model.compile("adam", "categorical_crossentropy")
            scores[name] = np.asarray(model(numbers, training=False), "float64").round(7).tolist()
            for suffix in ("h5",) if name == "caffe" else ("h5", "keras"):  # Keras 2 cannot write an Ellipsis into `.keras`
                path = Path(folder, f"{name}.{suffix}")
                model.save(path, include_optimizer=False) if suffix == "h5" else model.save(path)
                archive.write(path, path.name)
        archive.writestr("scores.json", json.dumps(scores))


if __name__ == "__main__":
    main()
