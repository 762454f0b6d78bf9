"""Build the diffusers scheduler of a sampler, the seeds of a batch, and check what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from vlv.common.command import UserError
from vlv.diffusion.samplers import SAMPLERS


class DiffusionError(UserError, ValueError):
    """Raised where a text-to-image model cannot be loaded or cannot compute what is asked."""


def make_scheduler(sampler: str, config: Mapping, steps: int) -> SchedulerMixin:
    """Return the scheduler of a sampler for `steps` steps of a model whose own scheduler has `config`.

    Up to half of the model's time steps, the spacing is the model's own. Above, the spacing that Stable Diffusion
    names ("leading") would begin far below the highest noise level, or above the schedule's end; only all time steps
    can be taken, which needs "trailing". Raises DiffusionError for another number of steps, or an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise DiffusionError(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    trained = config.get("num_train_timesteps", 1000)
    if not (1 <= steps <= trained // 2 or steps == trained):
        raise DiffusionError(
            f"{steps} steps: this model's schedule of {trained} time steps takes 1 to {trained // 2}, or {trained}"
        )
    name, options = SAMPLERS[sampler]
    spacing = {"timestep_spacing": "trailing"} if steps == trained else {}
    return getattr(diffusers, name).from_config(config, **options, **spacing)


def require_finite(name: str, values: Tensor) -> Tensor:
    """Return `values` if they are all finite, else raise DiffusionError: as an image they would be black."""
    if not torch.isfinite(values).all():
        raise DiffusionError(
            f"the text-to-image model's {name} are not finite: it overflowed in {str(values.dtype).split('.')[-1]}, "
            "or its weights or the context are damaged; try float32"
        )
    return values


def batch_seeds(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """Return `count` seeds, one for each image: `seed` repeated, or the seeds given. Raises DiffusionError."""
    seeds = [seed] * count if isinstance(seed, int) else seed
    if len(seeds) != count:
        raise DiffusionError(f"{len(seeds)} seeds for {count} images: expected one seed, or one for each image")
    return seeds
