"""Train the toy text-to-image model of the synthetic world: autoencoder, then UNet and text encoder.

It stands where Stable Diffusion stands in the paper: trained on image-text pairs beforehand, and
frozen in everything that follows.

    python -m vlv.train.t2i --preset tiny
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlv.common.command import Parser, run_command
from vlv.train.config import T2I, RunOptions, T2IConfig, stage_parser

if TYPE_CHECKING:
    from vlv.diffusion.t2i import T2I as Model
    from vlv.train.parallel import World


def train_vae(t2i: Model, config: T2IConfig, options: RunOptions, world: World) -> None:
    """Train the autoencoder, then set the scale of its latents."""
    import torch

    from vlv.data import scene_batches
    from vlv.train.objectives import Autoencoder
    from vlv.train.trainer import Trainer, train

    c, device = config.vae, world.device
    trainer = Trainer("vae", options.run, c, Autoencoder(t2i.vae), world)

    def feed() -> Iterator[dict]:
        for p in scene_batches.passes(trainer.images, c.batch, c.micro_batch, config.scenes, world.rank, world.size):
            yield {"pixels": scene_batches.images(p.seeds).to(device), "position": p.position}

    train(trainer, feed(), options)
    torch.manual_seed(0)  # the same scale after a resume
    with torch.inference_mode():
        pixels = scene_batches.images(range(min(512, config.scenes))).to(device)
        sample = t2i.vae.encode(pixels / 127.5 - 1).latent_dist.sample()
    t2i.vae.register_to_config(scaling_factor=round(1 / sample.std().item(), 5))


def train_unet(t2i: Model, config: T2IConfig, options: RunOptions, world: World) -> None:
    """Train denoising from true prompts, one in ten of them empty for classifier-free guidance."""
    import numpy as np
    import torch

    from vlv.data import scene_batches, scenes
    from vlv.data.latents import scene_latents
    from vlv.train.objectives import Denoiser
    from vlv.train.trainer import Trainer, train

    c, device = config.unet, world.device
    cache = scene_latents(t2i, config.scenes, options.run)
    t2i.vae.requires_grad_(False)
    t2i.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    trainer = Trainer("t2i", options.run, c, Denoiser(t2i), world)

    def feed() -> Iterator[dict]:
        for p in scene_batches.passes(trainer.images, c.batch, c.micro_batch, config.scenes, world.rank, world.size):
            rng = np.random.default_rng([1, p.step])
            prompts = [scenes.prompt(scenes.sample(s), rng) if rng.random() > 0.1 else "" for s in p.step_seeds]
            latents = cache[p.seeds].float().to(device)
            yield {"latents": latents, "prompts": prompts[p.part], "position": p.position}

    train(trainer, feed(), options)


def train_t2i(config: T2IConfig, options: RunOptions) -> None:
    """Train both parts, resuming what the run holds, and write the diffusers folder `options.out`."""
    import torch

    from vlv.common.files import atomic_folder
    from vlv.train.initialize import build_t2i, share
    from vlv.train.parallel import World

    with World.start(options.device or "cpu") as world:
        torch.manual_seed(0)
        t2i = build_t2i(config).to(world.device)
        train_vae(t2i, config, options, world)
        train_unet(t2i, config, options, world)
        if world.first:
            t2i.eval().half()
            size = sum(p.nbytes for p in t2i.parameters())
            with atomic_folder(options.out, size, force=True) as partial:  # a new folder: others may link the old one
                t2i.save(partial)
                share(partial)


def work(args: argparse.Namespace) -> None:
    train_t2i(T2I[args.preset], RunOptions.of("t2i", args.preset, args.run, args.out, device=args.device))


def parser() -> Parser:
    return stage_parser("t2i", T2I, __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(work, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
