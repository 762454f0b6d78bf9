"""The samplers that users choose by name, all diffusers'. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

# scheduler class and its settings
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def scheduler(name: str, config):
    """The sampler of this name for a model whose scheduler has `config`. Raises ValueError."""
    import diffusers

    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}; there are {', '.join(SAMPLERS)}")
    kind, options = SAMPLERS[name]
    return getattr(diffusers, kind).from_config(config, **options)


def each(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """The seed of each of `count` pictures: the same, or as many as are given. Raises ValueError."""
    seeds = [seed] * count if isinstance(seed, int) else seed
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures")
    return seeds
