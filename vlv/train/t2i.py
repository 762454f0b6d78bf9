"""Train the toy text-to-image model of the synthetic world: autoencoder, then UNet and text encoder.

It stands where Stable Diffusion stands in the paper: trained on image-text pairs beforehand, and
frozen in everything that follows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.train import cli, presets
from vlv.train.presets import T2IConfig

if TYPE_CHECKING:
    import torch

    from vlv.diffusion.t2i import T2I


def build(config: T2IConfig) -> T2I:
    """The untrained model of a configuration, with a tokenizer for the scenes' prompts."""
    import numpy as np
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from vlv.data import scenes
    from vlv.data.tokenizers import clip_tokenizer
    from vlv.diffusion.t2i import T2I

    rng = np.random.default_rng(0)
    texts = [scenes.prompt(scenes.sample(s), rng) for s in range(4000)]
    tokenizer = clip_tokenizer(texts, config.context_length)
    vae = AutoencoderKL(
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.vae_channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.image_size,
        mid_block_add_attention=False,
    )
    # the text is read at the coarser levels only: at the finest one it would take half the time
    coarser = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=config.image_size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=1,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * coarser,
        up_block_types=("CrossAttnUpBlock2D",) * coarser + ("UpBlock2D",),
        cross_attention_dim=config.context_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.context_width,
            intermediate_size=4 * config.context_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.context_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Without noise that hides everything at the last step, a map this small shows its background there, and the
    # model never learns to take it from the text (Lin et al. 2023, arXiv 2305.08891)
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return T2I(vae, unet, text_encoder, tokenizer, scheduler)


def train_vae(t2i: T2I, config: T2IConfig, run: Path) -> None:
    """Pixel reconstruction plus a small KL term (Rombach et al. 2022); sets the latents' scale.

    Pixels off the background weigh more, or the plain background, most of a scene, takes all capacity.
    """
    import torch

    from vlv.data import scene_batches as data
    from vlv.train.loop import Loop

    loop = Loop("vae", run, config.vae_loop, {"vae": t2i.vae})

    def loss(step: int) -> dict[str, torch.Tensor]:
        c = config.vae_loop
        pixels = data.images(data.seeds(step, c.batch, config.pool)).to(t2i.vae.device) / 127.5 - 1
        background = pixels.flatten(2).median(dim=2).values[..., None, None]
        weight = 1 + 4 * ((pixels - background).abs().amax(1, keepdim=True) > 0.1).float()
        posterior = t2i.vae.encode(pixels).latent_dist
        decoded = t2i.vae.decode(posterior.sample()).sample.float()
        pixel = (weight * (decoded - pixels).square()).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": pixel + 1e-5 * kl, "pixel": pixel, "kl": kl}

    loop.run(loss)
    torch.manual_seed(0)  # the same scale after a resume
    with torch.inference_mode():
        scenes = data.images(range(min(512, config.pool)))
        sample = t2i.vae.encode(scenes.to(t2i.vae.device) / 127.5 - 1).latent_dist.sample()
    t2i.vae.register_to_config(scaling_factor=round(1 / sample.std().item(), 5))


def latents(t2i: T2I, pool: int, run: Path) -> torch.Tensor:
    """Scaled latents of the scenes 0..pool-1, [pool, c, s, s] float16, computed once and kept in `run`.

    They are kept by the pool and by what made them, so that another autoencoder in the same run gets its own.
    """
    import torch

    from vlv.common.files import atomic_write
    from vlv.data import scene_batches as data

    digest = hashlib.sha256(f"{pool} {t2i.vae.config.scaling_factor}".encode())
    for weight in t2i.vae.state_dict().values():
        digest.update(weight.half().cpu().numpy().tobytes())  # as the folder holds it, which stage 1 loads
    path = run / f"latents-{digest.hexdigest()[:12]}.pt"
    if not path.exists():
        torch.manual_seed(0)
        with torch.inference_mode():
            parts = [
                t2i.encode_images(data.images(range(i, min(i + 256, pool))).to(t2i.vae.device)).half().cpu()
                for i in range(0, pool, 256)
            ]
        with atomic_write(path) as file:
            torch.save(torch.cat(parts), file)
    return torch.load(path, weights_only=True, mmap=True)


def train_unet(t2i: T2I, config: T2IConfig, run: Path) -> None:
    """Denoising from true prompts, one in ten of them empty for classifier-free guidance."""
    import numpy as np
    import torch

    from vlv.data import scene_batches as data
    from vlv.data import scenes
    from vlv.train.loop import Loop

    cache = latents(t2i, config.pool, run)
    t2i.vae.requires_grad_(False)
    t2i.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    loop = Loop("t2i", run, config.unet_loop, {"unet": t2i.unet, "text_encoder": t2i.text_encoder})

    def loss(step: int) -> dict[str, torch.Tensor]:
        chosen = data.seeds(step, config.unet_loop.batch, config.pool)
        rng = np.random.default_rng([1, step])
        prompts = [scenes.prompt(scenes.sample(s), rng) if rng.random() > 0.1 else "" for s in chosen]
        batch = cache[chosen].float().to(t2i.vae.device)
        return {"loss": t2i.noise_loss(batch, t2i.encode_text(prompts))}

    loop.run(loss)


def train(config: T2IConfig, run: Path, out: Path, device: str) -> None:
    """Train both parts, resuming what `run` holds, and write the diffusers folder `out`."""
    import torch

    torch.manual_seed(0)
    t2i = build(config).to(device)
    train_vae(t2i, config, run)
    train_unet(t2i, config, run)
    t2i.eval().half().save(out)


def main() -> None:
    args = cli.parser("t2i", presets.T2I, __doc__).parse_args()
    run, out = cli.folders(args, "t2i")
    train(presets.T2I[args.preset], run, out, args.device or "cpu")


if __name__ == "__main__":
    cli.run(main)
