"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) on VGG16, from a local file of its weights, without torchvision.

The learned weights of the channels (version 0.1) come with torchmetrics, whose own LPIPS needs torchvision.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlv.evaluate.results import EvaluationError

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def vgg16() -> nn.Sequential:
    """Return VGG16's convolutions, numbered as torchvision's `vgg16().features[:30]` are."""
    layers, width = [], 3
    for block in CHANNELS:
        layers += [nn.MaxPool2d(2)] if layers else []
        for outputs in block:
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU()]
            width = outputs
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """Maps images uint8 [B, 3, H, W] and as many others to distances [B]; H and W at least 16."""

    def __init__(self, weights: dict[str, Tensor]):
        """Load VGG16's weights, under torchvision's names (`features.0.weight` ...). Raises EvaluationError."""
        super().__init__()
        self.net = vgg16()
        own = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
        try:
            self.net.load_state_dict(own)
        except RuntimeError as error:
            raise EvaluationError("no weights of VGG16 under torchvision's names (features.0.weight ...)") from error
        heads = files("torchmetrics.functional.image").joinpath("lpips_models/vgg.pth")
        with heads.open("rb") as file:
            self.heads = list(torch.load(file, "cpu", weights_only=True).values())  # [1, C, 1, 1] a block
        ends = [i for i, layer in enumerate(self.net) if isinstance(layer, nn.MaxPool2d)]
        self.blocks = [self.net[a:b] for a, b in zip([0, *ends], [*ends, len(self.net)], strict=True)]
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, file: Path) -> LPIPS:
        """Read a .safetensors file or a torch state dict. Raises OSError, EvaluationError."""
        if not file.is_file():
            raise EvaluationError(f"{file}: no such file; --lpips takes VGG16's weights (torchvision's, or timm's)")
        try:
            weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise EvaluationError(f"{file}: no weights; --lpips takes VGG16's (torchvision's, or timm's)") from error
        return cls(weights)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the five maps [B, C, H, W], each of unit length over its channels."""
        shift, scale = (torch.tensor(v)[:, None, None] for v in (SHIFT, SCALE))
        x, maps = (images.float() / 127.5 - 1 - shift) / scale, []
        for block in self.blocks:
            x = block(x)
            maps.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return maps

    @torch.inference_mode()
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        pairs = zip(self.heads, self._features(images), self._features(others), strict=True)
        return sum((head * (a - b).square()).sum(1).mean((1, 2)) for head, a, b in pairs)
