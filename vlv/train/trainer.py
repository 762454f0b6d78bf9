"""The training loop at scale: accumulation, clipping, EMA, guard, saves and logs, on any number of processes.

The data and the randomness of a forward pass follow from the position of its first image alone. So a step is the same
whichever process takes which of its micro-batches, and a run that was killed goes on exactly where its save is.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from vlv.train.anomaly import AnomalyDetector
from vlv.train.checkpointing import Saves
from vlv.train.config import TrainConfig
from vlv.train.logging import open_log
from vlv.train.parallel import World, accumulating, local, prepare, whole

PROBE = 4  # forward passes timed for the estimate, after as many to warm up
_LEARNING = StateDictOptions(ignore_frozen_params=True, strict=False)


class Trainer:
    """Trains what requires gradients in `objective`, a module from a micro-batch to its loss."""

    def __init__(self, name: str, run: Path, config: TrainConfig, objective: nn.Module, world: World):
        self.name, self.run_dir, self.config, self.world = name, Path(run), config, world
        self.passes = config.accumulation(world.size)
        self.module = prepare(objective, config, world)
        named = [(n.removeprefix("module."), p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.names, self.params = [n for n, _ in named], [p for _, p in named]
        if not self.params:
            raise ValueError("nothing learns: these flags freeze every weight")
        self.optimizer = torch.optim.AdamW(
            self.params, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.ema = [p.detach().clone() for p in self.params] if config.ema else []
        self.step, self.images, self.seconds, self.gpu_seconds = 0, 0, 0.0, 0.0
        self.replaced, self.guard = 0, AnomalyDetector(config.spike)
        if world.first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self.saves = Saves(self.run_dir, name, config.keep, world)
        if found := self.saves.latest():
            self._load(*found)

    def probe(self, feed: Iterator[dict]) -> tuple[float, Iterator[dict]]:
        """Images a second of all processes, by passes that change no weight; and the feed, complete again."""
        taken = list(itertools.islice(feed, 2 * PROBE))
        start = 0.0
        for i, batch in enumerate(taken):
            if i == PROBE:
                self._synchronise()
                start = time.perf_counter()
            self._forward_backward(batch, last=True)
        self._synchronise()
        seconds = torch.tensor(time.perf_counter() - start, device=self.world.device)
        self.optimizer.zero_grad(set_to_none=True)
        rate = PROBE * self.config.micro_batch * self.world.size / self.world.mean(seconds).item()
        return rate, itertools.chain(taken, feed)

    def fit(self, feed: Iterator[dict], log: str = "none") -> None:
        """Train to the last step; `feed` begins at `self.images`."""
        c = self.config
        sink = open_log(log, self.run_dir, self.name, asdict(c), self.step) if self.world.first else None
        start, before, first = time.time(), (self.seconds, self.gpu_seconds), self.images
        since = torch.zeros(3, dtype=torch.float64)  # loss, norm, replaced; of the steps since the last log line
        steps = 0
        while self.step < c.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr * c.rate(self.step)
            loss, norm, replaced = self._train_step(feed)
            self.step, self.images, self.replaced = self.step + 1, self.images + c.batch, self.replaced + replaced
            elapsed = time.time() - start
            self.seconds, self.gpu_seconds = before[0] + elapsed, before[1] + elapsed * self.world.size
            since += torch.tensor([loss, norm, replaced], dtype=torch.float64)
            steps += 1
            if self.step % c.log_every == 0 or self.step == c.steps:
                if self.world.first:
                    rate = (self.images - first) / elapsed
                    mean = (since / steps).tolist()
                    figures = {
                        "loss": mean[0], "norm": mean[1], "lr": self.optimizer.param_groups[0]["lr"],
                        "images_per_second": rate, "replaced": self.replaced, "skipped": self.guard.skipped,
                    }  # fmt: skip
                    sink(self.step, figures)
                    hours = (c.steps - self.step) * c.batch / rate / 3600
                    self.say(f"{self.step}/{c.steps} loss {mean[0]:.4f} {rate:.1f} images/s ETA {hours:.2f} h")
                since.zero_()
                steps = 0
            if self.step % c.save_every == 0 or self.step == c.steps:
                self._save()
        self.saves.wait()

    def weights(self) -> dict[str, Tensor]:
        """The objective's whole state dict, averaged weights where there are any; empty but on the first process."""
        for p, average in zip(self.params, self.ema, strict=False):
            local(p.data).copy_(local(average))
        return get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def say(self, text: str) -> None:
        """A line on stderr, once for all processes."""
        if self.world.first:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _train_step(self, feed: Iterator[dict]) -> tuple[float, float, int]:
        """Loss, gradient norm and replaced images of a step, which the guard may leave out."""
        sums = torch.zeros(2, device=self.world.device)
        for i in range(self.passes):
            batch = next(feed)
            sums[0] += self._forward_backward(batch, last=i == self.passes - 1)
            sums[1] += sum(batch["replaced"])
        loss, replaced = self.world.mean(sums).tolist()
        norm = whole(nn.utils.clip_grad_norm_(self.params, self.config.clip)).item()
        reason = self.guard.reason_to_skip(self.step, loss, norm)
        if reason:
            self.say(f"step {self.step}, images from {self.images}: left out, {reason}")
        else:
            self.optimizer.step()
            self._average()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, round(replaced * self.world.size)

    def _forward_backward(self, batch: dict, last: bool) -> Tensor:
        """One pass's share of the step's loss, detached; its gradients are added up."""
        # folded into 63 bits: position and seed decide the noise, whichever process draws it
        torch.manual_seed((self.config.seed * 1_000_003 + batch["position"]) % 2**63)
        with accumulating(self.module, last):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.bf16):
                loss = self.module(batch) / self.passes
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            # ramps up, so that the average does not remember the initial weights
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_([local(e) for e in self.ema], [local(p.detach()) for p in self.params], 1 - decay)

    def _synchronise(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _tensors(self) -> dict:
        model, optimizer = get_state_dict(self.module, self.optimizer, options=_LEARNING)
        return {"model": model, "optimizer": optimizer, "ema": dict(zip(self.names, self.ema, strict=False))}

    def _save(self) -> None:
        progress = {
            "step": self.step, "images": self.images, "seconds": self.seconds, "gpu_seconds": self.gpu_seconds,
            "replaced": self.replaced, "guard": self.guard.state(), "config": asdict(self.config),
        }  # fmt: skip
        self.saves.write(self.step, self._tensors(), progress)

    def _load(self, folder: Path, progress: dict) -> None:
        before = progress["config"]
        for name in ("seed", "micro_batch"):
            if before[name] != getattr(self.config, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{folder} was written with {flag} {before[name]}, which decides the data and noise to come: "
                    "give the same, or choose another --run folder"
                )
        tensors = self._tensors()
        self.saves.read(folder, tensors)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"],
            options=_LEARNING,
        )  # fmt: skip
        self.step, self.images, self.replaced = progress["step"], progress["images"], progress["replaced"]
        self.seconds, self.gpu_seconds = progress["seconds"], progress["gpu_seconds"]
        self.guard = AnomalyDetector(self.config.spike, **progress["guard"])
        self.say(f"resuming at step {self.step} of {self.config.steps}")
