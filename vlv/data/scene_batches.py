"""Batches of the synthetic world, as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlv.data import scenes


def images(seeds: range | list[int]) -> Tensor:
    """Pictures of the scenes with these seeds: uint8 [B, 3, 64, 64], RGB."""
    pixels = np.stack([scenes.render(scenes.sample(s)) for s in seeds])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def seeds(step: int, batch: int, pool: int) -> list[int]:
    """The scene seeds of a training step, drawn from `range(pool)`; they follow from the step alone."""
    return np.random.default_rng([pool, step]).integers(pool, size=batch).tolist()
