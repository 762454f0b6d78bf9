"""Linear layer that multiplies 8-bit floats (E4M3, arXiv 2209.05433), for inference on GPUs that have them.

Every row of the activations and every row of the weights (an output channel) has its own float32 scale, the largest
magnitude over 448. The product is `torch._scaled_mm` with row-wise scales (CUTLASS); one kernel of ours quantizes the
activations, after the GELU where one comes before the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.runtime.dispatch import exporting, fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two

FORMAT, MAX = torch.float8_e4m3fn, 448.0
MIN_SCALE = 2.0**-100  # of a row of zeros
MULTIPLE = 16  # that a product's sizes must be of
OLDEST = (8, 9)  # compute capability of the first GPUs with 8-bit floats: Ada


def has_fp8(device: torch.device) -> bool:
    """Return True if the device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST


has_fp8._dynamo_marked_constant = True  # Dynamo calls it while it traces, and takes the answer for a constant


def quantize_rows_reference(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K], or its GELU: return E4M3 [..., K] and the scales, float32 [..., 1], that restore it."""
    x = functional.gelu(x.float()) if gelu else x.float()
    scale = (x.abs().amax(-1, keepdim=True) / MAX).clamp(min=MIN_SCALE)
    return (x / scale).to(FORMAT), scale


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows_reference`, fused on CUDA: x is read once. The kernel has no gradient."""
    if not exporting() and x.numel() and fused("quantize_rows", x, fits=x.shape[-1] <= 2**14):
        return quantize_rows_op(x, gelu)
    return quantize_rows_reference(x, gelu)


@torch.library.custom_op("vlv::quantize_rows", mutates_args=())
def quantize_rows_op(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return E4M3 [..., K] and the scales, float32 [..., 1]."""
    out, scale = _fake(x, gelu)
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    args = {"x": rows, "out": out, "scale": scale, "rows": len(rows), "columns": columns}
    args |= {"row_stride": rows.stride(0), "column_stride": rows.stride(1)}
    launch(
        "fp8_linear.quantize",
        f"k{columns}",
        lambda meta: (cdiv(len(rows), meta["ROWS"]),),
        args,
        {"GELU": gelu, "BLOCK": power_of_two(columns)},
    )
    return out, scale


@quantize_rows_op.register_fake
def _fake(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FORMAT), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def fp8_linear_reference(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply quantized rows x [..., K] with weights [N, K] and add the bias [N]; return the bias's dtype [..., N].

    scale: float32 [..., 1]; weight_scale: float32 [N, 1]. 8-bit floats are exact in every dtype of ours, and so are
    their products; the scales follow them.
    """
    dtype = torch.float32 if bias is None else bias.dtype
    y = functional.linear(x.to(dtype), weight.to(dtype)) * (scale * weight_scale.T)
    return (y if bias is None else y + bias).to(dtype)


def scaled_product(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `fp8_linear_reference` by one matrix product of 8-bit floats. Both sizes are multiples of 16."""
    y = torch._scaled_mm(
        x.flatten(0, -2),
        weight.t(),
        scale_a=scale.flatten(0, -2),
        scale_b=weight_scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,  # the only one with row-wise scales
        use_fast_accum=True,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


class Fp8Linear(nn.Module):
    """Compute a linear layer by 8-bit floats; `gelu_before` applies GELU to the input and `gelu` to the output.

    On a device without 8-bit floats the same numbers are multiplied in the bias's dtype, slowly: an emulation.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, gelu: bool = False):
        """layer: its weights are quantized; it is not changed."""
        super().__init__()
        self.gelu = gelu
        self.gelu_before = False
        weight, scale = quantize_rows_reference(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @staticmethod
    def takes(layer: nn.Linear) -> bool:
        """Return True if the sizes of the layer are those of a product of 8-bit floats."""
        return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] in x's dtype."""
        rows, scale = quantize_rows(x, self.gelu_before)
        multiply = scaled_product if has_fp8(x.device) and x.dtype == torch.bfloat16 else fp8_linear_reference
        y = multiply(rows, scale, self.weight, self.scale, self.bias).to(x.dtype)
        return functional.gelu(y) if self.gelu else y
