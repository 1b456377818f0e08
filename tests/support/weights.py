"""Weights files in the layout that Keras 2 wrote."""

from __future__ import annotations

import h5py
import numpy as np


def save_notop(network, file, name_of):
    with h5py.File(file, "w") as out:
        out.attrs["layer_names"] = [layer.name.encode() for layer in network.layers]
        for layer in network.layers:
            group = out.create_group(layer.name)
            names = [name_of(weight).encode() for weight in layer.weights]
            group.attrs["weight_names"] = names
            for name, weight in zip(names, layer.weights, strict=True):
                group.create_dataset(name.decode(), data=np.asarray(weight))
