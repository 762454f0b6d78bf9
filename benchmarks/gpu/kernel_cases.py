"""The operations that benchmarks.gpu.kernels compares, at the sizes of the published models or at toy sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import attention as attn
from kernels import channel_attention as channel
from kernels import cross_attention as cross
from kernels import dwconv_norm as dwconv
from kernels import geglu as gated
from kernels import groupnorm_silu as norm
from kernels import upsample_normalize as upsample
from kernels import window_attention as window
from vlv.model.encoder import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Case:
    """One operation at one size. Ours and the reference take `inputs`; the first `batched` of them lead with B."""

    name: str
    operation: str  # what kernels/tuned.json calls it
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    batched: int
    flops: int
    moved: int  # bytes read and written at the least
    speedup: float = 1.0  # the target, over the best rival
    bandwidth: float = 0.0  # the target, of copying's


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def cases(device: str, dtype: torch.dtype, batch: int, toy: bool) -> list[Case]:
    """All cases; toy sizes are for Triton's interpreter."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    found = []
    stages = [(5, 32, 1)] if toy else [(192, 256, 8), (96, 512, 16), (48, 1024, 32), (24, 2048, 64)]
    for side, c, heads in stages:
        size = 4 if toy else 12
        qkv, bias, n = random(batch, side, side, 3 * c), random(3 * c), side * side
        found.append(Case(
            f"window_attention {side}x{side}x{c}", "window_attention",
            lambda x, b, h=heads, s=size: window.window_attention(x, b, h, s),
            lambda x, b, h=heads, s=size: window.window_attention_reference(x, b, h, s),
            [qkv, bias], 1, 4 * batch * n * size**2 * c, _size(qkv) * 4 // 3, speedup=2,
        ))  # fmt: skip
        found.append(Case(
            f"channel_attention {n}x{c}", "channel_attention",
            lambda x, g=heads: channel.channel_attention(x, g),
            lambda x, g=heads: channel.channel_attention_reference(x, g),
            [qkv.flatten(1, 2)], 1, 4 * batch * n * c * (c // heads), _size(qkv) * 4 // 3, speedup=2, bandwidth=0.7,
        ))  # fmt: skip
        x = random(batch, side, side, c)
        found.append(Case(
            f"dwconv_norm {side}x{side}x{c}", "dwconv_norm", dwconv.dwconv_norm, dwconv.dwconv_norm_reference,
            [x, random(c, 1, 3, 3), random(c), random(c), random(c)], 1, 18 * x.numel(), 3 * _size(x),
            speedup=2, bandwidth=0.7,
        ))  # fmt: skip
    sizes = [(9, 9, 1, 16, True)] if toy else [
        (591, 591, 16, 64, False), (77, 77, 16, 64, True), (77, 591, 16, 64, False), (4096, 4096, 5, 64, False)
    ]  # fmt: skip
    for m, n, heads, d, causal in sizes:
        q, k, v = (random(batch, length, heads, d).transpose(1, 2) for length in (m, n, n))
        found.append(Case(
            f"attention {m}x{n}{' causal' if causal else ''}", "attention",
            lambda q, k, v, c=causal: attn.attention_op(q, k, v, c)[0],
            lambda q, k, v, c=causal: attn.attention_reference(q, k, v, c),
            [q, k, v], 3, 4 * batch * heads * m * n * d // (2 if causal else 1), _size(q, k, v, q),
        ))  # fmt: skip
    for m, heads in [(9, 1)] if toy else [(4096, 5), (1024, 10), (256, 20)]:
        q, k, v = (random(batch, length, heads, 64) for length in (m, 77, 77))
        found.append(Case(
            f"cross_attention {m}x77, {heads} heads", "cross_attention", cross.cross_attention,
            cross.cross_attention_reference, [q, k, v], 3, 4 * batch * heads * m * 77 * 64, _size(q, k, v, q),
            speedup=1.3,
        ))  # fmt: skip
    for side, c in [(3, 8)] if toy else [(64, 320), (32, 640), (16, 1280)]:
        x, groups = random(batch, c, side, side), 4 if toy else 32
        found.append(Case(
            f"groupnorm_silu {c}x{side}x{side}", "groupnorm_silu",
            lambda x, w, b, g=groups: norm.groupnorm_silu(x, g, w, b),
            lambda x, w, b, g=groups: norm.groupnorm_silu_reference(x, g, w, b),
            [x, random(c), random(c)], 1, 10 * x.numel(), 2 * _size(x), speedup=1.2,
        ))  # fmt: skip
        x = random(batch, side * side, 8 * c)
        found.append(Case(
            f"geglu {side * side}x{4 * c}", "geglu", gated.geglu, gated.geglu_reference, [x], 1, 5 * x.numel(),
            _size(x) * 3 // 2,
        ))  # fmt: skip
    small = 4 if toy else 384
    pixels = torch.randint(
        0, 256, (batch, 3, small, small), dtype=torch.uint8, generator=generator, device=device
    )  # fmt: skip
    constants = [torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD)]
    found.append(Case(
        f"upsample_normalize {small} to {2 * small}", "upsample_normalize", upsample.upsample_normalize,
        upsample.upsample_normalize_reference,
        [pixels, upsample.bicubic_matrix(small, 2 * small).to(device), *constants], 1, 200 * pixels.numel(),
        _size(pixels) * 17,
    ))  # fmt: skip
    return found
