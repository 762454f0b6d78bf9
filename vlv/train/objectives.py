"""The losses of both stages as modules over a micro-batch, which DDP and FSDP2 can wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_unshuffle

from vlv.model.encoder import VLVEncoder
from vlv.train.config import TrainConfig

if TYPE_CHECKING:  # diffusers and transformers: seconds of imports that an objective of another kind does not need
    from vlv.data.latents import LatentCache
    from vlv.diffusion.t2i import T2I
    from vlv.model.captioner import Captioner


class Objective(nn.Module):
    """A loss whose weights the trainer optimises: `forward(batch)` returns scalars, of which "loss" is minimised.

    The trainer optimises what requires gradients when it starts. The two hooks below let a stage differ.
    """

    def parameter_groups(self, lr: float) -> list[dict]:
        """Return AdamW's parameter groups with their peak learning rates; by default one group."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def before_step(self, step: int) -> None:
        """Called before every step, for weights that join later."""


class Stage1(Objective):
    """The frozen model's noise error from the encoder's context (paper section 3.2).

    `readout`, a linear layer that is dropped afterwards, reads the target latents from the image features; its error
    is added to the loss. `last_layer_lr` scales the learning rate of the projection's last layer.
    """

    def __init__(
        self,
        encoder: VLVEncoder,
        t2i: T2I,
        cache: LatentCache | None = None,
        config: TrainConfig | None = None,
        readout: nn.Linear | None = None,
        last_layer_lr: float = 1.0,
    ):
        super().__init__()
        config = config or TrainConfig()
        self.encoder, self.cache, self.readout = encoder, cache, readout
        self.noise_draws, self.readout_weight = config.noise_draws, config.readout
        self.last_layer_lr = last_layer_lr
        self._frozen = [t2i]  # in a list, so that it is neither sharded nor saved nor trained

    def parameter_groups(self, lr: float) -> list[dict]:
        last = {id(p) for p in self.encoder.bottleneck.projection[2].parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in last], "lr": lr},
            {"params": [p for p in trained if id(p) in last], "lr": lr * self.last_layer_lr},
        ]
        return groups if self.last_layer_lr != 1 else super().parameter_groups(lr)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """batch: pixels uint8 [B, 3, S, S]; latents [B, c, s, s], or where they are to be encoded, `place`s of rows."""
        (t2i,) = self._frozen
        target = batch["latents"] if "latents" in batch else self._latents(batch)
        features = self.encoder.features(batch["pixels"])
        noise = t2i.noise_loss(target, self.encoder.bottleneck(features), self.noise_draws)
        if self.readout is None:
            return {"loss": noise}
        read = self.readout(features[:, 1:])  # the mean token comes first
        cells = round((read.shape[2] // target.shape[1]) ** 0.5)  # latents a side of one feature
        error = mse_loss(read, pixel_unshuffle(target, cells).flatten(2).transpose(1, 2))
        return {"loss": noise + self.readout_weight * error, "noise": noise, "readout": error}

    @torch.no_grad()
    def _latents(self, batch: dict) -> Tensor:
        """Return scaled samples of the autoencoder's posterior: float32 [B, c, s, s]."""
        vae, pixels = self._frozen[0].vae, batch["pixels"]

        def encode() -> Tensor:
            # the published loop keeps the autoencoder in float32: in half precision it can overflow
            with torch.autocast(pixels.device.type, enabled=False):
                posterior = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
            return torch.stack([posterior.mean, posterior.std], 1)

        moments = self.cache.moments(batch["place"], encode) if self.cache else encode()
        mean, std = moments.float().to(pixels.device).unbind(1)
        return (mean + std * torch.randn_like(mean)) * vae.config.scaling_factor


class Stage2(Objective):
    """The captions' cross-entropy from the prompt embeddings (paper section 3.3).

    The encoder is trained from step `encoder_from` on, at a learning rate of its own if `encoder_lr` is given.
    """

    def __init__(self, captioner: Captioner, config: TrainConfig):
        super().__init__()
        self.captioner, self.config = captioner, config
        encoder = captioner.encoder
        ours = {f"captioner.encoder.{n}" for n, p in encoder.named_parameters() if p.requires_grad}
        self._late = {n for n in ours if not n.startswith("captioner.encoder.to_llm.")}  # names: FSDP replaces tensors

    def parameter_groups(self, lr: float) -> list[dict]:
        if not self.config.encoder_lr:
            return super().parameter_groups(lr)
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in trained if n not in self._late], "lr": lr},
            {"params": [p for n, p in trained if n in self._late], "lr": self.config.encoder_lr},
        ]

    def before_step(self, step: int) -> None:
        if self.config.encoder_from:
            for name, p in self.named_parameters():
                if name in self._late:
                    p.requires_grad_(step >= self.config.encoder_from)

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """batch: pixels uint8 [B, 3, S, S] and captions."""
        c = self.config
        return {"loss": self.captioner.loss(batch["pixels"], batch["caption"], c.max_tokens, c.end_token)}


class Autoencoder(Objective):
    """Pixel reconstruction plus a small KL term (Rombach et al. 2022), for the toy text-to-image model.

    Pixels off the background weigh more, or the plain background, most of a scene, takes all capacity.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """batch: pixels uint8 [B, 3, S, S]."""
        pixels = batch["pixels"] / 127.5 - 1
        background = pixels.flatten(2).median(dim=2).values[..., None, None]
        weight = 1 + 4 * ((pixels - background).abs().amax(1, keepdim=True) > 0.1).float()
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        pixel = (weight * (decoded - pixels).square()).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": pixel + 1e-5 * kl, "pixel": pixel, "kl": kl}


class Denoiser(Objective):
    """The noise error of a UNet and its text encoder from true prompts, for the toy text-to-image model."""

    def __init__(self, t2i: T2I):
        super().__init__()
        self.unet, self.text_encoder = t2i.unet, t2i.text_encoder
        self._t2i = [t2i]

    def forward(self, batch: dict) -> dict[str, Tensor]:
        """batch: scaled latents [B, c, s, s] and prompts."""
        (t2i,) = self._t2i
        return {"loss": t2i.noise_loss(batch["latents"], t2i.encode_text(batch["prompts"]))}
