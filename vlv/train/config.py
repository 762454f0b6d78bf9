"""Configure training: the paper's recipes and the toy ones of the bundled checkpoint. Imports nothing heavy.

The source of a published figure stands beside it, the one that is followed first:

    P4.1        the paper (arXiv 2507.07104v2), section 4.1; P3.3, P4.3, P-A: other sections, appendix A
    sh1, sh2    the authors' train_stage1.sh, train_stage2.sh (Tiezheng11/Vision-Language-Vision, 222a01d)
    ds          their configs/deepspeed_fp32.json
    py1, py2    their train/train_VLV_stage1.py, train_VLV_stage2.py; m1, m2: models/VLV_stage1.py, VLV_stage2.py
    ours        no source names it

Where they differ, the paper is followed, except that what learns at stage 2 is the script's:

    stage 1, decay   P4.1: a cosine over the run; ds stretches it over 20,000 steps, a tenth of sh1's
    stage 1, data    P4.1: 40 M images, so 2.6 epochs; sh1 and py1 read the 6 M that are released
    stage 2, steps   P4.1 and py2's default: 100,000; sh2: 20,000; their README: 10,000
    stage 2, decay   P4.1: linear from 1e-5; py2 plans it for 2 epochs of 200 M captions: after 100,000 steps its
                     rate is still 87 % of the peak
    stage 2, learns  sh2, py2: Florence-2's language model, MLP, LLM; P3.3 names the whole encoder
    precision        P4.1: float32 at stage 1, that is --no-bf16; ours: bfloat16 there, float32 weights at stage 2

The paper's own stage 1: 8 RTX 6000 Ada for about 4 days (P4.1), so 768 GPU-hours and about 37 images/s a GPU; all of
it under $1,000 and 1,000 GPU-hours (section 1). Stage 2: 6 M captions (P4.1) of 227 tokens on average (P-A, figure 8).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from vlv.common.command import Misuse, Parser, UserError, debug_argument, positive


class TrainError(UserError, ValueError):
    """Raised where training cannot start or go on; the message says what to do."""


def _option(default, text: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Synthetic:
    """Data and start of a toy stage: scenes of the synthetic world, and random weights."""

    scenes: int  # scenes 0..scenes-1 are the training set
    model: str = "tiny"  # stage 1: preset of vlv.model.config
    llm_layers: int = 4  # stage 2
    llm_heads: int = 2  # the language model's width is 64 * heads


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained; every field but `synthetic` is a flag of the same name."""

    steps: int = _option(200_000, "optimiser steps")  # P4.1, sh1
    batch: int = _option(512, "images a step, over all processes")  # P4.1, sh1, ds
    micro_batch: int = _option(32, "images a forward pass; gradients of a step's passes are added up")  # ours; ds: 64
    lr: float = _option(5e-5, "peak learning rate")  # P4.1, sh1, ds
    schedule: str = _option("cosine", "decay of the learning rate", ("cosine", "linear"))  # P4.1, ds
    final_lr: float = _option(1e-4, "last learning rate, as a share of the peak")  # ds: cos_min_ratio
    warmup: int = _option(0, "steps of linear warm-up")  # sh1, ds, py2
    beta2: float = _option(0.99, "AdamW's second beta, the first is 0.9")  # P4.1, ds
    weight_decay: float = _option(0.01, "AdamW's decoupled weight decay")  # P4.1, ds; py2: torch's default, the same
    decay_norms: bool = _option(True, "weight decay of norms and biases too")  # py1, py2: of all weights
    clip: float = _option(1.0, "largest norm of the gradients")  # ds; at stage 2 ours: py2 clips nothing
    ema: float = _option(0.0, "decay of an average of the weights, which is then what is written; 0: none")  # py1, py2
    # sh1, sh2: --unfreeze_florence2_language_model
    encoder_part: str = _option(
        "language-model", "part of Florence-2 that is trained", ("all", "language-model", "decoder", "none")
    )
    # P3.3; P4.3 has the steps as an ablation
    unfreeze: str = _option("encoder", "stage 2: what is trained, each with those before it", ("mlp", "llm", "encoder"))
    encoder_from: int = _option(0, "stage 2: step from which the encoder is trained too")  # P3.3: progressive
    encoder_lr: float = _option(0.0, "stage 2: peak learning rate of the encoder; 0: --lr")  # ours
    queries: int = _option(
        0, "learned queries; 0: as many as --ckpt has, 77 as published"
    )  # P4.1, sh1; P4.3 tries 16 and 32
    # sh1, sh2: --use_text_encoder
    clip_layers: bool = _option(True, "CLIP's text layers between queries and UNet; without them: an ablation")
    image_size: int = _option(
        0, "side of the square crop in pixels; 0: that of --ckpt, 384 as published"
    )  # py1's default, sh2's data
    noise_draws: int = _option(1, "stage 1: noises and time steps for each encoded image")  # ours
    readout: float = _option(0.0, "stage 1: weight of the error of latents read from the image features")  # ours
    max_tokens: int = _option(300, "stage 2: largest number of tokens of a caption")  # m2: max_length
    end_token: bool = _option(True, "stage 2: learn where a caption ends; the published loop does not")  # ours; m2
    min_side: int = _option(
        0, "leave out images with a shorter side below so many pixels"
    )  # ours; P4.1 chose its data before
    max_aspect: float = _option(0.0, "leave out images whose sides have a larger ratio than this; 0: none")
    parallel: str = _option(
        "ddp", "ddp: each GPU holds the model; fsdp: each holds a part", ("ddp", "fsdp")
    )  # ours; ds: ZeRO 2
    bf16: bool = _option(True, "compute in bfloat16; weights and optimiser stay float32")  # P4.1 at stage 2, sh2
    checkpoint_activations: bool = _option(True, "recompute activations in the backward pass")  # m1: UNet; m2: LLM
    compile: bool = _option(False, "torch.compile of every block")  # from here on all are ours
    workers: int = _option(4, "processes that read and decode, for each training process")
    seed: int = _option(0, "seed of data order and noise")
    spike: float = _option(10.0, "skip a step whose gradient is this many times the recent median; 0: never")
    patience: int = _option(10, "skipped steps in a row that end the run")
    save_every: int = _option(1000, "steps between checkpoints of the run")
    keep: int = _option(2, "checkpoints of the run that are kept")
    log_every: int = _option(20, "steps between lines of the log")
    dtype: str = _option(
        "auto", "dtype of the weights written; auto: float32, at stage 2 bfloat16 unless --no-bf16",
        ("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    synthetic: Synthetic | None = None

    def accumulation(self, processes: int) -> int:
        """Return the forward passes of one process in one step. Raises Misuse where the batch cannot be divided."""
        unit = self.micro_batch * processes
        if self.batch < 1 or self.micro_batch < 1 or self.batch % unit:
            raise Misuse(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch} x {processes} processes "
                f"= {unit}: choose one that is, or another number of processes"
            )
        return self.batch // unit

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of the peak."""
        done = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.final_lr + (1 - self.final_lr) * left)

    def override(self, values: Mapping[str, object]) -> TrainConfig:
        """Return the configuration with those `values` of its flags that are not None. Raises Misuse as `check`."""
        names = [f.name for f in fields(self) if f.metadata]
        return replace(self, **{n: values[n] for n in names if values.get(n) is not None}).check()

    def check(self) -> TrainConfig:
        """Return the configuration itself. Raises Misuse on values that make no sense."""
        for name in ("steps", "batch", "micro_batch", "noise_draws", "max_tokens", "patience", "save_every",
                     "log_every", "keep"):  # fmt: skip
            if getattr(self, name) < 1:
                raise Misuse(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("workers", "warmup", "spike", "queries", "image_size", "min_side", "max_aspect", "encoder_from",
                     "encoder_lr", "readout"):  # fmt: skip
            if getattr(self, name) < 0:
                raise Misuse(f"--{name.replace('_', '-')} {getattr(self, name)}: not below 0")
        if not self.clip > 0:
            raise Misuse(f"--clip {self.clip}: above 0, or every step would be empty; inf clips nothing")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise Misuse(f"--{name} {getattr(self, name)}: from 0 to below 1")
        if self.encoder_from and self.parallel == "fsdp":
            raise Misuse("--encoder-from needs --parallel ddp: FSDP2 shards only what is trained from the first step")
        return self


def _toy(steps: int, batch: int, lr: float, synthetic: Synthetic | None = None, **more) -> TrainConfig:
    """A recipe of the synthetic world, for one process with two CPU cores."""
    common = {
        "warmup": 100, "final_lr": 0.02, "ema": 0.995, "encoder_part": "all", "bf16": False, "workers": 0, "spike": 0.0,
        "checkpoint_activations": False, "patience": 1, "save_every": 250, "log_every": 25, "dtype": "float16",
    }  # fmt: skip
    return TrainConfig(steps=steps, batch=batch, micro_batch=batch, lr=lr, synthetic=synthetic, **(common | more))


def _smoke(config: TrainConfig, **more) -> TrainConfig:
    """The same models for a few steps, to see that everything works."""
    return replace(config, steps=3, batch=4, micro_batch=4, lr=1e-3, warmup=1, ema=0.995, bf16=False, **more)


STAGE1 = {
    "paper-stage1": TrainConfig(),
    "tiny": _toy(3000, 32, 7e-4, Synthetic(scenes=32_768), noise_draws=2, readout=1.0),  # the bundled checkpoint
}
STAGE1["smoke"] = _smoke(STAGE1["tiny"], synthetic=Synthetic(scenes=64))

STAGE2 = {
    "paper-stage2": TrainConfig(
        steps=100_000,  # P4.1, py2's default
        batch=64,  # P4.1, sh2: 8 on each of 8 GPUs
        micro_batch=8,  # sh2
        lr=1e-5,  # P4.1, sh2
        schedule="linear",  # P4.1, py2
        final_lr=0.0,  # py2: get_scheduler("linear")
        beta2=0.999,  # py2: torch's default; P4.1 gives 0.99 for the auto-encoder
        end_token=False,  # m2 masks Qwen's padding, which is its end of text
    ),
    "tiny": _toy(2400, 32, 1e-3, Synthetic(scenes=2**20), encoder_lr=1e-4, encoder_from=2000),
}
STAGE2["smoke"] = _smoke(STAGE2["tiny"], encoder_from=1)


@dataclass(frozen=True)
class T2IConfig:
    """The toy text-to-image model and its training."""

    vae: TrainConfig
    unet: TrainConfig
    scenes: int = 32_768  # scenes 0..scenes-1 are the training set
    image_size: int = 64
    context_length: int = 32  # tokens of a prompt; VLV has as many queries
    context_width: int = 128
    text_layers: int = 3
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)
    latent_channels: int = 12
    unet_channels: tuple[int, ...] = (64, 128)


T2I = {
    "tiny": T2IConfig(
        vae=_toy(2000, 16, 2e-3, ema=0.99, bf16=True),
        unet=_toy(5000, 64, 1e-3, warmup=200, ema=0.998),
    )
}
T2I["smoke"] = replace(T2I["tiny"], vae=_smoke(T2I["tiny"].vae), unet=_smoke(T2I["tiny"].unet), scenes=64)


@dataclass(frozen=True)
class Inputs:
    """Where start and data of a stage lie: folders, files, URLs, hub ids; what is None follows from `ckpt`."""

    ckpt: str | Path | None = None
    t2i: Path | None = None  # stage 1: diffusers folder
    llm: str | Path | None = None  # stage 2: transformers folder
    data: tuple[str, ...] = ()
    image_key: str | None = None  # column or ending of the images where it is not the usual one
    cache_latents: Path | None = None  # stage 1: folder of the autoencoder's latents


@dataclass(frozen=True)
class RunOptions:
    """Where a run happens, and what it reports."""

    run: Path  # folder of checkpoints and logs; resumed if it has any
    out: Path  # the checkpoint folder to write
    device: str | None = None
    log: str = "none"
    gpu_hour: float | None = None  # price in USD
    max_cost: float | None = None
    continue_from: Path | None = None  # a checkpoint of another run whose weights this one starts from

    @classmethod
    def of(cls, stage: str, preset: str, run: Path | None, out: Path | None, **more) -> RunOptions:
        """Return the options with default folders where none are given: runs/PRESET, and in it the stage's name."""
        run = run or Path("runs") / preset
        return cls(run, out or run / stage, **more)


def check_inputs(preset: str, config: TrainConfig, inputs: Inputs, options: RunOptions, plan: int | None) -> None:
    """Raise Misuse where a toy preset is given a flag of runs on files, or another preset lacks one."""
    if config.synthetic:
        given = {"data": inputs.data, "ckpt": inputs.ckpt, "cache-latents": inputs.cache_latents, "plan": plan}
        given |= {"llm": inputs.llm, "log": options.log != "none", "image-key": inputs.image_key}
        named = [name for name, value in given.items() if value]
        named += [n for n in ("gpu_hour", "max_cost") if getattr(options, n) is not None]
        if named:
            raise Misuse(f"--{named[0].replace('_', '-')} belongs to the paper's presets, not to --preset {preset}")
    elif not plan:
        if not inputs.data or not inputs.ckpt:
            raise Misuse(f"--preset {preset} needs --data and --ckpt (or --plan alone)")
        if options.max_cost is not None and options.gpu_hour is None:
            raise Misuse("--max-cost needs --gpu-hour USD, the price that the estimate is made with")


def stage_parser(stage: str, presets: Iterable[str], doc: str) -> Parser:
    """Return a parser with --preset, --run, --out, --device and --debug of `python -m vlv.train.<stage>`."""
    p = Parser(prog=f"python -m vlv.train.{stage}", description=doc, parents=[debug_argument()])
    p.add_argument(
        "--preset",
        choices=sorted(presets),
        default="tiny",
        help="sizes and schedule; the toy ones need no data (default: tiny)",
    )
    # the longer spelling is for torchrun, which takes --run for its own --run-path
    p.add_argument(
        "--run",
        "--run-folder",
        type=Path,
        help="folder of checkpoints and logs; resumed if it exists (default: runs/PRESET)",
    )
    p.add_argument("--out", type=Path, help=f"checkpoint folder to write (default: RUN/{stage})")
    p.add_argument(
        "--device", help="torch device: cpu, cuda, cuda:1 (default: cuda if there is one; the toy presets: cpu)"
    )
    return p


def add_flags(parser: argparse.ArgumentParser, preset: str, defaults: TrainConfig) -> None:
    """Add a flag for every field of TrainConfig, and those of runs on files; `defaults` are the ones of `preset`."""
    group = parser.add_argument_group(
        f"only with --preset {preset}, which runs on any number of processes under torchrun"
    )
    group.add_argument("--data", nargs="+", metavar="SRC", help="images: folders, .tar, .parquet, .jsonl, hf:NAME")
    group.add_argument("--ckpt", metavar="DIR", help="checkpoint to start from: a folder, published weights, a hub id")
    group.add_argument(
        "--image-key",
        metavar="NAME",
        help="column of the images, or in a tar the ending of their names, such as mask.png",
    )
    group.add_argument(
        "--continue-from", type=Path, metavar="DIR",
        help="start a new run from the weights of another: its RUN/NAME.saves, or one folder in there",
    )  # fmt: skip
    # the longer spelling is for torchrun, which takes --log for its own --log-dir
    group.add_argument(
        "--log",
        "--logger",
        default="none",
        metavar="NAME",
        help="also log to wandb, tensorboard or trackio (RUN/*.log.jsonl is always written)",
    )
    group.add_argument(
        "--plan", type=positive, nargs="?", const=1, metavar="GPUS",
        help="print the memory of a step on each of so many GPUs, and stop (1)",
    )  # fmt: skip
    group.add_argument("--gpu-hour", type=float, metavar="USD", help="price of a GPU for an hour, for the estimate")
    group.add_argument("--max-cost", type=float, metavar="USD", help="do not start if the estimate is higher")
    group = parser.add_argument_group(f"training, with the defaults of --preset {preset}")
    for f in fields(TrainConfig):
        if not f.metadata:
            continue
        flag, default = "--" + f.name.replace("_", "-"), getattr(defaults, f.name)
        if isinstance(default, bool):
            text = f"{f.metadata['help']} (default: {'on' if default else 'off'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            text = f"{f.metadata['help']} (default: {default})"
            group.add_argument(flag, type=type(default), choices=f.metadata["choices"], help=text)
