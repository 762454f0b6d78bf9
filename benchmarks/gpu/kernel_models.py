"""The whole encoder, and a step of SD 2.1's UNet, for benchmarks.gpu.kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch

from benchmarks.encoder_cpu import flops, prepared, random_images
from benchmarks.gpu.kernels import OURS, THEIRS, Clock, eager_and_compiled, judge, summary
from benchmarks.published_encoder import PublishedEncoder
from kernels.runtime.dispatch import references
from vlv.checkpoints import random_weights
from vlv.model.config import PRESETS, DaViTConfig
from vlv.model.encoder import VLVEncoder
from vlv.train.initialize import SD21_UNET

TOY = replace(
    PRESETS["tiny"], image_size=16, encoder_layers=1, decoder_layers=1, context_layers=1,
    vision=DaViTConfig((32,), (1,), (1,), (1,), (8,), (8,), (0,), (False,), 4),
)  # fmt: skip


def models(
    clock: Clock, limits: dict[str, float], dtype: torch.dtype, batch: int, toy: bool, only: str
) -> list[Callable[[], dict]]:
    found = []
    if only in "encoder":
        found.append(lambda: encoder(clock, limits, dtype, batch, toy))
    if only in "unet":
        if find_spec("diffusers"):
            found.append(lambda: unet(clock, limits, dtype, 4 if not toy else 1, toy))
        else:
            print("no UNet step: diffusers is not installed (pip install diffusers)", file=sys.stderr)
    return found


def encoder(clock: Clock, limits: dict[str, float], dtype: torch.dtype, batch: int, toy: bool) -> dict:
    """Ours against transformers' implementation of the published encoder, eager and compiled, same weights."""
    config = TOY if toy else PRESETS["qwen2.5-3b"]
    with torch.device("cpu"):
        ours = random_weights.encoder(config, dtype)
    exact = VLVEncoder(config).eval()
    exact.load_state_dict(ours.state_dict())  # the same rounded weights, computed with in float32
    pixels = random_images(config, batch).to(clock.device)
    with references():
        expected = exact.to(clock.device)(pixels[:2])
    del exact
    ours = ours.to(clock.device)
    theirs = PublishedEncoder(ours, "sdpa").to(clock.device)
    x = prepared(ours, pixels)
    result = {"name": "encoder", **judge(ours(pixels)[:2], theirs(x)[:2], expected)}
    if not result["correct"]:
        return result
    times = eager_and_compiled(clock, OURS, ours, lambda call: call(pixels))
    times |= eager_and_compiled(clock, THEIRS, theirs, lambda call: call(x))
    return summary(result, times, flops(config, batch) / limits["flops_per_s"] * 1e3, target=2.0) | {
        "pictures_per_s": batch / times["ours compiled"] * 1e3, "pictures_per_s_target": 240, "ceiling_target": 0.5,
    }  # fmt: skip


def unet(clock: Clock, limits: dict[str, float], dtype: torch.dtype, batch: int, toy: bool) -> dict:
    """One step of SD 2.1-base's UNet at 512 px with guidance (twice the batch), random weights."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from vlv.diffusion.unet import fixed_context

    sizes = {"block_out_channels": (32, 32), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 16}
    sizes |= {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1, "sample_size": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    sizes, tokens = (sizes, 5) if toy else (SD21_UNET, 77)
    torch.manual_seed(0)
    side = sizes["sample_size"]
    exact = UNet2DConditionModel(**sizes).eval().to(clock.device)
    latents = torch.randn(2 * batch, 4, side, side, device=clock.device)
    context = torch.randn(2 * batch, tokens, sizes["cross_attention_dim"], device=clock.device)
    rounded = UNet2DConditionModel(**sizes).eval().to(clock.device, dtype)
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    with FlopCounterMode(display=False) as counter:
        expected = exact(latents, 500, encoder_hidden_states=context).sample
    del exact
    latents, context = latents.to(dtype), context.to(dtype)
    step = torch.tensor(500, device=clock.device)

    def predict(model: Callable) -> torch.Tensor:
        return model(latents, step, encoder_hidden_states=context).sample

    with fixed_context(rounded, context):
        found = predict(rounded)
    result = {"name": "unet step", **judge(found, predict(rounded), expected)}
    if not result["correct"]:
        return result
    times = eager_and_compiled(clock, THEIRS, rounded, predict)
    with fixed_context(rounded, context):
        times |= eager_and_compiled(clock, OURS, rounded, predict)
    return summary(result, times, counter.get_total_flops() / limits["flops_per_s"] * 1e3, target=1.15)
