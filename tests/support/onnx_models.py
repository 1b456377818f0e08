"""Makes `tests/golden/onnx.zip`: small random classifiers as the exporters of PyTorch write them, and their outputs.

python tests/support/onnx_models.py [FOLDER]      (PyTorch 2.15.0, timm 1.0.31, onnx 1.23.2, onnxscript 0.7.2; Python 3.11)

With a folder, timm's models of usual size are written there instead, for `make exporters`.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer

ARCHIVE = Path(__file__).parents[1] / "golden" / "onnx.zip"
MEAN, STD = (np.array(one, np.float32) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
USUAL = (
    "resnet18",
    "mobilenetv2_050",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "densenet121",
)
SIZE = 48
DYNAMO, SCRIPT = ("dynamo", "dynamo-one"), ("script", "script-one")
#: Which of the exporters write each model; `one` is for one image at a time.
WAYS = {
    "plain": (*DYNAMO, *SCRIPT),
    "resnet": ("script",),
    "vit": ("dynamo", "script-one"),
    "convnext": ("script",),
    "squeezed": ("dynamo", "script"),
    "two": ("script",),
}


class Plain(torch.nn.Module):
    """Convolutions and a linear layer, which is multiplied and added by hand; the scores are probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 4),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU6(),
            torch.nn.Conv2d(8, 16, 3, 2),
            torch.nn.SiLU(),
        )
        self.weights, self.biases = torch.nn.Parameter(torch.randn(16, 3)), torch.nn.Parameter(torch.randn(3))

    def forward(self, pixels):
        return torch.softmax(self.maps(pixels).mean((2, 3)) @ self.weights + self.biases, 1)


class TwoOutputs(torch.nn.Module):
    """Maps beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()

    def forward(self, pixels):
        return self.plain(pixels), self.plain.maps(pixels)


def small() -> dict[str, torch.nn.Module]:
    return {
        "plain": Plain(),
        "resnet": ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8, num_classes=3),
        "vit": VisionTransformer(img_size=SIZE, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3),
        "convnext": ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3),
        "squeezed": torch.nn.Sequential(
            Plain().maps, torch.nn.Conv2d(16, 3, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ),
    }


def livelier(model: torch.nn.Module) -> torch.nn.Module:
    """Numbers with which images get different scores, which a network that begins its training does not give."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan = weight[0].numel()
                weight.copy_(torch.randn_like(weight) * (2.5 / fan) ** 0.5)
            elif name.endswith(("weight", "gamma")):
                weight.fill_(1.0)
    last = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    if last:
        with torch.no_grad():
            last[-1].weight *= 4
    return model.eval()


def write(model: torch.nn.Module, path: Path, way: str, size: int) -> None:
    example = torch.randn(1 if way.endswith("one") else 2, 3, size, size)
    if way.startswith("dynamo"):
        shapes = None if way.endswith("one") else ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), str(path), dynamo=True, external_data=False, dynamic_shapes=shapes)
        return
    names = {"input_names": ["pixels"], "output_names": ["scores", "maps"] if isinstance(model, TwoOutputs) else ["scores"]}
    axes = {} if way.endswith("one") else {"pixels": {0: "batch"}}
    torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def forget_origin(path: Path) -> None:
    """Remove what an exporter wrote of the machine and the source it ran on."""
    model = onnx.load(path)
    for one in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del one.metadata_props[:]
        one.ClearField("doc_string")
    onnx.save(model, path)


def scores_of(model: torch.nn.Module) -> list[list[float]]:
    pixels = np.random.default_rng(5).integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)  # as `support.models.pixels`
    numbers = torch.from_numpy((pixels.astype(np.float32) / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model(numbers)
    found = found[0] if isinstance(found, tuple) else found
    return found.double().numpy().tolist()


def main() -> None:
    if len(sys.argv) > 1:
        for name in USUAL:
            model = livelier(timm.create_model(name, num_classes=5))
            for way in ("dynamo", "script", "script-one"):
                write(model, Path(sys.argv[1], f"{name}-{way}.onnx"), way, 224)
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        expected = {}
        for name, made in {**small(), "two": TwoOutputs()}.items():
            model = livelier(made)
            for way in WAYS[name]:
                path = Path(folder, f"{name}-{way}.onnx")
                write(model, path, way, SIZE)
                forget_origin(path)
                archive.write(path, path.name)
            expected[name] = scores_of(model)
        archive.writestr("outputs.json", json.dumps(expected))


if __name__ == "__main__":
    main()
