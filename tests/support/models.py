"""Keras classifiers as other people make them."""

import keras
import numpy as np


def small_base(pooling=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((48, 48, 3))
    maps = keras.layers.Conv2D(8, 3, strides=4, activation="relu")(inputs)
    maps = keras.layers.Conv2D(16, 3, strides=2, activation="relu")(maps)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(maps) if pooling else maps, name="small")


def stacked(activation="softmax", units=3):
    """What the tutorials of Keras build: a base, pooling, dropout, a dense layer."""
    base = small_base()
    inputs = keras.Input((48, 48, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(base(inputs, training=False))
    return keras.Model(inputs, keras.layers.Dense(units, activation=activation)(keras.layers.Dropout(0.3)(pooled)))


def sequential():
    layers = [small_base("avg"), keras.layers.Dense(12, activation="relu"), keras.layers.BatchNormalization()]
    return keras.Sequential([keras.Input((48, 48, 3)), *layers, keras.layers.Dense(3, activation="softmax")])


def nested_head():
    head = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)], name="top")
    inputs = keras.Input((48, 48, 3))
    return keras.Model(inputs, head(small_base("avg")(inputs)))


def with_operations():
    """Preprocessing by arithmetic in the graph, as `preprocess_input` leaves it."""
    inputs = keras.Input((48, 48, 3))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(small_base("avg")(inputs / 127.5 - 1.0)))


def two_branches():
    """A head that the graph does not show: two vectors are joined behind the base."""
    base = small_base("avg")
    inputs = keras.Input((48, 48, 3))
    features = base(inputs)
    joined = keras.layers.Concatenate()([features, keras.layers.Dense(4)(features)])
    return keras.Model(inputs, keras.layers.Add()([keras.layers.Dense(3)(joined), keras.layers.Dense(3)(features)]))


def pixels(count=11):
    return np.random.default_rng(5).integers(0, 256, (count, 48, 48, 3), np.uint8)


def softmax(values):
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
