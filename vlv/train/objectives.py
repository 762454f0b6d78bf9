"""The losses of both stages as modules over a micro-batch, which DDP and FSDP2 can wrap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlv.data.latents import LatentCache
from vlv.diffusion.t2i import T2I
from vlv.model.captioner import Captioner
from vlv.model.encoder import VLVEncoder


class Stage1(nn.Module):
    """The frozen model's noise error from the encoder's context (paper section 3.2)."""

    def __init__(self, encoder: VLVEncoder, t2i: T2I, cache: LatentCache | None = None):
        super().__init__()
        self.encoder, self.cache = encoder, cache
        self._frozen = [t2i]  # in a list, so that it is neither sharded nor saved nor trained

    def forward(self, batch: dict) -> Tensor:
        """batch: pixels uint8 [B, 3, S, S] and, with a cache, the rows' places."""
        (t2i,) = self._frozen
        return t2i.noise_loss(self._latents(batch), self.encoder.context(batch["pixels"]))

    @torch.no_grad()
    def _latents(self, batch: dict) -> Tensor:
        """Scaled samples of the autoencoder's posterior: float32 [B, c, s, s]."""
        vae, pixels = self._frozen[0].vae, batch["pixels"]

        def encode() -> Tensor:
            # the published loop keeps the autoencoder in float32: in half precision it can overflow
            with torch.autocast(pixels.device.type, enabled=False):
                posterior = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
            return torch.stack([posterior.mean, posterior.std], 1)

        moments = self.cache.moments(batch["place"], encode) if self.cache else encode()
        mean, std = moments.float().to(pixels.device).unbind(1)
        return (mean + std * torch.randn_like(mean)) * vae.config.scaling_factor


class Stage2(nn.Module):
    """The captions' cross-entropy from the prompt embeddings (paper section 3.3)."""

    def __init__(self, captioner: Captioner, max_tokens: int, end_token: bool):
        super().__init__()
        self.captioner, self.max_tokens, self.end_token = captioner, max_tokens, end_token

    def forward(self, batch: dict) -> Tensor:
        """batch: pixels uint8 [B, 3, S, S] and captions."""
        return self.captioner.loss(batch["pixels"], batch["caption"], self.max_tokens, self.end_token)
