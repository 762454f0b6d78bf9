"""GroupNorm followed by SiLU, as diffusion UNets have it before every convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import group_norm, silu

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import cdiv, power_of_two, sum_dtype
from kernels.runtime.tuning import reference_is_faster

CHUNK = 8192  # elements of a group that one program takes
MAX_SPLITS = 64  # chunks that a group is split into at most


def groupnorm_silu_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, activation: bool = True
) -> Tensor:
    """Return silu(GroupNorm(x)) of a map [B, C, H, W]; weight and bias [C]. Without `activation` only the norm."""
    y = group_norm(x, groups, weight, bias, eps)
    return silu(y) if activation else y


def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, activation: bool = True
) -> Tensor:
    """Compute `groupnorm_silu_reference`, fused on CUDA, in x's memory format. The kernel has no gradient."""
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    shape = f"c{x.shape[1]}p{x.shape[2] * x.shape[3]}"
    if (
        not needs_gradient
        and fused("groupnorm_silu", x, weight, bias)
        and not reference_is_faster("groupnorm_silu", shape, x)
    ):
        return groupnorm_silu_op(x, groups, weight, bias, eps, activation)
    return groupnorm_silu_reference(x, groups, weight, bias, eps, activation)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _launch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool, out: Tensor) -> None:
    """Launch two passes: the statistics of each group's chunks, then the norm of the map."""
    b, c, h, w = x.shape
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    inner = memory_format == torch.channels_last
    per_group, pixels = c // groups, h * w
    chunk = cdiv(per_group * pixels, min(MAX_SPLITS, cdiv(per_group * pixels, CHUNK)))
    splits = cdiv(per_group * pixels, chunk)
    part = x.new_empty(b, groups, splits, 2, dtype=sum_dtype(x))
    args = {"x": x, "part": part, "pixels": pixels, "chunk": chunk}
    args |= {"stride_b": c * pixels, "stride_c": 1 if inner else pixels, "stride_p": c if inner else 1}
    constants = {"PER_GROUP": per_group, "INNER": inner, "DOUBLE": x.dtype == torch.float64}

    def grid(meta: dict) -> tuple[int, int, int]:
        return splits, groups, b

    launch("groupnorm_silu.statistics", f"c{c}", grid, args, constants)
    more = {"weight": weight.contiguous(), "bias": bias.contiguous(), "out": out, "splits": splits, "eps": eps}
    more_constants = {"SILU": activation, "BLOCK_S": power_of_two(splits, 1)}
    launch("groupnorm_silu.apply", f"c{c}", grid, {**args, **more}, {**constants, **more_constants})


@torch.library.custom_op("vlv::groupnorm_silu", mutates_args=())
def groupnorm_silu_op(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool) -> Tensor:
    """Return [B, C, H, W] in x's memory format."""
    out = _fake(x, groups, weight, bias, eps, activation)
    if out.numel():
        _launch(x, groups, weight, bias, eps, activation, out)
    return out


@groupnorm_silu_op.register_fake
def _fake(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))
