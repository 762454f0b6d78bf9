"""Reconstruct images from the encoder's context (TorchReconstructor) or from captions (CaptionReconstructor)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import hush
from vlv.common.device import choose_device, inference_dtype
from vlv.diffusion.scheduler import batch_seeds, make_scheduler, require_finite
from vlv.diffusion.t2i import T2I
from vlv.model.encoder import VLVEncoder


class Reconstructor(Protocol):
    """Encode images to a context and reconstruct images from it: in PyTorch here, or in an exported runtime."""

    def context(self, images: Tensor) -> Tensor:
        """Encode images uint8 [B, 3, S, S] to a context [B, N, C]."""
        ...

    def reconstruct(self, context: Tensor, steps: int, guidance: float, seed: int, sampler: str = "ddim") -> Tensor:
        """Reconstruct images uint8 [B, 3, S, S] from a context [B, N, C]."""
        ...


class TorchReconstructor:
    """Reconstruct with an encoder and a diffusers folder in PyTorch."""

    def __init__(self, encoder: VLVEncoder, folder: Path, device: str | torch.device, dtype: torch.dtype | None = None):
        """Move both models to `device`; `dtype` is that of the text-to-image model (float32)."""
        self.encoder = encoder.to(device)
        self.reconstruct = T2I.load(folder, dtype or torch.float32).to(device).reconstruct

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TorchReconstructor:
        """Load a checkpoint's own models, on a GPU in bfloat16 where there is one. Raises CheckpointError."""
        folder = checkpoint.t2i  # before anything is loaded
        hush()
        device = choose_device()
        dtype = inference_dtype(device)
        return cls(checkpoint.load_encoder(dtype), folder, device, dtype)

    @torch.inference_mode()
    def context(self, images: Tensor) -> Tensor:
        """Encode images uint8 [B, 3, S, S] to a context [B, N, C]."""
        return self.encoder.context(images.to(self.encoder.device))


class CaptionReconstructor:
    """Generate images from captions with any diffusers text-to-image folder, as the paper judges captions."""

    def __init__(self, folder: Path, device: str | torch.device):
        """Load the folder's pipeline in float32, without a safety checker."""
        options = {"safety_checker": None} if (folder / "text_encoder").is_dir() else {}
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32, **options)
        self._pipeline: Any = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = self._pipeline.scheduler.config

    def reconstruct(
        self, captions: list[str], steps: int, guidance: float, seed: int | Sequence[int], sampler: str
    ) -> Tensor:
        """Generate images uint8 [B, 3, S, S] on the CPU; each image's noise follows from its seed alone."""
        if hasattr(self._pipeline.scheduler, "alphas_cumprod"):  # flow-matching models (SD 3.5) keep their own sampler
            self._pipeline.scheduler = make_scheduler(sampler, self._settings, steps)
        images = self._pipeline(
            captions,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(s) for s in batch_seeds(seed, len(captions))],
            output_type="np",
        ).images
        values = require_finite("images", torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        return (values * 255).round().to(torch.uint8)


def interpolate(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return `count` contexts [count, N, C] on the straight line between two [N, C], both ends included."""
    weights = torch.linspace(0, 1, count, device=first.device, dtype=first.dtype)[:, None, None]
    return torch.lerp(first[None], second[None], weights)


def mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return the first `share` of one context's tokens, then the second context's remaining tokens: [N, C].

    This is the paper's compositional generation; the length stays that of the unconditional context.
    """
    cut = round(share * len(first))
    return torch.cat([first[:cut], second[cut:]])
