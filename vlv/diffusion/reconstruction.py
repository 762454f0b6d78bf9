"""What draws pictures with a text-to-image model: from embeddings (TorchReconstructor), and from captions
(CaptionReconstructor).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlv.diffusion.samplers import each, scheduler

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vlv.checkpoints.folder import Checkpoint
    from vlv.model.encoder import VLVEncoder


class Reconstructor(Protocol):
    """What draws from embeddings: PyTorch here, and every engine of the room that exports."""

    def context(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> context [B, N, C]."""
        ...

    def reconstruct(self, context: Tensor, steps: int, guidance: float, seed: int, sampler: str = "ddim") -> Tensor:
        """Context -> pictures, uint8 [B, 3, S, S]."""
        ...


class TorchReconstructor:
    """An encoder and a diffusers folder, as PyTorch runs them."""

    def __init__(self, encoder: VLVEncoder, folder: Path, device: str, dtype: torch.dtype | None = None):
        """`dtype`: of the text-to-image model (float32)."""
        import torch

        from vlv.diffusion.t2i import T2I

        self.encoder = encoder.to(device)
        self.reconstruct = T2I.load(folder, dtype or torch.float32).to(device).reconstruct

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TorchReconstructor:
        """A checkpoint's own models, in bfloat16 on a GPU where there is one. Raises CheckpointError without t2i/."""
        import torch

        from vlv.common.command import hush

        folder = checkpoint.t2i  # before anything is loaded
        hush()
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        return cls(checkpoint.load_encoder(dtype), folder, device, dtype)

    def context(self, images: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            return self.encoder.context(images.to(self.encoder.device))


class CaptionReconstructor:
    """Any diffusers text-to-image folder, the way the paper judges captions: it draws what they say."""

    def __init__(self, folder: Path, device: str):
        import diffusers
        import torch

        options = {"safety_checker": None} if (folder / "text_encoder").is_dir() else {}
        found = diffusers.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.float32, **options)
        self._pipeline: Any = found.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = self._pipeline.scheduler.config

    def draw(self, captions: list[str], steps: int, guidance: float, seed: int | Sequence[int], sampler: str) -> Tensor:
        """Pictures, uint8 [B, 3, S, S]; each one's noise follows from `seed` alone, one for all or each its own."""
        import numpy as np
        import torch

        if hasattr(self._pipeline.scheduler, "alphas_cumprod"):  # flow-matching models (SD 3.5) keep their own sampler
            self._pipeline.scheduler = scheduler(sampler, self._settings)
        drawn = self._pipeline(
            captions,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(s) for s in each(seed, len(captions))],
            output_type="np",
        ).images
        return torch.from_numpy(np.round(np.stack(drawn).transpose(0, 3, 1, 2) * 255).astype(np.uint8))
