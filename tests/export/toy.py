"""A graph of three linear blocks, and the export command as tests call it."""

from __future__ import annotations

import torch

from export import graphs, onnx
from tests.export.conftest import BUNDLED, LIMITS


class Toy(graphs.Graph):
    """Three linear blocks; the middle one overflows in half precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))
        self.layers[1].weight.data *= 4e5
        self.layers[2].weight.data /= 4e5
        self.inputs, self.outputs = (graphs.Port("x", "float32", (64,)),), ("y",)
        self.blocks = ("layers.0", "layers.1", "layers.2")

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x.to(self.dtype) if i == 0 else x)
        return x.float()


def scaled(toy: Toy) -> Toy:
    toy.layers[1].weight.data /= 4e5
    toy.layers[2].weight.data *= 4e5
    return toy


def export(out, precision: str, *args: str) -> int:
    command = ["--ckpt", str(BUNDLED), "--out", str(out), *LIMITS, "--precision", precision, "--probes", "6"]
    return onnx.main([*command, *args])
