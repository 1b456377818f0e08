"""The frozen, pretrained networks: a name and weights -> a Keras model from uint8 pixels to features.

Only the numbers of a weights file are read; its configuration, layers and pickles are never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tlbatch.errors import ConfigError, WeightsError, closest
from tlbatch.model.own_keras import import_keras, with_own_keras
from tlbatch.model.safe_load import require_stored
from tlbatch.schema import Size

if TYPE_CHECKING:
    import h5py
    import keras

Scaling = Literal["tf", "torch", "caffe", "unit", "inside"]

# Means and standard deviations of ImageNet, from `keras.applications.imagenet_utils.preprocess_input`.
TORCH_MEAN, TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Base:
    """One network of `keras.applications`.

    Attributes:
        name: the name in Keras.
        size: height and width of the images it was trained on, in pixels.
        scaling: what its `preprocess_input` does: tf (-1 to 1), torch (ImageNet mean and standard deviation), caffe (BGR,
            ImageNet mean) or inside (the network scales its pixels itself). unit (0 to 1) occurs only in imported models.
    """

    name: str
    size: int
    scaling: Scaling


def _bases(scaling: Scaling, **sizes: int) -> dict[str, Base]:
    return {name: Base(name, size, scaling) for name, size in sizes.items()}


#: Every base of Keras 3.15; a test derives the same table from `keras.applications` and compares.
BASES: dict[str, Base] = {
    **_bases("inside", ConvNeXtTiny=224, ConvNeXtSmall=224, ConvNeXtBase=224, ConvNeXtLarge=224, ConvNeXtXLarge=224),
    **_bases("torch", DenseNet121=224, DenseNet169=224, DenseNet201=224),
    **_bases("inside", EfficientNetB0=224, EfficientNetB1=240, EfficientNetB2=260, EfficientNetB3=300),
    **_bases("inside", EfficientNetB4=380, EfficientNetB5=456, EfficientNetB6=528, EfficientNetB7=600),
    **_bases("inside", EfficientNetV2B0=224, EfficientNetV2B1=240, EfficientNetV2B2=260, EfficientNetV2B3=300),
    **_bases("inside", EfficientNetV2S=384, EfficientNetV2M=480, EfficientNetV2L=480),
    **_bases("tf", InceptionV3=299, InceptionResNetV2=299, Xception=299),
    **_bases("tf", MobileNet=224, MobileNetV2=224),
    **_bases("inside", MobileNetV3Small=224, MobileNetV3Large=224),
    **_bases("tf", NASNetMobile=224, NASNetLarge=331),
    **_bases("caffe", ResNet50=224, ResNet101=224, ResNet152=224),
    **_bases("tf", ResNet50V2=224, ResNet101V2=224, ResNet152V2=224),
    **_bases("caffe", VGG16=224, VGG19=224),
}


def find_base(name: str) -> Base:
    """The base with this name; raises ConfigError with the nearest known name."""
    try:
        return BASES[name]
    except KeyError:
        raise ConfigError(f"base: there is no {name!r} in keras.applications{closest(name, BASES)}.") from None


@with_own_keras  # Keras names layers by a counter, which must start anew to match weights files
def build_network(base: Base, size: int, weights: str | bytes) -> keras.Model:
    """Build the pretrained network, frozen and without its top.

    Args:
        base: which network.
        size: height and width of its input, in pixels.
        weights: "imagenet" (Keras downloads them), "random", or the bytes of a `.h5`, `.weights.h5` or `.keras` file.

    Raises:
        ConfigError: the network cannot be built for images of this size.
        WeightsError: the download fails, or the file does not fit the network.
    """
    keras = import_keras()
    build = getattr(keras.applications, base.name)
    pretrained = "imagenet" if weights == "imagenet" else None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Keras prints its download progress to stdout
            network = build(weights=pretrained, include_top=False, input_shape=(size, size, 3))
    except ValueError as error:
        raise ConfigError(f"size: {base.name} cannot be built for {size}x{size} images ({_first_line(error)}).") from None
    except Exception as error:  # Keras raises a bare Exception if a download fails
        if weights != "imagenet":
            raise
        raise WeightsError(
            f"weights: Keras cannot download the ImageNet weights of {base.name} ({_first_line(error)}); "
            "give a file with --weights FILE.h5."
        ) from None
    if isinstance(weights, bytes):
        _load_weights(network, weights)
    network.trainable = False
    return network


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def with_preprocessing(base: Base, network: keras.Model, size: int) -> tuple[Any, Any]:
    """Symbolic uint8 pixels (batch, size, size, 3), and the pooled features (batch, F) of the maps of `network`, joined."""
    import keras

    pixels, inputs = scaled(base.scaling, (size, size))
    maps = network(inputs, training=False)
    if not isinstance(maps, list):
        return pixels, keras.layers.GlobalAveragePooling2D(name="features")(maps)
    return pixels, keras.layers.Concatenate(name="features")([keras.layers.GlobalAveragePooling2D()(one) for one in maps])


def scaled(scaling: Scaling, size: Size, channels: int = 3, dtype: str = "uint8") -> tuple[Any, Any]:
    """Symbolic pixels (batch, height, width, 3), and the float32 numbers (batch, height, width, channels) of the network.

    For one channel the pixels become grey as by Pillow's `convert("L")`, to the same whole numbers if they are uint8.
    """
    import keras

    pixels = keras.Input((*size, 3), dtype=dtype, name="pixels")
    return pixels, _scaling_of(scaling, pixels if channels == 3 else _grey(pixels))


#: What Pillow multiplies red, green and blue with (ITU-R BT.601), in parts of 65,536. All sums are exact in float32.
GREY_PARTS = (19595, 38470, 7471)


def _grey(pixels: Any) -> Any:
    import keras

    parts = keras.layers.Conv2D(1, 1, use_bias=False, trainable=False, name="grey_parts")
    summed = parts(keras.layers.Rescaling(1.0)(pixels))
    parts.set_weights([np.array(GREY_PARTS, np.float32).reshape(1, 1, 3, 1)])
    if pixels.dtype != "uint8":
        return keras.layers.Rescaling(1 / 65536)(summed)
    return keras.ops.floor(keras.layers.Rescaling(1 / 65536, offset=0.5)(summed))


def scale_and_offset(scaling: Scaling) -> tuple[float | list[float], float | list[float]]:
    """What pixels are multiplied with, and what is added then: one number, or one for each channel (of caffe: blue first)."""
    if scaling == "unit":
        return 1 / 255, 0.0
    if scaling == "tf":
        return 1 / 127.5, -1.0
    if scaling == "torch":
        parts = zip(TORCH_MEAN, TORCH_STD, strict=True)
        return [1 / (255 * std) for std in TORCH_STD], [-mean / std for mean, std in parts]
    return 1.0, [-mean for mean in CAFFE_MEAN_BGR] if scaling == "caffe" else 0.0


def _scaling_of(scaling: Scaling, pixels: Any) -> Any:
    import keras

    scale, offset = scale_and_offset(scaling)
    return keras.layers.Rescaling(scale, offset=offset, name="scale")(
        keras.ops.flip(pixels, axis=-1) if scaling == "caffe" else pixels
    )


def weights_digest(network: keras.Model) -> str:
    """SHA-256 over the shapes and bytes of all weights of a network, in order."""
    digest = hashlib.sha256()
    for value in network.get_weights():
        digest.update(repr((value.shape, str(value.dtype))).encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _load_weights(network: keras.Model, data: bytes) -> None:
    """Copy the weights from a file into `network`; the file may contain more than this network."""
    with _open_h5(data) as file:
        if "layers" in file or "_layer_checkpoint_dependencies" in file:
            values = _find_keras3(network, file)
        else:
            values = _find_legacy(network, file.get("model_weights", file))
    for variable, value in zip(network.weights, values, strict=True):
        variable.assign(value)


@contextlib.contextmanager
def _open_h5(data: bytes) -> Iterator[h5py.File]:
    import h5py

    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read("model.weights.h5")
        with h5py.File(io.BytesIO(data), "r") as file:
            yield file
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"weights: the file is not a Keras weights file ({_first_line(error)}).") from None


def _datasets(group: h5py.Group) -> dict[str, np.ndarray]:
    """Path -> array of every dataset below `group`. Links to other files are not followed."""
    import h5py

    found: dict[str, np.ndarray] = {}

    def take(path: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
            require_stored(item)
            found[path] = np.asarray(item)

    group.visititems(take)
    return found


def _find_keras3(network: keras.Model, file: h5py.File) -> list[np.ndarray]:
    """The weights of a network from Keras 3's layout, in which the network may be at any depth.

    The paths of that layout are internal to Keras. So Keras saves the network as it is, and the network is where the weights
    file has the same paths with the same shapes.
    """
    import h5py

    marks = [np.full(variable.shape, number, "float32") for number, variable in enumerate(network.weights)]
    before = network.get_weights()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "paths.weights.h5")
        network.set_weights(marks)  # the value saved under a path is the number of the weight
        network.save_weights(path)
        network.set_weights(before)
        with h5py.File(path, "r") as saved:
            expected = {name: (int(array.flat[0]), array.shape) for name, array in _datasets(saved).items() if array.size}
    found = _datasets(file)
    first = next(iter(expected))
    for name in found:
        prefix = name.removesuffix(first)
        if name.endswith(first) and all(
            prefix + below in found and found[prefix + below].shape == shape for below, (_, shape) in expected.items()
        ):
            by_number = {number: found[prefix + below] for below, (number, _) in expected.items()}
            return [by_number[number] for number in range(len(network.weights))]
    raise WeightsError(f"weights: the file does not contain the layers of {network.name}; give a file for this base.")


def _find_legacy(network: keras.Model, group: h5py.Group) -> list[np.ndarray]:
    """The weights of a network from the `.h5` layout: by layer and weight name if all match, otherwise in Keras's order."""
    in_order = _in_recorded_order(group)
    by_name = {_tail(path): array for path, array in in_order}
    wanted = [(f"{layer.name}/{variable.name}", variable) for layer in network.layers for variable in layer.weights]
    if all(name in by_name for name, _ in wanted):
        values = [by_name[name] for name, _ in wanted]
    else:
        values = [array for _, array in in_order]
    for number, (name, variable) in enumerate(wanted):
        found = values[number].shape if number < len(values) else "nothing"
        if found != tuple(variable.shape):
            raise WeightsError(
                f"weights: {network.name} needs {name} with shape {tuple(variable.shape)}, but the file has {found}; "
                "the file is for another network or includes a top."
            )
    return values[: len(wanted)]


def _in_recorded_order(group: h5py.Group) -> list[tuple[str, np.ndarray]]:
    """Every weight with its path `layer/weight`, in the order in which Keras recorded layers and weights."""
    import h5py

    found: list[tuple[str, np.ndarray]] = []
    layers = group.attrs.get("layer_names", list(group))
    for layer in map(_text, layers):
        if not isinstance(group.get(layer, getlink=True), h5py.HardLink) or not isinstance(group[layer], h5py.Group):
            continue
        inner = group[layer]
        arrays = _datasets(inner)
        names = map(_text, inner.attrs.get("weight_names", list(arrays)))
        found += [(f"{layer}/{name}", arrays[name]) for name in names if name in arrays]
    return found


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _tail(path: str) -> str:
    """The last two names of a path: `mobilenetv2_1.00_160/Conv1/kernel:0` -> `Conv1/kernel`."""
    parts = path.removesuffix(":0").split("/")
    return "/".join(parts[-2:])
