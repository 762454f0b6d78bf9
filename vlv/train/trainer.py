"""The training loop of every stage and size, on any number of processes.

A step: the forward and backward passes of its micro-batches, one exchange of gradients, clipping, AdamW, the average
of the weights. Data and randomness of a pass follow from its position alone. So a step is the same whichever process
takes which of its micro-batches, and a run that was killed continues exactly from its last checkpoint.

`AnomalyDetector` leaves out steps that are not finite or that stand out; `Checkpoints` writes the run's state;
`open_log` takes the figures; `prepare` wraps the objective in DDP or FSDP2.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vlv.common.command import say
from vlv.common.jsonl import cut_torn_line, read_records
from vlv.train import cost
from vlv.train.checkpointing import Checkpoints
from vlv.train.config import RunOptions, TrainConfig, TrainError
from vlv.train.logging import open_log, write_summary
from vlv.train.objectives import Objective
from vlv.train.parallel import World, accumulating, full_tensor, local, prepare

TIMED_PASSES = 4  # forward passes timed for the estimate, after as many to warm up
WINDOW = 128  # recent gradient norms that a step is compared with
# what may differ between a run and its continuation: it changes no weight, or only the order of additions
FREE = {
    "parallel", "compile", "checkpoint_activations", "workers", "spike", "patience", "save_every", "keep", "log_every",
    "dtype",
}  # fmt: skip


class Diverged(TrainError, FloatingPointError):
    """Raised after too many steps in a row that had to be left out."""


class Trainer:
    """Trains what requires gradients in `objective`; continues the newest checkpoint in the folder `run`."""

    def __init__(
        self,
        name: str,
        run: Path,
        config: TrainConfig,
        objective: Objective,
        world: World,
        inputs: dict[str, str] | None = None,
        continue_from: Path | None = None,
    ):
        self.name = name
        self.run_dir = Path(run)
        self.config = config
        self.world = world
        self.objective = objective
        self.inputs = inputs or {}
        self.continue_from = str(Path(continue_from).resolve()) if continue_from else None
        self.passes = config.accumulation(world.size)
        self.module = prepare(objective, config, world)
        named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        self.names, self.params = [n for n, _ in named], [p for _, p in named]
        if not self.params:
            raise TrainError("nothing is trained: these flags freeze every weight")
        groups = objective.parameter_groups(config.lr)
        if not config.decay_norms:
            groups = [
                group | {"params": [p for p in group["params"] if (p.ndim < 2) == small], "weight_decay": decay}
                for group in groups for small, decay in ((False, config.weight_decay), (True, 0.0))
            ]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        for p in self.params:  # now, so that every checkpoint has the moments of weights that join later too
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.optimizer.state[p] = {
                "step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
            }  # fmt: skip
        self.ema = [p.detach().clone() for p in self.params] if config.ema else []
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.gpu_seconds = 0.0
        self.replaced = 0
        self.detector = AnomalyDetector(config.spike, config.patience)
        if world.first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self.run_dir, name, config.keep, world)
        self.kept = list(self.names)  # weights that a checkpoint holds: those that are trained, and that ever were
        if found := self.checkpoints.latest():
            self._load(found)
        elif continue_from:
            self._take_weights(Checkpoints.find(continue_from))
        self.skipped = SkippedRows(self.run_dir / "skipped.jsonl")

    def measure_throughput(self, feed: Iterator[dict]) -> tuple[float, Iterator[dict]]:
        """Return images a second of all processes, by passes that change no weight, and the feed, complete again."""
        taken = list(itertools.islice(feed, 2 * TIMED_PASSES))
        self.objective.before_step(self.step)
        start = 0.0
        for i, batch in enumerate(taken):
            if i == TIMED_PASSES:
                self._synchronise()
                start = time.perf_counter()
            self._forward_backward(batch, last=True)
        self._synchronise()
        seconds = torch.tensor(time.perf_counter() - start, device=self.world.device)
        self.optimizer.zero_grad(set_to_none=True)
        rate = TIMED_PASSES * self.config.micro_batch * self.world.size / self.world.mean(seconds).item()
        return rate, itertools.chain(taken, feed)

    def fit(self, feed: Iterator[dict], log: str = "none") -> None:
        """Train to the last step. `feed` gives this process's micro-batches from image `self.images` on.

        A micro-batch has `pixels`, its `position` (an integer that decides its noise) and what the objective takes.
        Raises TrainError if another process trains in the same folder.
        """
        with self._only_run():
            self._fit(feed, log)

    @contextmanager
    def _only_run(self) -> Iterator[None]:
        """Hold the run folder's lock. Raises TrainError if another process trains in it."""
        if not self.world.first:
            yield
            return
        with (self.run_dir / f"{self.name}.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise TrainError(
                    f"{self.run_dir} is being trained by process {lock.read().strip()} (torchrun's workers go on when "
                    "torchrun itself is killed): stop that one, or give another --run-folder"
                ) from error
            except OSError:
                pass  # a file system without locks
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _fit(self, feed: Iterator[dict], log: str) -> None:
        c = self.config
        sink = open_log(log, self.run_dir, self.name, asdict(c), self.step) if self.world.first else None
        start, before, first = time.time(), (self.seconds, self.gpu_seconds), self.images
        recent: list[dict[str, float]] = []  # figures of the steps since the last line of the log
        while self.step < c.steps:
            recent.append(self.train_step(feed))
            elapsed = time.time() - start
            self.seconds, self.gpu_seconds = before[0] + elapsed, before[1] + elapsed * self.world.size
            if self.step % c.log_every == 0 or self.step == c.steps:
                if sink:
                    figures = {key: sum(r[key] for r in recent) / len(recent) for key in recent[0]}
                    rate = (self.images - first) / elapsed
                    sink(self.step, figures | {"images_per_second": rate, **self._counts()})
                    hours = (c.steps - self.step) * c.batch / rate / 3600
                    losses = " ".join(f"{k} {v:.4f}" for k, v in figures.items() if k not in ("norm", "lr"))
                    self.say(f"{self.step}/{c.steps} {losses} {rate:.1f} images/s ETA {hours:.2f} h")
                recent.clear()
            if self.step % c.save_every == 0 or self.step == c.steps:
                self._save()
        self.checkpoints.wait()
        if self.world.first:
            write_summary(self.run_dir, self.name, asdict(c))

    def train_step(self, feed: Iterator[dict]) -> dict[str, float]:
        """Take one step over all processes; return its mean losses, gradient norm and learning rate."""
        rate = self.config.rate(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * rate
        self.objective.before_step(self.step)
        replaced, losses = 0, {}
        for i in range(self.passes):
            batch = next(feed)
            for key, value in self._forward_backward(batch, last=i == self.passes - 1).items():
                losses[key] = losses.get(key, 0.0) + value
            replaced += sum(batch.get("replaced", ()))
            self.skipped.add(batch.get("skipped", ()))
        sums = self.world.mean(torch.stack([*losses.values(), torch.tensor(float(replaced), device=self.world.device)]))
        *means, replaced = sums.tolist()
        losses = dict(zip(losses, means, strict=True))
        norm = full_tensor(nn.utils.clip_grad_norm_(self.params, self.config.clip)).item()
        reason = self.detector.reason_to_skip(self.step, losses["loss"], norm)
        if reason:
            self.say(f"step {self.step}, images from {self.images}: left out, {reason}")
        else:
            self.optimizer.step()
            self._average()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.images = self.step + 1, self.images + self.config.batch
        self.replaced += round(replaced * self.world.size)
        return losses | {"norm": norm, "lr": self.config.lr * rate}

    def weights(self) -> dict[str, Tensor]:
        """Return the objective's state dict with averaged weights where there are any; empty but on the first process.

        The average replaces the weights themselves: call it when training is done.
        """
        for p, average in zip(self.params, self.ema, strict=False):
            local(p.data).copy_(local(average))
        return get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def say(self, text: str) -> None:
        """Print a line to stderr, on the first process only."""
        if self.world.first:
            say(f"{self.name}: {text}")

    def _forward_backward(self, batch: dict, last: bool) -> dict[str, Tensor]:
        """Return one pass's share of the step's losses; its gradients are added up."""
        # folded into 63 bits: position and seed decide the noise, whichever process draws it
        torch.manual_seed((self.config.seed * 1_000_003 + batch["position"]) % 2**63)
        with accumulating(self.module, last):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.bf16):
                losses = {key: value / self.passes for key, value in self.module(batch).items()}
            losses["loss"].backward()
        return {key: value.detach() for key, value in losses.items()}

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema:
            # ramps up, so that the average does not remember the initial weights
            decay = min(self.config.ema, (2 + self.step) / (11 + self.step))
            torch._foreach_lerp_([local(e) for e in self.ema], [local(p.detach()) for p in self.params], 1 - decay)

    def _counts(self) -> dict:
        return {"replaced": self.replaced, "skipped": self.detector.skipped, "seconds": round(self.seconds, 1)}

    def _synchronise(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _tensors(self, names: list[str]) -> dict:
        """Return weights, moments and averages by the weights' names; a checkpoint is read into them in place."""
        every = dict(self.objective.named_parameters())
        return {
            "model": {name: every[name].detach() for name in names},
            "optimizer": {n: dict(self.optimizer.state[p]) for n, p in zip(self.names, self.params, strict=True)},
            "ema": dict(zip(self.names, self.ema, strict=False)),
        }

    def _save(self) -> None:
        progress = {
            "step": self.step, "images": self.images, "seconds": self.seconds, "gpu_seconds": self.gpu_seconds,
            "replaced": self.replaced, "detector": self.detector.state(), "config": asdict(self.config),
            "inputs": self.inputs, "continue_from": self.continue_from, "weights": self.kept,
        }  # fmt: skip
        self.checkpoints.write(self.step, self._tensors(self.kept), progress)

    def _load(self, folder: Path) -> None:
        """Continue from a checkpoint of this run. Raises TrainError where anything that decides weights differs."""
        progress = Checkpoints.progress(folder)
        before, now = progress["config"], asdict(self.config)
        changed = {f"--{n.replace('_', '-')}": (before.get(n), now[n]) for n in now if n not in FREE}
        changed["--continue-from"] = (progress["continue_from"], self.continue_from)
        differences = [f"{flag} {old}, this run has {new}" for flag, (old, new) in changed.items() if old != new]
        differences += [f"another --{n}" for n in self.inputs if progress["inputs"].get(n) != self.inputs[n]]
        if differences:
            raise TrainError(
                f"{folder} was written with {differences[0]}, which decides the weights to come: give the same, or "
                f"choose another --run folder (--continue-from {folder.parent} starts it from these weights)"
            )
        self.kept = progress["weights"]
        self.checkpoints.read(folder, self._tensors(self.kept))
        self.step, self.images, self.replaced = progress["step"], progress["images"], progress["replaced"]
        self.seconds, self.gpu_seconds = progress["seconds"], progress["gpu_seconds"]
        self.detector = AnomalyDetector(self.config.spike, self.config.patience, **progress["detector"])
        self.say(f"resuming at step {self.step} of {self.config.steps}")

    def _take_weights(self, folder: Path) -> None:
        """Start from the weights of another run's checkpoint, all that it has."""
        names = Checkpoints.progress(folder)["weights"]
        every = dict(self.objective.named_parameters())
        if foreign := sorted(set(names) - every.keys()):
            raise TrainError(
                f"{folder} has weights that this stage has not ({foreign[0]} and {len(foreign) - 1} more): "
                "--continue-from takes a run of the same stage"
            )
        self.checkpoints.read(folder, {"model": {name: every[name].detach() for name in names}})
        for p, average in zip(self.params, self.ema, strict=False):
            local(average).copy_(local(p.detach()))
        self.kept += [name for name in names if name not in set(self.names)]
        self.say(f"starting from {len(names)} weights of {folder}")


def train(
    trainer: Trainer,
    feed: Iterator[dict],
    options: RunOptions,
    write: Callable[[dict[str, Tensor], Path], None] | None = None,
) -> None:
    """Train to the end; then `write` takes the weights (`Trainer.weights`) and the folder to write.

    The cost is told before and after where the data are real. Raises TrainError where its estimate is over
    `options.max_cost`.
    """
    c, world = trainer.config, trainer.world
    if trainer.step < c.steps and not c.synthetic and write:
        rate, feed = trainer.measure_throughput(feed)
        left = (c.steps - trainer.step) * c.batch
        text, dollars = cost.estimate(left, rate, world.size, options.gpu_hour)
        trainer.say(text)
        if options.max_cost is not None and dollars > options.max_cost:
            raise TrainError(f"the estimate of ${dollars:,.2f} is over --max-cost {options.max_cost:g}: not started")
    trainer.fit(feed, options.log)
    trainer.say(cost.account(trainer.images, trainer.seconds, trainer.gpu_seconds, options.gpu_hour))
    weights = trainer.weights()
    if world.first and write:
        write(weights, options.out)
    world.barrier()


class SkippedRows:
    """RUN/skipped.jsonl: the rows that gave no image, each once, with the reason."""

    def __init__(self, file: Path):
        self.file = file
        cut_torn_line(file)
        self.known = {record["id"] for record in read_records(file)}

    def add(self, rows: Iterable[list[tuple[str, str]]]) -> None:
        """Note (id, reason) of rows that are not in the file yet; one write, so that processes can share the file."""
        fresh = {id: reason for skipped in rows for id, reason in skipped if id not in self.known}
        self.known |= fresh.keys()
        if fresh:
            lines = [
                json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in fresh.items()
            ]
            with self.file.open("ab") as stream:
                stream.write("".join(lines).encode())


class AnomalyDetector:
    """Judges each step by its loss and gradient norm, which all processes see alike. Its state is plain JSON."""

    def __init__(self, spike: float, patience: int = 10, norms: list[float] = (), skipped: int = 0, in_a_row: int = 0):
        self.spike = spike
        self.patience = patience
        self.norms = list(norms)
        self.skipped = skipped
        self.in_a_row = in_a_row

    def reason_to_skip(self, step: int, loss: float, norm: float) -> str | None:
        """Return why the step must not change the weights, None if it may.

        Raises Diverged after `patience` steps in a row that must not.
        """
        usual = median(self.norms) if len(self.norms) >= WINDOW // 4 else None
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient's norm is {norm}"
        elif self.spike and usual is not None and norm > self.spike * usual:
            reason = f"the gradient's norm {norm:.3g} is over {self.spike:g} times the recent median {usual:.3g}"
        if reason is None:
            self.norms = [*self.norms[1 - WINDOW :], norm]
            self.in_a_row = 0
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.patience:
            raise Diverged(
                f"{self.in_a_row} steps in a row were left out, the last at step {step} because {reason}: "
                "look at the data there, or go on with --continue-from, the last checkpoint, and a lower --lr"
            )
        return reason

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"norms": self.norms, "skipped": self.skipped, "in_a_row": self.in_a_row}
