"""The samplers that users choose by name, all diffusers'. Imports nothing heavy."""

from __future__ import annotations

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
