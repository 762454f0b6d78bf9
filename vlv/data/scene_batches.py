"""Batches of the synthetic world, as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlv.data import scenes


@dataclass(frozen=True)
class Pass:
    """The scenes of one forward pass."""

    step: int
    position: int  # number of the pass in the run, which decides its noise
    step_seeds: list[int]  # the scenes of the whole step
    part: slice  # this pass's share of them

    @property
    def seeds(self) -> list[int]:
        return self.step_seeds[self.part]


def images(seeds: range | list[int]) -> Tensor:
    """Render the scenes with these seeds: uint8 [B, 3, 64, 64], RGB."""
    pixels = np.stack([scenes.render(scenes.sample(s)) for s in seeds])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def seeds(step: int, batch: int, pool: int) -> list[int]:
    """Draw the scene seeds of a training step from `range(pool)`; they follow from the step alone."""
    return np.random.default_rng([pool, step]).integers(pool, size=batch).tolist()


def passes(first: int, batch: int, micro_batch: int, pool: int, rank: int = 0, processes: int = 1) -> Iterator[Pass]:
    """Yield one process's forward passes of `micro_batch` scenes, from the run's image number `first` on, for ever."""
    position = first // micro_batch + rank
    while True:
        step, start = divmod(position * micro_batch, batch)
        yield Pass(step, position, seeds(step, batch, pool), slice(start, start + micro_batch))
        position += processes
