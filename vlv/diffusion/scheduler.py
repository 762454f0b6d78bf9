"""Build the diffusers scheduler of a sampler, and the seeds of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
from diffusers import SchedulerMixin

from vlv.common.command import UserError
from vlv.diffusion.samplers import SAMPLERS


class DiffusionError(UserError, ValueError):
    """Raised where a text-to-image model cannot be loaded or cannot compute what is asked."""


def make_scheduler(sampler: str, config: Mapping) -> SchedulerMixin:
    """Return the scheduler of a sampler for a model whose own scheduler has `config`. Raises DiffusionError."""
    if sampler not in SAMPLERS:
        raise DiffusionError(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    name, options = SAMPLERS[sampler]
    return getattr(diffusers, name).from_config(config, **options)


def batch_seeds(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """Return `count` seeds, one for each image: `seed` repeated, or the seeds given. Raises DiffusionError."""
    seeds = [seed] * count if isinstance(seed, int) else seed
    if len(seeds) != count:
        raise DiffusionError(f"{len(seeds)} seeds for {count} images: expected one seed, or one for each image")
    return seeds
