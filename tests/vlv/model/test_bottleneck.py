"""Our BART, CLIP text layers and whole encoder against transformers' with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import published_encoder as published
from tests.vlv.agreement import random_weights, relative_error
from tests.vlv.model.test_davit import SMALL
from vlv.model.bottleneck import Bart, ClipText
from vlv.model.config import PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder

BASE = VLVConfig(
    vision=SMALL, image_size=96, image_positions=10, width=64, heads=4, ffn=128, encoder_layers=2, decoder_layers=3,
    text_positions=80, prompt_tokens=14, queries=77, context_width=64, context_heads=4, context_ffn=128,
    context_layers=2, llm_width=96,
)  # fmt: skip
CONFIGS = {
    "published-shape": BASE,
    "few-queries": replace(BASE, queries=5, heads=8, context_heads=1, llm_width=40),
    "unequal-widths": replace(BASE, width=96, heads=6, ffn=80, context_width=48, context_heads=3, queries=31),
    "quick-gelu": replace(BASE, context_activation="quick_gelu", encoder_layers=1, decoder_layers=1, prompt_tokens=3),
    "tiny": PRESETS["tiny"],
}


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bart_encoder_agrees(config: VLVConfig):
    ours = random_weights(Bart(config, config.encoder_layers, decoder=False))
    theirs = published.bart(ours, config, decoder=False)
    x = noise(2, 29, config.width)
    assert relative_error(ours(x), theirs(inputs_embeds=x).last_hidden_state) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bart_decoder_agrees(config: VLVConfig):
    ours = random_weights(Bart(config, config.decoder_layers, decoder=True))
    theirs = published.bart(ours, config, decoder=True)
    x, memory = noise(2, config.queries, config.width), noise(2, 29, config.width, seed=2)
    expected = theirs(inputs_embeds=x, encoder_hidden_states=memory, use_cache=False).last_hidden_state
    assert relative_error(ours(x, memory), expected) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_clip_text_agrees(config: VLVConfig):
    ours = random_weights(ClipText(config))
    theirs = published.clip_text(ours, config)
    x = noise(2, config.queries, config.context_width)
    assert relative_error(ours(x), published.run_clip_text(theirs, x)) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whole_encoder_agrees(config: VLVConfig, attention: str):
    ours = random_weights(VLVEncoder(config))
    size = config.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    x = published_pixels(ours, pixels)
    assert relative_error(ours(pixels), published.PublishedEncoder(ours, attention)(x)) < 1e-5


def published_pixels(encoder: VLVEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's input [B, 3, T, T]; that it is the published processor's, test_image_prep.py tests."""
    from kernels.upsample_normalize import upsample_normalize

    return upsample_normalize(pixels, encoder.resize, encoder.mean, encoder.std).permute(0, 3, 1, 2)


def test_stage_one_encoder_says_that_it_writes_no_captions():
    encoder = VLVEncoder(replace(PRESETS["tiny"], llm_width=0))
    with pytest.raises(ValueError, match="stage-1"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 64, dtype=torch.uint8)])
def test_wrong_images_are_named(bad: torch.Tensor):
    with pytest.raises(ValueError, match=r"takes uint8 images \[B, 3, 64, 64\]"):
        VLVEncoder(PRESETS["tiny"])(bad)
