"""The published hyper-parameters of both stages, and every switch of a run at that scale. Imports nothing heavy.

Where a figure comes from stands beside it, first what is followed:

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
from dataclasses import dataclass, field, fields, replace

from vlv.common.command import Misuse, positive


def _option(default, text: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """A run at scale; every field is a flag of the same name."""

    steps: int = _option(200_000, "optimiser steps")  # P4.1, sh1
    batch: int = _option(512, "images a step, over all processes")  # P4.1, sh1, ds
    micro_batch: int = _option(32, "images a forward pass; the rest of a step's are accumulated")  # ours; ds: 64
    lr: float = _option(5e-5, "peak learning rate")  # P4.1, sh1, ds
    schedule: str = _option("cosine", "decay of the learning rate", ("cosine", "linear"))  # P4.1, ds
    final_lr: float = _option(1e-4, "last learning rate, as a share of the peak")  # ds: cos_min_ratio
    warmup: int = _option(0, "steps of linear warm-up")  # sh1, ds, py2
    beta2: float = _option(0.99, "AdamW's second beta; the first is 0.9")  # P4.1, ds
    weight_decay: float = _option(0.01, "AdamW's decoupled weight decay")  # P4.1, ds; py2: torch's default, the same
    clip: float = _option(1.0, "largest norm of the gradients")  # ds; at stage 2 ours: py2 clips nothing
    ema: float = _option(0.0, "decay of an average of the weights, which is then what is written; 0: none")  # py1, py2
    # sh1, sh2: --unfreeze_florence2_language_model
    encoder_part: str = _option(
        "language-model", "what of Florence-2 learns", ("all", "language-model", "decoder", "none")
    )
    # P3.3; P4.3 has the steps as an ablation
    unfreeze: str = _option("encoder", "stage 2: what learns, each with those before it", ("mlp", "llm", "encoder"))
    queries: int = _option(0, "learned queries; 0: as many as the start has (77)")  # P4.1, sh1; P4.3 tries 16 and 32
    # sh1, sh2: --use_text_encoder
    clip_layers: bool = _option(True, "CLIP's text layers between queries and UNet (--no-clip-layers: ablation)")
    image_size: int = _option(0, "side of the square crop; 0: the start's (384)")  # py1's default, sh2's data
    max_tokens: int = _option(300, "stage 2: a caption's tokens")  # m2: max_length
    end_token: bool = _option(True, "stage 2: learn where a caption ends (the published loop does not)")  # ours; m2
    min_side: int = _option(0, "leave out images with a shorter side below this")  # ours; P4.1 chose its data before
    max_aspect: float = _option(0.0, "leave out images longer than this times their width, or the reverse; 0: none")
    parallel: str = _option("ddp", "copies of the model, or shards of it", ("ddp", "fsdp"))  # ours; ds: ZeRO 2
    bf16: bool = _option(True, "compute in bfloat16; weights and optimiser stay float32")  # P4.1 at stage 2, sh2
    checkpoint_activations: bool = _option(True, "recompute activations in the backward pass")  # m1: UNet; m2: LLM
    compile: bool = _option(False, "torch.compile of every block")  # from here on all are ours
    workers: int = _option(4, "processes that read and decode, for each training process")
    seed: int = _option(0, "of data order and noise")
    spike: float = _option(10.0, "skip a step whose gradient is this many times the recent median; 0: never")
    save_every: int = _option(1000, "steps between saves")
    keep: int = _option(2, "saves kept")
    log_every: int = _option(20, "steps between lines of the log")

    def accumulation(self, processes: int) -> int:
        """Forward passes of one process in one step. Raises Misuse where the batch cannot be divided."""
        unit = self.micro_batch * processes
        if self.batch < 1 or self.micro_batch < 1 or self.batch % unit:
            raise Misuse(
                f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch} x {processes} processes "
                f"= {unit}: choose one that is, or another number of processes"
            )
        return self.batch // unit

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the peak."""
        import math

        done = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.final_lr + (1 - self.final_lr) * left)


PRESETS = {
    "paper-stage1": TrainConfig(),
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
}


def add_flags(parser: argparse.ArgumentParser, preset: str) -> None:
    """The flags of a run at scale; of the ones of TrainConfig, what is not given stays the preset's."""
    group = parser.add_argument_group(f"with --preset {preset}, on any number of processes under torchrun")
    group.add_argument("--data", nargs="+", metavar="SRC", help="images: folders, .tar, .parquet, .jsonl, hf:NAME")
    group.add_argument("--ckpt", metavar="DIR", help="checkpoint to start from: a folder, published weights, a hub id")
    # the longer spelling is for torchrun, which takes --log for its own --log-dir
    group.add_argument("--log", "--logger", default="none", help="wandb, tensorboard or trackio, beside RUN/*.jsonl")
    group.add_argument("--cache-latents", metavar="DIR", help="keep the autoencoder's latents there, and reuse them")
    group.add_argument(
        "--plan", type=positive, nargs="?", const=1, metavar="GPUS",
        help="print the memory of a step on each GPU, and stop",
    )  # fmt: skip
    group.add_argument("--gpu-hour", type=float, metavar="USD", help="price of a GPU for an hour, for the estimate")
    group.add_argument("--max-cost", type=float, metavar="USD", help="do not start if the estimate is higher")
    for f in fields(TrainConfig):
        flag, default = "--" + f.name.replace("_", "-"), getattr(PRESETS[preset], f.name)
        if isinstance(default, bool):
            text = f"{f.metadata['help']} ({'on' if default else 'off'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            text = f"{f.metadata['help']} ({default})"
            group.add_argument(flag, type=type(default), choices=f.metadata["choices"], help=text)


def config(args: argparse.Namespace) -> TrainConfig:
    """The preset with what the flags change. Raises Misuse on values that make no sense."""
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    made = replace(PRESETS[args.preset], **given)
    for name in ("steps", "batch", "micro_batch", "max_tokens", "save_every", "log_every", "keep"):
        if getattr(made, name) < 1:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(made, name)}: at least 1")
    for name in ("workers", "warmup", "spike", "queries", "image_size", "min_side", "max_aspect"):
        if getattr(made, name) < 0:
            raise Misuse(f"--{name.replace('_', '-')} {getattr(made, name)}: not below 0")
    if not made.clip > 0:
        raise Misuse(f"--clip {made.clip}: above 0, or every step would be empty; inf clips nothing")
    if not 0 <= made.ema < 1:
        raise Misuse(f"--ema {made.ema}: from 0 to below 1")
    return made
