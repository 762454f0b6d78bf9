"""Both stages at the paper's scale: from the flags to a trained checkpoint folder. See docs/training.md."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.common.command import Misuse
from vlv.train import config as paper
from vlv.train import cost
from vlv.train import logging as logs
from vlv.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from vlv.data.loader import Pictures
    from vlv.train.parallel import World


def run(stage: str, args: argparse.Namespace, folder: Path, out: Path) -> None:
    """Train `stage` ("stage1", "stage2") as the flags say, resuming what `folder` holds, and write `out`."""
    config = paper.config(args)
    if args.plan:
        from vlv.train.memory_plan import plan

        print(plan(stage, config, args))
        return
    if not args.data or not args.ckpt:
        raise Misuse(f"--preset {args.preset} needs --data and --ckpt (or --plan alone)")
    if args.max_cost is not None and args.gpu_hour is None:
        raise Misuse("--max-cost needs --gpu-hour USD, the price that the estimate is made with")
    logs.check(args.log)
    from vlv.data.sources import open_sources
    from vlv.train.parallel import World

    with World.start(args.device) as world:
        config.accumulation(world.size)  # refused here rather than after minutes of loading
        source = open_sources(args.data)
        build = {"stage1": _stage1, "stage2": _stage2}[stage]
        objective, finish, data = build(config, args, world, source)
        _train(stage, config, args, world, objective, data, folder, lambda weights: finish(weights, out))


def _train(
    name: str, config: TrainConfig, args: argparse.Namespace, world: World, objective: nn.Module, data: Pictures,
    folder: Path, finish,
) -> None:  # fmt: skip
    from vlv.data.loader import batches
    from vlv.train.trainer import Trainer

    trainer = Trainer(name, folder, config, objective.to(world.device), world)
    if trainer.step < config.steps:
        rate, feed = trainer.probe(batches(data, config, world, trainer.images))
        left = (config.steps - trainer.step) * config.batch
        text, dollars = cost.estimate(left, rate, world.size, args.gpu_hour)
        trainer.say(text)
        if args.max_cost is not None and dollars > args.max_cost:
            raise ValueError(f"the estimate of ${dollars:,.2f} is over --max-cost {args.max_cost:g}: not started")
        trainer.fit(feed, args.log)
    trainer.say(cost.account(trainer.images, trainer.seconds, trainer.gpu_seconds, args.gpu_hour))
    weights = trainer.weights()
    if world.first:
        finish(weights)
    world.barrier()


def _stage1(config: TrainConfig, args: argparse.Namespace, world: World, source):
    import torch

    from vlv.checkpoints import folder as checkpoint
    from vlv.common.files import link_tree
    from vlv.data.latents import LatentCache
    from vlv.data.loader import Pictures
    from vlv.diffusion.t2i import T2I
    from vlv.train import initialize as start
    from vlv.train.objectives import Stage1

    begin = _open(args.ckpt, world)
    torch.manual_seed(config.seed)
    model = start.model_config(begin.config, config, llm_width=0)
    t2i_folder = Path(args.t2i or begin.t2i)
    t2i = T2I.load(t2i_folder)
    start.check_t2i(model, t2i)
    encoder = start.build_encoder(begin, model)
    encoder.bottleneck.text.copy_from(t2i.text_encoder)
    start.unfreeze_stage1(encoder, config)
    t2i.text_encoder = None  # its layers are the encoder's now
    t2i.to(world.device)
    if config.bf16:
        t2i.unet.bfloat16()
    t2i.unet.to(memory_format=torch.channels_last)
    if config.checkpoint_activations:
        t2i.unet.enable_gradient_checkpointing()
    if config.compile:
        t2i.unet.compile()
    cache = None
    if args.cache_latents:
        cache = LatentCache(args.cache_latents, t2i_folder / "vae", source, model.image_size)

    def finish(weights: dict, out: Path) -> None:
        checkpoint.save(out, _encoder_of(model, weights, "encoder."))
        if not (out / "t2i").exists():
            link_tree(t2i_folder, out / "t2i")

    return Stage1(encoder, t2i, cache), finish, Pictures(source, config, model.image_size, captions=False)


def _stage2(config: TrainConfig, args: argparse.Namespace, world: World, source):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlv.checkpoints import folder as checkpoint
    from vlv.common.files import link_tree
    from vlv.data.loader import Pictures
    from vlv.model.captioner import Captioner
    from vlv.train import initialize as start
    from vlv.train.objectives import Stage2

    if config.queries or config.image_size or not config.clip_layers:
        raise Misuse("--queries, --image-size and --no-clip-layers belong to stage 1: stage 2 keeps its start's")
    begin = _open(args.ckpt, world)
    torch.manual_seed(config.seed)
    llm_folder = args.llm or begin.llm
    llm = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    llm.config.use_cache = False
    model = start.model_config(begin.config, config, llm_width=llm.config.hidden_size)
    captioner = Captioner(start.build_encoder(begin, model), llm, tokenizer)
    start.unfreeze_stage2(captioner, config)

    def finish(weights: dict, out: Path) -> None:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        checkpoint.save(out, _encoder_of(model, weights, "captioner.encoder."), dtype)
        prefix = "captioner.llm."
        of_llm = {n.removeprefix(prefix): w.to(dtype) for n, w in weights.items() if n.startswith(prefix)}
        llm.config.use_cache, llm.config.dtype = True, dtype
        llm.save_pretrained(out / "llm", state_dict=of_llm)
        tokenizer.save_pretrained(out / "llm")
        if (begin.folder / "t2i").is_dir() and not (out / "t2i").exists():
            link_tree(begin.folder / "t2i", out / "t2i")

    objective = Stage2(captioner, config.max_tokens, config.end_token)
    return objective, finish, Pictures(source, config, model.image_size, captions=True)


def _open(ckpt: str, world: World):
    """The start, converted once where it is a published one: by the first process, while the others wait."""
    from vlv.checkpoints.published import resolve

    found = resolve(ckpt) if world.first else None
    world.barrier()
    return found or resolve(ckpt)


def _encoder_of(model, weights: dict, prefix: str):
    """A plain encoder with the weights of an objective's state dict."""
    import torch

    from vlv.model.encoder import VLVEncoder

    with torch.device("meta"):
        encoder = VLVEncoder(model)
    encoder.load_state_dict(
        {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}, assign=True
    )
    return encoder


def refuse_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with 2 where flags of a run at scale were given to the toy recipe."""
    names = ["data", "ckpt", "llm", "cache_latents", "plan", "gpu_hour", "max_cost"]
    names += [f.name for f in fields(TrainConfig)]
    given = [name for name in names if getattr(args, name, None) is not None]
    given += ["log"] if args.log != "none" else []
    if given:
        name = "--" + given[0].replace("_", "-")
        parser.error(f"{name} belongs to the paper's presets, not to --preset {args.preset}")
