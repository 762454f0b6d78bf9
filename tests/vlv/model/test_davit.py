"""Our vision tower against transformers' Florence-2 tower with the same weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks import published_encoder as published
from tests.vlv.agreement import random_weights, relative_error
from vlv.model.config import DaViTConfig
from vlv.model.davit import DaViT

SMALL = DaViTConfig(dims=(16, 32, 64, 96), heads=(1, 2, 4, 6), groups=(1, 2, 4, 6), depths=(1, 1, 2, 1))
CONFIGS = {
    "published-shape": SMALL,
    "other-groups": DaViTConfig(
        dims=(24, 48, 64, 80), heads=(3, 4, 8, 5), groups=(2, 6, 4, 10), depths=(1, 2, 1, 1), window=5
    ),
    "two-stages": DaViTConfig(
        dims=(32, 64), heads=(2, 2), groups=(4, 1), depths=(2, 1), patches=(8, 3), strides=(8, 2), paddings=(0, 1),
        prenorm=(False, True), window=7,
    ),
    "prenorm-off": DaViTConfig(
        dims=(16, 32, 48), heads=(2, 4, 3), groups=(1, 2, 3), depths=(1, 1, 1), patches=(7, 3, 3), strides=(4, 2, 2),
        paddings=(3, 1, 1), prenorm=(False, False, True), window=4,
    ),
}  # fmt: skip
# 192: a map of 48, 24, 12, 6 (the last is padded to a window of 12); the others are no multiple of any window
SIZES = [(192, 192), (160, 160), (224, 136), (88, 248)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tower_agrees(config: DaViTConfig, size: tuple[int, int]):
    ours = random_weights(DaViT(config))
    theirs = published.tower(ours, config)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixels).last_hidden_state.permute(0, 2, 3, 1)
    assert relative_error(ours(pixels.permute(0, 2, 3, 1)), expected) < 1e-5


def test_padding_of_the_window_takes_part_in_the_softmax():
    """A 6 x 6 map in a window of 12: without the padding's keys the result would differ by far more than 1e-5."""
    ours = random_weights(DaViT(SMALL))
    cut = random_weights(DaViT(DaViTConfig(**{**vars(SMALL), "window": 6})))
    pixels = torch.randn(1, 192, 192, 3, generator=torch.Generator().manual_seed(2))
    assert relative_error(ours(pixels), cut(pixels)) > 1e-2
