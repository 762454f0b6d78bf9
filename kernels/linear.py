"""Linear layer with an optional GELU, fused for inference: by oneDNN on a CPU, by cuBLASLt's epilogue on CUDA.

PyTorch's float32 products on a CPU go to MKL, which is slower than oneDNN on AMD processors (20 % on
an EPYC with AVX-512), and a separate GELU reads and writes the hidden map once more. cuBLASLt's epilogue is the tanh
approximation of GELU, at most 5e-4 away: less than half precision rounds. It is used where kernels/tuned.json says that
it measured faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.runtime.dispatch import fused, needs_gradient
from kernels.runtime.tuning import tuned_constant


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return x [..., in] times weight [out, in] plus bias [out], with `gelu` its exact (erf) GELU: [..., out]."""
    y = functional.linear(x, weight, bias)
    return functional.gelu(y) if gelu else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Compute `linear_reference`, by a fused kernel where one applies; on a CPU equal up to the order of sums."""
    if gelu and bias is not None and _epilogue_applies(x, weight, bias):
        return gelu_epilogue(x, weight, bias)
    if not _onednn_applies(x, weight):
        return linear_reference(x, weight, bias, gelu)
    # the op that torch.compile's CPU backend emits; it has no backward
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def gelu_epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x weight^T + bias) by one matrix product with an epilogue (on CUDA: tanh GELU by cuBLASLt)."""
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


def _epilogue_applies(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.numel() > 0
        and fused("linear", x, weight, bias)
        and not needs_gradient(x, weight, bias)
        and tuned_constant("linear.gelu", f"k{weight.shape[1]}n{weight.shape[0]}", "EPILOGUE", x.device.index or 0) == 1
    )


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        # a graph being traced keeps the plain, portable ops; asked first, since what follows would break it in two
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not needs_gradient(x, weight)
    )


class Linear(nn.Linear):
    """nn.Linear computed by `linear`; `gelu` appends the activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, gelu: bool = False):
        super().__init__(inputs, outputs, bias)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gelu)
