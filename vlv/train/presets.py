"""Training settings of the presets. Imports nothing heavy.

`tiny` trains the bundled checkpoint; `smoke` takes the same models a few steps, to see that all works.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LoopConfig:
    """How a stage is optimised."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    final_lr: float = 0.02  # of the peak, reached by a cosine
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.995  # 0 turns it off
    save_every: int = 250
    log_every: int = 25
    bf16: bool = False  # autocast; parameters and optimiser stay float32
    seed: int = 0


@dataclass(frozen=True)
class T2IConfig:
    """The toy text-to-image model and its training."""

    vae_loop: LoopConfig
    unet_loop: LoopConfig
    image_size: int
    context_length: int  # tokens of a prompt; VLV has as many queries
    context_width: int
    text_layers: int
    vae_channels: tuple[int, ...]
    latent_channels: int
    unet_channels: tuple[int, ...]
    pool: int  # scenes 0..pool-1 are the training set


_SMOKE = LoopConfig(steps=3, batch=4, lr=1e-3, warmup=1)
T2I = {
    "tiny": T2IConfig(
        vae_loop=LoopConfig(steps=2000, batch=16, lr=2e-3, ema=0.99, bf16=True),
        unet_loop=LoopConfig(steps=5000, batch=64, lr=1e-3, warmup=200, ema=0.998),
        image_size=64,
        context_length=32,
        context_width=128,
        text_layers=3,
        vae_channels=(16, 32, 64, 96),
        latent_channels=12,
        unet_channels=(64, 128),
        pool=32_768,
    )
}


@dataclass(frozen=True)
class Stage1Config:
    """Stage 1: images only, through the frozen text-to-image model."""

    model: str  # preset of vlv.model.config
    loop: LoopConfig
    pool: int
    noise_draws: int = 1  # noises and time steps per encoded image
    readout: float = 1.0  # weight of the latents' error, read from the image features by a linear layer


T2I["smoke"] = replace(T2I["tiny"], vae_loop=_SMOKE, unet_loop=_SMOKE, pool=64)

STAGE1 = {
    "tiny": Stage1Config(
        model="tiny", loop=LoopConfig(steps=3000, batch=32, lr=7e-4, warmup=100, ema=0.995), pool=32_768, noise_draws=2
    )
}
STAGE1["smoke"] = replace(STAGE1["tiny"], loop=_SMOKE, pool=64)


@dataclass(frozen=True)
class Stage2Config:
    """Stage 2: the language model learns to read the embeddings; the encoder follows later, at a lower rate."""

    loop: LoopConfig
    pool: int
    encoder_lr: float
    encoder_from: int  # step from which the encoder learns too
    llm_layers: int
    llm_heads: int  # width = 64 * heads


STAGE2 = {
    "tiny": Stage2Config(
        loop=LoopConfig(steps=2400, batch=32, lr=1e-3, warmup=100, ema=0.995),
        pool=2**20,
        encoder_lr=1e-4,
        encoder_from=2000,
        llm_layers=4,
        llm_heads=2,
    )
}
STAGE2["smoke"] = replace(STAGE2["tiny"], loop=_SMOKE, encoder_from=1)
