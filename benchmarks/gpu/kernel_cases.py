"""The operations that benchmarks.gpu.kernels compares, at the sizes of the published models or at toy sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels import add_norm as adding
from kernels import attention as attn
from kernels import channel_attention as channel
from kernels import cross_attention as cross
from kernels import dwconv_norm as dwconv
from kernels import fp8_linear as eight
from kernels import linear as dense
from kernels import upsample_normalize as upsample
from kernels import window_attention as window
from kernels.aot import cases as aot_cases
from vlv.model.encoder import IMAGENET_MEAN, IMAGENET_STD

# side, channels, heads, and blocks of each kind of DaViT's stages at 768 px
STAGES = [(*stage, blocks) for stage, blocks in zip(aot_cases.STAGES, (1, 1, 9, 1), strict=True)]
# queries, keys, heads, causal, and calls in a pass of the encoder (the last: of the UNet)
ATTENTIONS = (
    (591, 591, 16, False, 12),
    (77, 77, 16, True, 24),
    (77, 591, 16, False, 12),
    (4096, 4096, 5, False, 5),
)


@dataclass(frozen=True)
class Case:
    """One operation at one size. Ours and the reference take `inputs`; the first `batched` of them lead with B."""

    name: str
    operation: str  # its name in kernels/tuned.json
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    batched: int
    flops: int
    moved: int  # bytes read and written at the least
    speedup: float = 1.0  # the target, over the best rival
    bandwidth: float = 0.0  # the target, of copying's
    calls: int = 1  # in one pass of the model
    tolerance: float = 0.0  # the RMS error that is correct whatever that of plain operations is
    tunes: tuple[str, str] | None = None  # (kernel, class of shapes), where no launch of ours tells
    reference_class: str = ""  # its class of shapes in the "reference" lists of kernels/tuned.json


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def cases(device: str, dtype: torch.dtype, batch: int, toy: bool) -> list[Case]:
    """Return all cases; toy sizes are for Triton's interpreter."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    stages = [(5, 32, 1, 1)] if toy else STAGES
    found = [case for stage in stages for case in _stage(random, batch, 4 if toy else 12, *stage)]
    sizes = ((9, 9, 1, True, 1),) if toy else ATTENTIONS
    found += [_attention(random, batch, 16 if toy else 64, *size) for size in sizes]
    for m, heads in [(9, 1)] if toy else [(4096, 5), (1024, 10), (256, 20)]:
        found.append(_cross_attention(random, batch, m, heads))
    for tokens, c, calls in [(3, 8, 1)] if toy else [(591, 1024, 25), (77, 1024, 84)]:
        found.append(_add_norm(random, batch, tokens, c, calls))
    if toy or eight.has_fp8(torch.device(device)):
        for side, c, _, blocks in [(2, 16, 1, 1)] if toy else STAGES:
            found.append(_fp8_linear(random, batch, side * side, c, 4 * c, False, 2 * blocks))
            found.append(_fp8_linear(random, batch, side * side, 4 * c, c, True, 2 * blocks))
    small = 4 if toy else 384
    pixels = torch.randint(0, 256, (batch, 3, small, small), dtype=torch.uint8, generator=generator, device=device)
    constants = [torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD)]
    upsampling = Case(
        name=f"upsample_normalize {small} to {2 * small}",
        operation="upsample_normalize",
        ours=upsample.upsample_normalize,
        reference=upsample.upsample_normalize_reference,
        inputs=[pixels, upsample.bicubic_matrix(small, 2 * small).to(device), *constants],
        batched=1,
        flops=200 * pixels.numel(),
        moved=_size(pixels) * 17,
    )
    return [*found, upsampling]


