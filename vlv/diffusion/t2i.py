"""Load and run the frozen text-to-image model that VLV reconstructs with: a plain diffusers folder.

The folder has the layout of a Stable Diffusion pipeline (`vae`, `unet`, `text_encoder`,
`tokenizer`, `scheduler`) of any width: SD 2.1-base or the toy model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from vlv.diffusion.scheduler import DiffusionError, batch_seeds, make_scheduler, require_finite
from vlv.diffusion.unet import fixed_context


class T2I(nn.Module):
    """Hold a latent diffusion model conditioned on a context of text-encoder width."""

    def __init__(self, vae, unet, text_encoder, tokenizer, scheduler):
        super().__init__()
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> T2I:
        """Load a diffusers folder, frozen and in eval mode. Raises DiffusionError where it is none."""
        folder = Path(folder)
        if not (folder / "unet").is_dir():
            raise DiffusionError(f"{folder} is no diffusers text-to-image folder: it has no unet/")
        t2i = cls(
            AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype),
            UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            DDPMScheduler.from_pretrained(folder / "scheduler"),
        )
        return t2i.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write a diffusers folder that StableDiffusionPipeline.from_pretrained loads as it is."""
        self.pipeline().save_pretrained(folder)

    def pipeline(self) -> Any:
        """Return the components as a StableDiffusionPipeline without safety checker and progress bar."""
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}  # diffusers' types forbid it
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            requires_safety_checker=False,
            **absent,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Encode prompts to a context [B, L, C], padded to the tokenizer's length as Stable Diffusion does."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.vae.device)).last_hidden_state

    def encode_images(self, pixels: Tensor, sample: bool = True) -> Tensor:
        """Encode images uint8 [B, 3, S, S] to scaled latents [B, c, s, s]: a sample of the posterior, or its mode."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype) / 127.5 - 1).latent_dist
        return (posterior.sample() if sample else posterior.mode()) * self.vae.config.scaling_factor

    def noise_loss(self, latents: Tensor, context: Tensor, draws: int = 1) -> Tensor:
        """Return the mean squared error of the UNet's prediction at uniformly drawn time steps (paper section 3.2).

        latents: [B, c, s, s]; context: [B, N, C]. The target is what the model predicts: the noise (SD
        2.1-base), or the velocity (SD 2.1-768 and the toy model), whose error is the noise's over the
        signal's share. Every image gets `draws` independent noises and steps, which lowers the variance
        where encoding the context is the expensive part.
        """
        latents, context = latents.repeat(draws, 1, 1, 1), context.repeat(draws, 1, 1)
        noise = torch.randn_like(latents)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        predicted = self.unet(noisy, steps, encoder_hidden_states=context).sample
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, steps) if velocity else noise
        return mse_loss(predicted.float(), target.float())

    @torch.inference_mode()
    def reconstruct(
        self,
        context: Tensor,
        steps: int = 50,
        guidance: float = 2.0,
        seed: int | Sequence[int] = 0,
        sampler: str = "ddim",
    ) -> Tensor:
        """Reconstruct images uint8 [B, 3, S, S] from a context [B, N, C]; `sampler` is a name of SAMPLERS.

        The unconditional context is the empty prompt's, as published (50 steps, guidance 2.0). Each image's
        noise follows from `seed` alone (or from its own of several seeds), so it does not depend on the batch.
        Raises DiffusionError on an unknown sampler, a number of steps that it cannot take, a context of another length
        than the empty prompt's, and latents or images that are not finite.
        """
        pipeline = self.pipeline()
        pipeline.scheduler = make_scheduler(sampler, self.scheduler.config, steps)
        empty = self.encode_text([""]).expand(len(context), -1, -1)
        if empty.shape[1] != context.shape[1]:
            raise DiffusionError(
                f"the context has {context.shape[1]} tokens, the text encoder's empty prompt {empty.shape[1]}: "
                "guidance needs equal lengths"
            )
        draws = [torch.Generator().manual_seed(s) for s in batch_seeds(seed, len(context))]
        shape = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        context, empty = context.to(self.unet.dtype), empty.to(self.unet.dtype)
        # with guidance the pipeline stacks both, as here
        with fixed_context(self.unet, torch.cat([empty, context]) if guidance > 1 else context):
            latents = pipeline(
                prompt_embeds=context,
                negative_prompt_embeds=empty,
                latents=noise.to(context.device, self.unet.dtype),
                generator=draws,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
        latents = require_finite("latents", latents) / self.vae.config.scaling_factor
        images = require_finite("images", self.vae.decode(latents).sample) / 2 + 0.5
        return (images.clamp(0, 1).float() * 255).round().to(torch.uint8)
