"""Name the samplers that users can choose. Imports nothing, so that commands can list them quickly."""

from __future__ import annotations

# the class in diffusers, and its settings
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
