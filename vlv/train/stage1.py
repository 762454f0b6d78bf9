"""Stage 1: the encoder learns, from images alone, embeddings that a frozen text-to-image model can draw from.

Paper section 3.2: VAE, UNet and CLIP text layers stay frozen; the vision encoder, its language model,
the queries and the projection learn from the error of the predicted noise.

The paper starts from Florence-2's pretrained weights; there is no such model of the synthetic world. In
its place a linear layer, dropped afterwards, reads the frozen autoencoder's latents from the image
features, so that the tower sees from the first steps on. This too needs images only.

    python -m vlv.train.stage1 --preset tiny
    torchrun --nproc-per-node 8 -m vlv.train.stage1 --preset paper-stage1 --data SHARDS --ckpt START --t2i SD_DIR

With the paper's preset it trains on your images, without that linear layer. The stage is assembled in
vlv.train.initialize.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vlv.common.command import Parser, run_command
from vlv.train.config import STAGE1, Inputs, RunOptions, TrainConfig, add_flags, check_inputs, stage_parser


def train_stage1(config: TrainConfig, inputs: Inputs, options: RunOptions) -> None:
    """Train, resuming what the run holds, and write the checkpoint folder `options.out`: encoder and t2i/, no llm/."""
    from vlv.data import scene_batches
    from vlv.data.latents import LatentCache, scene_latents
    from vlv.data.samples import identity
    from vlv.data.selection import Limits
    from vlv.train import initialize, logging
    from vlv.train.checkpointing import fingerprint
    from vlv.train.parallel import World
    from vlv.train.trainer import Trainer, train

    logging.check(options.log)
    with World.start(options.device or ("cpu" if config.synthetic else None)) as world:
        config.accumulation(world.size)  # refused here rather than after minutes of loading
        device, c = world.device, config
        start = cache = None
        origin = {}  # what decides the weights beside the configuration
        if toy := config.synthetic:
            t2i = inputs.t2i or options.run / "t2i"
        else:
            limits = Limits(False, c.min_side, c.max_aspect)
            source, selection = initialize.open_data(inputs, limits, world)
            start = initialize.open_start(inputs.ckpt, world)
            t2i = inputs.t2i or start.t2i
            origin |= {"data": identity(source), "image-key": str(inputs.image_key)}
            origin |= {"ckpt": fingerprint(start.folder / "vlv.json", start.encoder_file)}
            origin |= {"cache-latents": str(bool(inputs.cache_latents))}
            if inputs.cache_latents:
                size = config.image_size or start.config.image_size
                cache = LatentCache(inputs.cache_latents, t2i / "vae", source, size)
        stage = initialize.build_stage1(config, start, t2i, device, cache)
        origin |= {"t2i": fingerprint(t2i / "vae", t2i / "unet", t2i / "text_encoder")}
        trainer = Trainer("stage1", options.run, config, stage.objective, world, origin, options.continue_from)

        def scenes() -> Iterator[dict]:
            latents = scene_latents(stage.t2i, toy.scenes, options.run)
            for p in scene_batches.passes(trainer.images, c.batch, c.micro_batch, toy.scenes, world.rank, world.size):
                target = latents[p.seeds].float().to(device)
                yield {"pixels": scene_batches.images(p.seeds).to(device), "latents": target, "position": p.position}

        if toy:
            feed = scenes()
        else:
            feed = initialize.training_batches(trainer, source, selection, limits, stage.model.image_size)
        train(trainer, feed, options, stage.write)


def work(args: argparse.Namespace) -> None:
    config = STAGE1[args.preset].override(vars(args))
    inputs = Inputs(
        args.ckpt, args.t2i, data=tuple(args.data or ()), image_key=args.image_key, cache_latents=args.cache_latents
    )
    options = RunOptions.of(
        "stage1", args.preset, args.run, args.out, device=args.device, log=args.log, gpu_hour=args.gpu_hour,
        max_cost=args.max_cost, continue_from=args.continue_from,
    )  # fmt: skip
    check_inputs(args.preset, config, inputs, options, args.plan)
    if not args.plan:
        return train_stage1(config, inputs, options)
    from vlv.checkpoints.published import resolve
    from vlv.train.cost import planned
    from vlv.train.initialize import build_stage1
    from vlv.train.memory_plan import plan

    start = resolve(args.ckpt) if args.ckpt else None
    t2i = args.t2i or (start.t2i if start else None)
    print(plan(lambda c: build_stage1(c, start, t2i, weights=False), config, args.plan))
    print(planned(config.steps * config.batch, args.plan, args.gpu_hour))


def parser() -> Parser:
    p = stage_parser("stage1", STAGE1, __doc__)
    p.add_argument(
        "--t2i",
        type=Path,
        help="frozen text-to-image model, a diffusers folder (default: RUN/t2i; paper-stage1: CKPT/t2i)",
    )
    add_flags(p, "paper-stage1", STAGE1["paper-stage1"])
    p.add_argument("--cache-latents", type=Path, metavar="DIR", help="keep the autoencoder's latents in this folder")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(work, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
