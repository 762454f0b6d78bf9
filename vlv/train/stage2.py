"""Stage 2: a language model learns to write the caption that the embeddings hold.

Paper section 3.3: the LLM, the projection to its width and the encoder learn from the captions'
cross-entropy; the queries, the projection after them and the CLIP layers stay as stage 1 left them.
The paper's language model comes pretrained. Ours starts from nothing, and what it would teach the
encoder meanwhile is noise that wipes out what stage 1 has learned: so the encoder joins late (the
paper's progressive unfreezing: MLP and language model first, then the encoder).

    python -m vlv.train.stage2 --preset tiny
    torchrun --nproc-per-node 8 -m vlv.train.stage2 --preset paper-stage2 --data CAPTIONS.jsonl --ckpt STAGE1 --llm QWEN

The stage is assembled in vlv.train.initialize.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vlv.common.command import Misuse, Parser, run_command
from vlv.train.config import STAGE2, Inputs, RunOptions, TrainConfig, add_flags, check_inputs, stage_parser


def train_stage2(config: TrainConfig, inputs: Inputs, options: RunOptions) -> None:
    """Train, resuming what the run holds, and write the complete checkpoint folder `options.out`."""
    import numpy as np

    from vlv.data import scene_batches, scenes
    from vlv.data.samples import identity
    from vlv.data.selection import Limits
    from vlv.train import initialize, logging
    from vlv.train.checkpointing import fingerprint
    from vlv.train.parallel import World
    from vlv.train.trainer import Trainer, train

    logging.check(options.log)
    with World.start(options.device or ("cpu" if config.synthetic else None)) as world:
        config.accumulation(world.size)  # refused here rather than after minutes of loading
        device, c, toy = world.device, config, config.synthetic
        origin, llm = {}, None  # origin: what decides the weights beside the configuration
        if not toy:
            limits = Limits(True, c.min_side, c.max_aspect)
            source, selection = initialize.open_data(inputs, limits, world)
            origin |= {"data": identity(source), "image-key": str(inputs.image_key)}
        start = initialize.open_start(inputs.ckpt or options.run / "stage1", world)
        origin |= {"ckpt": fingerprint(start.folder / "vlv.json", start.encoder_file)}
        if not toy:
            llm = inputs.llm or start.llm
            origin |= {"llm": fingerprint(llm) if Path(llm).is_dir() else str(llm)}
        stage = initialize.build_stage2(config, start, llm, device)
        trainer = Trainer("stage2", options.run, config, stage.objective, world, origin, options.continue_from)

        def captioned_scenes() -> Iterator[dict]:
            for p in scene_batches.passes(trainer.images, c.batch, c.micro_batch, toy.scenes, world.rank, world.size):
                rng = np.random.default_rng([2, p.step])
                captions = [scenes.caption(scenes.sample(s), rng) for s in p.step_seeds][p.part]
                yield {
                    "pixels": scene_batches.images(p.seeds).to(device), "caption": captions, "position": p.position
                }  # fmt: skip

        if toy:
            feed = captioned_scenes()
        else:
            feed = initialize.training_batches(trainer, source, selection, limits, stage.model.image_size)
        train(trainer, feed, options, stage.write)


def work(args: argparse.Namespace) -> None:
    config = STAGE2[args.preset].override(vars(args))
    inputs = Inputs(args.ckpt, llm=args.llm, data=tuple(args.data or ()), image_key=args.image_key)
    options = RunOptions.of(
        "stage2", args.preset, args.run, args.out, device=args.device, log=args.log, gpu_hour=args.gpu_hour,
        max_cost=args.max_cost, continue_from=args.continue_from,
    )  # fmt: skip
    check_inputs(args.preset, config, inputs, options, args.plan)
    if config.synthetic:
        inputs = Inputs(args.stage1)
    elif args.stage1:
        raise Misuse(f"--stage1 belongs to the toy presets: with --preset {args.preset} give the folder as --ckpt")
    if config.queries or config.image_size or not config.clip_layers:
        raise Misuse("--queries, --image-size and --no-clip-layers belong to stage 1: stage 2 keeps its start's")
    if not args.plan:
        return train_stage2(config, inputs, options)
    from vlv.checkpoints.published import resolve
    from vlv.train.initialize import build_stage2
    from vlv.train.memory_plan import plan

    start = resolve(args.ckpt) if args.ckpt else None
    llm = args.llm or (start.llm if start else None)
    print(plan(lambda c: build_stage2(c, start, llm, weights=False), config, args.plan))


def parser() -> Parser:
    p = stage_parser("stage2", STAGE2, __doc__)
    p.add_argument(
        "--stage1", type=Path, help="stage-1 folder of the toy presets (default: RUN/stage1); paper-stage2 takes --ckpt"
    )
    p.add_argument(
        "--llm",
        metavar="DIR",
        help="paper-stage2: language model to start from, a folder or hub id (default: CKPT's llm/)",
    )
    add_flags(p, "paper-stage2", STAGE2["paper-stage2"])
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(work, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
