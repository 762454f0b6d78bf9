"""A whole run of vlv.train.trainer on a very small encoder: in this process, or started by torchrun.

python small_run.py DATA RUN ddp|fsdp|late|nan-ddp|nan-fsdp: trains to its end, resuming what RUN holds. Of several of
these words each is a run in a folder RUN/WORD of its own, where RANK.txt is what a process had to say.
"""

import contextlib
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from vlv.data.loader import TrainingImages, batches
from vlv.data.sources import open_sources
from vlv.model.config import PRESETS, DaViTConfig
from vlv.model.encoder import VLVEncoder
from vlv.train.config import TrainConfig
from vlv.train.objectives import Objective
from vlv.train.parallel import World
from vlv.train.trainer import Trainer

MODEL = replace(
    PRESETS["tiny"],
    vision=DaViTConfig(
        dims=(16, 32), heads=(1, 2), groups=(1, 2), depths=(1, 1), patches=(8, 3), strides=(8, 2), paddings=(0, 1),
        prenorm=(False, True), window=4,
    ),
    image_size=32, width=32, heads=2, ffn=64, encoder_layers=1, decoder_layers=1, queries=4, context_width=32,
    context_heads=2, context_ffn=64, context_layers=1, llm_width=0,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=8, batch=8, micro_batch=2, lr=1e-2, ema=0.9, bf16=False, workers=0, save_every=2, log_every=1, spike=0
)


class Noisy(Objective):
    """Draws noise, as stage 1 does, and uses every parameter that learns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = VLVEncoder(MODEL)
        self.encoder.bottleneck.text.requires_grad_(False)

    def forward(self, batch):
        context = self.encoder.context(batch["pixels"])
        return {"loss": (context - torch.randn_like(context)).square().mean()}


class Late(Noisy):
    """Noisy, whose decoder is trained from step 3 on."""

    def before_step(self, step):
        self.encoder.bottleneck.decoder.requires_grad_(step >= 3)


class NotANumber(Noisy):
    """Noisy, with a NaN on one process: from step 1 in the loss of 0 and of 1 alone, then in the gradient of each."""

    def before_step(self, step):
        self.step = step

    def forward(self, batch):
        losses = super().forward(batch)
        case, rank = divmod(self.step - 1, 2)
        if case == 0 and dist.get_rank() == rank:
            losses["loss"] = losses["loss"] + math.nan  # whose gradients are finite
        elif case == 1 and dist.get_rank() == rank:
            losses["loss"] = losses["loss"] + (losses["loss"] * 0).sqrt()  # 0, whose gradient is 0 * infinity
        return losses


def train(data, folder, config=CONFIG, objective=Noisy):
    """Train to the end in the processes at hand; returns the trainer's whole weights."""
    with World.start("cpu") as world:
        trainer = Trainer("toy", Path(folder), config, objective(), world)
        images = TrainingImages(open_sources([str(data)]), MODEL.image_size, config.seed)
        trainer.fit(
            batches(images, config.micro_batch, trainer.images, config.workers, world.rank, world.size, world.device)
        )
        return trainer.weights()


def run(data, folder, word):
    """Train as `word` says."""
    if word == "late":
        train(data, folder, replace(CONFIG, encoder_from=3), Late)
    elif word.startswith("nan-"):
        train(data, folder, replace(CONFIG, steps=6, parallel=word.removeprefix("nan-")), NotANumber)
    else:
        train(data, folder, replace(CONFIG, parallel=word))


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, folder, *words = sys.argv[1:]
    if len(words) == 1:
        run(data, folder, words[0])
    for number, word in enumerate(words if len(words) > 1 else ()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # as after a restart: processes that meet anew
        Path(folder, word).mkdir(parents=True, exist_ok=True)
        with Path(folder, word, f"{os.environ['RANK']}.txt").open("w") as file, contextlib.redirect_stderr(file):
            run(data, Path(folder, word), word)