def _stage(random: Callable, batch: int, size: int, side: int, c: int, heads: int, blocks: int) -> list[Case]:
    """Return the operations of a stage of DaViT."""
    qkv, n = random(batch, side, side, 3 * c), side * side
    attending = Case(
        name=f"window_attention {side}x{side}x{c}",
        operation="window_attention",
        ours=lambda x, b: window.window_attention(x, b, heads, size),
        reference=lambda x, b: window.window_attention_reference(x, b, heads, size),
        inputs=[qkv, random(3 * c)],
        batched=1,
        flops=4 * batch * n * size**2 * c,
        moved=_size(qkv) * 4 // 3,
        speedup=3,
        calls=blocks,
    )
    between_channels = Case(
        name=f"channel_attention {n}x{c}",
        operation="channel_attention",
        ours=lambda x: channel.channel_attention(x, heads),
        reference=lambda x: channel.channel_attention_reference(x, heads),
        inputs=[qkv.flatten(1, 2)],
        batched=1,
        flops=4 * batch * n * c * (c // heads),
        moved=_size(qkv) * 4 // 3,
        speedup=2,
        bandwidth=0.7,
        calls=blocks,
    )
    x, weights = random(batch, side, side, c), [random(c, 1, 3, 3), random(c), random(c), random(c)]
    convolution = Case(
        name=f"dwconv_norm {side}x{side}x{c}",
        operation="dwconv_norm",
        ours=dwconv.dwconv_norm,
        reference=dwconv.dwconv_norm_reference,
        inputs=[x, *weights],
        batched=1,
        flops=18 * x.numel(),
        moved=3 * _size(x),
        speedup=2,
        bandwidth=0.7,
        calls=1,
        reference_class=f"c{c}",
    )
    with_residual = Case(
        name=f"dwconv_norm {side}x{side}x{c} + residual",
        operation="dwconv_norm",
        ours=lambda x, r, *w: dwconv.dwconv_norm(x, *w, residual=r),
        reference=lambda x, r, *w: dwconv.dwconv_norm_reference(x + r, *w),
        inputs=[x, random(*x.shape), *weights],
        batched=2,
        flops=19 * x.numel(),
        moved=4 * _size(x),
        speedup=2,
        bandwidth=0.7,
        calls=4 * blocks - 1,
    )
    hidden, bias = random(4 * c, c) * c**-0.5, random(4 * c)
    product = Case(
        name=f"linear {n}x{c} to {4 * c} with GELU",
        operation="linear",
        ours=lambda x, w, b: dense.linear(x, w, b, gelu=True),
        reference=lambda x, w, b: dense.linear_reference(x, w, b, gelu=True),
        inputs=[x, hidden, bias],
        batched=1,
        flops=8 * x.numel() * c,
        moved=5 * _size(x) + _size(hidden, bias),
        calls=2 * blocks,
        tunes=("linear.gelu", f"k{c}n{4 * c}"),
    )
    return [attending, between_channels, convolution, with_residual, product]


def _attention(random: Callable, batch: int, d: int, m: int, n: int, heads: int, causal: bool, calls: int) -> Case:
    """Return softmax attention of m queries to n keys, by our kernel even where tuned.json says SDPA."""
    q, k, v = (random(batch, length, heads, d).transpose(1, 2) for length in (m, n, n))
    return Case(
        name=f"attention {m}x{n}{' causal' if causal else ''}",
        operation="attention",
        ours=lambda q, k, v: attn.attention_op(q, k, v, causal)[0],
        reference=lambda q, k, v: attn.attention_reference(q, k, v, causal),
        inputs=[q, k, v],
        batched=3,
        flops=4 * batch * heads * m * n * d // (2 if causal else 1),
        moved=_size(q, k, v, q),
        calls=calls,
        reference_class=f"m{m}n{n}d{d}{' causal' if causal else ''}",
    )


def _cross_attention(random: Callable, batch: int, m: int, heads: int) -> Case:
    q, k, v = (random(batch, length, heads, 64) for length in (m, 77, 77))
    return Case(
        name=f"cross_attention {m}x77, {heads} heads",
        operation="cross_attention",
        ours=cross.cross_attention_op,
        reference=cross.cross_attention_reference,
        inputs=[q, k, v],
        batched=3,
        flops=4 * batch * heads * m * 77 * 64,
        moved=_size(q, k, v, q),
        speedup=1.3,
        reference_class=f"m{m}n77d64",
    )


def _add_norm(random: Callable, batch: int, tokens: int, c: int, calls: int) -> Case:
    """Return a sum and its norm in BART or CLIP."""
    x = random(batch, tokens, c)
    return Case(
        name=f"add_norm {tokens}x{c}",
        operation="add_norm",
        ours=lambda x, r, w, b: adding.add_norm_op(x, r, w, b, 1e-5, False)[1],
        reference=lambda x, r, w, b: adding.add_norm_reference(x, r, w, b)[1],
        inputs=[x, random(*x.shape), random(c), random(c)],
        batched=2,
        flops=8 * x.numel(),
        moved=3 * _size(x),
        bandwidth=0.7,
        calls=calls,
    )


def _fp8_linear(random: Callable, batch: int, n: int, inputs: int, outputs: int, gelu: bool, calls: int) -> Case:
    """Return a layer of DaViT's MLP by 8-bit floats, with the GELU before it in the kernel that quantizes."""
    x, weight, bias = random(batch, n, inputs), random(outputs, inputs) * inputs**-0.5, random(outputs)
    quantized = eight.quantize_rows_reference(weight)
    product = eight.scaled_product if eight.has_fp8(x.device) else eight.fp8_linear_reference
    return Case(
        name=f"fp8_linear {n}x{inputs} to {outputs}{' after GELU' if gelu else ''}",
        operation="fp8_linear",
        ours=lambda x, w, b: product(*eight.quantize_rows(x, gelu), *quantized, b),
        reference=lambda x, w, b: dense.linear_reference(functional.gelu(x) if gelu else x, w, b),
        inputs=[x, weight, bias],
        batched=1,
        flops=2 * x.numel() * outputs // 2,  # 8-bit floats multiply at twice the rate
        moved=_size(x) * 2 + _size(bias) + weight.numel() + batch * n * outputs * x.element_size(),
        speedup=1.4,
        calls=calls,
        tolerance=0.05,
    )
