"""A network -> the layers at five depths whose global averages are its features.

Late layers know the classes that the network was trained on, earlier ones textures and shapes, which other classes need. The
depths follow from the graph: the last and widest map before the second-last and the last halving of the resolution, one in the
middle of the stage between them, the one before the output, and the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from tlbatch.model.own_keras import with_own_keras

if TYPE_CHECKING:
    import keras

#: Of which layers a base's features are the averages: of several depths, or of the last alone.
FeaturesOf = Literal["depths", "last"]

#: A map whose side is at most this share of its stage's first one begins a new stage: halves, also after unpadded layers.
_HALVED = 0.6
#: Layers that join branches. They count where the output of the network is one, so that no map is a part of what is joined.
_JOINS = ("Add", "Concatenate")
#: Functions of layers that make no map: none, and those that weigh channels.
_NO_MAPS = frozenset({"linear", "sigmoid", "hard_sigmoid"})


class _Map(NamedTuple):
    layer: str
    side: int
    channels: int


@with_own_keras
def depths_of(network: keras.Model) -> tuple[str, ...]:
    """The names of up to five layers, the output last; fewer if the network halves its resolution less often."""
    output = network.layers[-1]
    kinds = ("ReLU", *(_JOINS if type(output).__name__ in _JOINS else ()))
    maps = [found for layer in network.layers[:-1] for found in _map_of(layer, kinds)]
    stages = _stages(maps, network.output.shape[1])
    late = stages[-1]
    middle = stages[-2] if len(stages) > 1 else []
    early = stages[-3] if len(stages) > 2 else []
    found = [_widest(early), _widest(middle[: len(middle) // 2 + 1]), _widest(middle), _widest(late)]
    return (*dict.fromkeys(one.layer for one in found if one is not None), output.name)


@with_own_keras
def at_depths(network: keras.Model, layers: Sequence[str]) -> keras.Model:
    """The network with the maps of these layers as its outputs."""
    import keras

    deep = keras.Model(network.input, [network.get_layer(name).output for name in layers], name=network.name)
    deep.trainable = False
    return deep


def _map_of(layer: keras.Layer, kinds: Sequence[str]) -> Iterator[_Map]:
    """The map that a layer makes, if it is of one of these kinds."""
    shape: tuple[int, ...] = getattr(layer.output, "shape", ())
    if len(shape) != 4 or shape[1] < 2:
        return
    function = getattr(getattr(layer, "activation", None), "__name__", "linear")
    if function not in _NO_MAPS or type(layer).__name__ in kinds:
        yield _Map(layer.name, int(shape[1]), int(shape[3]))


def _stages(maps: Sequence[_Map], last: int) -> list[list[_Map]]:
    """The maps by resolution, the highest first; the last stage is that of the output, which may have no other map."""
    sides: list[int] = []
    for side in sorted({one.side for one in maps} | {last}, reverse=True):
        if not sides or side <= _HALVED * sides[-1]:
            sides.append(side)
    return [[one for one in maps if _HALVED * side < one.side <= side] for side in sides]


def _widest(maps: Sequence[_Map]) -> _Map | None:
    """The last of the maps with the most channels."""
    return max(reversed(maps), key=lambda one: one.channels, default=None)
