"""GroupNorm with SiLU behind it, as diffusion UNets have it before every convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import group_norm, silu

from kernels.runtime.dispatch import fused
from kernels.runtime.launch import launch
from kernels.runtime.tiles import power_of_two, sum_dtype

CHUNK = 8192  # elements of a group that one program takes, and the most chunks that a group is split into
MAX_SPLITS = 64


def groupnorm_silu_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, activation: bool = True
) -> Tensor:
    """silu(GroupNorm(x)) of a map [B, C, H, W]; weight and bias [C]. Without `activation` only the norm."""
    y = group_norm(x, groups, weight, bias, eps)
    return silu(y) if activation else y


def groupnorm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, activation: bool = True
) -> Tensor:
    """`groupnorm_silu_reference`, fused on CUDA, in x's memory format. The kernel has no gradient."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    if fused(x, weight, bias) and not learns:
        return groupnorm_silu_op(x, groups, weight, bias, eps, activation)
    return groupnorm_silu_reference(x, groups, weight, bias, eps, activation)


@torch.library.custom_op("vlv::groupnorm_silu", mutates_args=())
def groupnorm_silu_op(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool
) -> Tensor:  # fmt: skip
    out = _like_map(x, groups, weight, bias, eps, activation)
    b, c, h, w = x.shape
    if not out.numel():
        return out
    x = x.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
    per_group, pixels = c // groups, h * w
    splits = min(MAX_SPLITS, -(-per_group * pixels // CHUNK))
    chunk = -(-per_group * pixels // splits)
    splits = -(-per_group * pixels // chunk)
    part = x.new_empty(b, groups, splits, 2, dtype=sum_dtype(x))
    inner = _channels_last(x)
    shared = {
        "x": x, "part": part, "pixels": pixels, "chunk": chunk, "stride_b": c * pixels,
        "stride_c": 1 if inner else pixels, "stride_p": c if inner else 1,
    }  # fmt: skip
    constants = {"PER_GROUP": per_group, "INNER": inner, "DOUBLE": x.dtype == torch.float64}
    sizes = {"groups": groups, "batch": b}
    grid = ("splits", "groups", "batch")
    launch("groupnorm_silu.statistics", f"c{c}", grid, shared, constants, splits=splits, **sizes)
    more = {"weight": weight.contiguous(), "bias": bias.contiguous(), "out": out, "splits": splits, "eps": eps}
    constants |= {"SILU": activation, "BLOCK_S": power_of_two(splits, 1)}
    launch("groupnorm_silu.apply", f"c{c}", grid, {**shared, **more}, constants, **sizes)
    return out


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@groupnorm_silu_op.register_fake
def _like_map(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
