"""Linear layer with an optional GELU, through oneDNN for inference on a CPU.

PyTorch's float32 products on a CPU go to MKL, which is slower than oneDNN on AMD processors (20 % on
an EPYC with AVX-512), and a separate GELU reads and writes the hidden map once more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return x [..., in] times weight [out, in] plus bias [out], with `gelu` its exact (erf) GELU: [..., out]."""
    y = functional.linear(x, weight, bias)
    return functional.gelu(y) if gelu else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Compute `linear_reference`, by oneDNN's fused kernel where it applies; equal up to the order of sums."""
    if not _onednn_applies(x, weight):
        return linear_reference(x, weight, bias, gelu)
    # the op that torch.compile's CPU backend emits; it has no backward
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        # a graph being traced keeps the plain, portable ops; asked first, since what follows would break it in two
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class Linear(nn.Linear):
    """nn.Linear computed by `linear`; `gelu` appends the activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gelu: bool = False):
        super().__init__(inputs, outputs, bias)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gelu)
