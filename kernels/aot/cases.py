"""The launches that are built ahead of time: those of the published encoder and of SD 2.1's UNet at 512 px.

They are recorded by running each operation on meta tensors, so a build is exactly what the launcher looks up.
Training needs Triton anyway; its kernels are listed once each, to check their registers and spills.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import add_norm, fp8_linear, upsample_normalize
from kernels import attention as attn
from kernels import channel_attention as channel
from kernels import cross_attention as cross
from kernels import dwconv_norm as dwconv
from kernels import window_attention as window
from kernels.runtime import tuning
from kernels.runtime.launch import recording
from kernels.runtime.spec import Launch

STAGES = ((192, 256, 8), (96, 512, 16), (48, 1024, 32), (24, 2048, 64))  # side, channels, heads of DaViT at 768 px
UNET_HEADS = (5, 10, 20)
BATCH = 32


def _encoder(dtype: torch.dtype) -> None:
    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    upsample = [empty(BATCH, 3, 384, 384, kind=torch.uint8), empty(768, 384, kind=torch.float32)]
    statistics = [empty(3, kind=torch.float32)] * 2
    _run(upsample_normalize.upsample_normalize_op, *upsample, *statistics, dtype)
    for side, c, heads in STAGES:
        _run(window.window_attention_op, empty(BATCH, side, side, 3 * c), empty(3 * c), heads, 12)
        for batch in (8, BATCH):  # their splits are 1, several, and a multiple of 16: all that a build can depend on
            _run(channel.channel_attention_op, empty(batch, side * side, 3 * c), heads)
        x, weights = empty(BATCH, side, side, c), (empty(c, 1, 3, 3), *[empty(c)] * 3, 1e-5)
        # first: kernels.occupancy chooses by the first launch of a class of shapes, and this one needs more registers
        _run(dwconv.add_dwconv_norm_op, x, empty(*x.shape), *weights)
        _run(dwconv.dwconv_norm_op, x, *weights)
    for queries, keys, causal in ((591, 591, False), (77, 77, True), (77, 591, False)):
        q = empty(BATCH, queries, 16, 64).transpose(1, 2)
        kv = empty(BATCH, keys, 3, 16, 64).permute(2, 0, 3, 1, 4)
        _run(attn.attention_op, q, kv[1], kv[2], causal)
    for _, c, _ in STAGES[:3]:  # a stage's last sum, before the norm of the next stage
        x = empty(BATCH, 16, c)
        _run(add_norm.add_norm_op, x, empty(*x.shape), empty(c), empty(c), 1e-5, False)
    for batch in (1, 3, BATCH):  # BART and CLIP: one image, batches of which a multiple of 16 rows come, and others
        x, c = empty(batch, 77, 1024), empty(1024)
        for residual in (x, empty(77, 1024)):  # a map, or positions
            for keep_sum in (True, False):
                _run(add_norm.add_norm_op, x, empty(*residual.shape), c, c, 1e-5, keep_sum)


def _fp8(dtype: torch.dtype) -> None:
    for _, c, _ in STAGES:
        for width, gelu in ((c, False), (4 * c, True)):
            x = torch.empty(BATCH, 77, width, dtype=dtype, device="meta")
            _run(fp8_linear.quantize_rows_op, x, gelu)


def _training(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    side, c, heads = STAGES[2]
    grad = empty(BATCH, side, side, c)
    _run(window.window_attention_backward_op, grad, empty(BATCH, side, side, 3 * c), empty(3 * c), heads, 12)
    _run(channel.channel_attention_backward_op, grad.flatten(1, 2), empty(BATCH, side * side, 3 * c), heads)
    _run(dwconv.dwconv_norm_backward_op, grad, grad, grad, grad, empty(c, 1, 3, 3), empty(c), 1e-5)
    for causal in (False, True):
        q = empty(BATCH, 591, 16, 64).transpose(1, 2)
        logsum = torch.empty(BATCH, 16, 591, device="meta")
        _run(attn.attention_backward_op, q, q, q, q, q, logsum, causal)


def _unet(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for heads in UNET_HEADS:
        side, context = 320 // heads, empty(BATCH, 77, heads, 64)  # 64 x 64 tokens of 5 heads, a quarter of 10 …
        _run(cross.cross_attention_op, empty(BATCH, side * side, heads, 64), context, context)
    q = empty(BATCH, 4096, 5, 64).transpose(1, 2)
    _run(attn.attention_op, q, q, q, False)


def _run(operation, *args) -> None:
    """Run the operation's launcher itself: called on meta tensors, the operation would only return shapes."""
    operation._init_fn(*args)


PARTS: dict[str, Callable[[torch.dtype], None]] = {
    "encoder": _encoder,
    "fp8": _fp8,
    "unet": _unet,
    "training": _training,
}


def launches(target: str | None, dtype: torch.dtype = torch.bfloat16, parts: tuple[str, ...] = tuple(PARTS)):
    """Return the distinct launches of those parts, by key, in the configurations of architecture `target` ("sm90").

    GPUs without 8-bit floats have no launches of the part `fp8`.
    """
    with tuning.forced(target), recording() as record, torch.no_grad():
        for part in parts:
            if part != "fp8" or target not in ("sm80", "sm86"):
                PARTS[part](dtype)
    distinct: dict[str, Launch] = {}
    for start in record:
        distinct.setdefault(start.key(), start)
    return distinct
