"""One training loop for every stage: AdamW, warm-up and decay, EMA, logs, exact resume.

Randomness and data follow from the step number alone, so a run that was killed continues from its
last save to the very same weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from vlv.common.files import atomic_write
from vlv.train.presets import LoopConfig


class Loop:
    """Trains `modules`; `groups` may give parameter groups with their own `lr` (default: all, one lr)."""

    def __init__(
        self,
        name: str,
        run: Path,
        config: LoopConfig,
        modules: dict[str, nn.Module],
        groups: list[dict] | None = None,
    ):
        self.name, self.run_dir, self.config = name, Path(run), config
        self.model = nn.ModuleDict(modules)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            groups or self.params, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.peak_lrs = [g["lr"] for g in self.optimizer.param_groups]
        self.ema = [p.detach().clone() for p in self.params] if config.ema else []
        self.step, self.history, self.seconds = 0, [], 0.0
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self._load()

    @property
    def state_file(self) -> Path:
        return self.run_dir / f"{self.name}.state.pt"

    def run(self, loss_fn: Callable[[int], dict[str, Tensor]]) -> None:
        """Train to the last step. `loss_fn(step)` returns scalars; the one named "loss" is minimised."""
        c, start, recent = self.config, time.time(), []
        first, before = self.step, self.seconds
        while self.step < c.steps:
            torch.manual_seed(c.seed * 1_000_003 + self.step)
            self._set_lr()
            with torch.autocast(self.params[0].device.type, torch.bfloat16, enabled=c.bf16):
                losses = loss_fn(self.step)
            if not torch.isfinite(losses["loss"]):
                raise FloatingPointError(f"{self.name}: the loss is {losses['loss'].item()} at step {self.step}")
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.params, c.clip)
            self.optimizer.step()
            self.step += 1
            if self.ema:
                # ramps up so that the average does not remember the initial weights
                decay = min(c.ema, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
            recent.append({k: v.item() for k, v in losses.items()})
            self.seconds = before + time.time() - start
            if self.step % c.log_every == 0 or self.step == c.steps:
                means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
                recent.clear()
                self.history.append({"step": self.step, **means, "seconds": round(self.seconds, 1)})
                rate = (self.step - first) / (time.time() - start)
                text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
                eta = (c.steps - self.step) / rate / 60
                print(
                    f"{self.name} {self.step}/{c.steps} {text} {rate:.2f} steps/s ETA {eta:.1f} min",
                    file=sys.stderr,
                    flush=True,
                )
            if self.step % c.save_every == 0 or self.step == c.steps:
                self._save()
        self.use_ema()

    def use_ema(self) -> None:
        """Put the averaged weights into the modules (for export; training goes on from the state file)."""
        for p, average in zip(self.params, self.ema, strict=False):
            p.data.copy_(average)

    def _set_lr(self) -> None:
        c = self.config
        done = max(0.0, (self.step - c.warmup) / max(1, c.steps - c.warmup))
        cosine = c.final_lr + (1 - c.final_lr) * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
        scale = min(1.0, (self.step + 1) / max(1, c.warmup)) * cosine
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * scale

    def _save(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "params": [p.detach() for p in self.params],
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(self.state_file) as file:
            torch.save(state, file)
        self.write_log(self.run_dir)

    def write_log(self, folder: Path) -> None:
        """`<name>.json` (settings and loss history) and `<name>.png` (the loss curve) into `folder`."""
        log = {"stage": self.name, "config": asdict(self.config), "torch": torch.__version__, "history": self.history}
        with atomic_write(folder / f"{self.name}.json") as file:
            file.write_text(json.dumps(log, indent=1))
        plot(self.history, self.name, folder / f"{self.name}.png")

    def _load(self) -> None:
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        shapes = [tuple(p.shape) for p in state["params"]]
        if shapes != [tuple(p.shape) for p in self.params]:
            raise ValueError(
                f"{self.state_file} was trained with another model configuration; "
                "remove it to start anew, or choose another --run folder"
            )
        before = state.get("config", {})
        for name, value in asdict(self.config).items():
            if name not in ("save_every", "log_every") and before.get(name) != value:  # all else decides the weights
                raise ValueError(
                    f"{self.state_file} was trained with {name} {before.get(name, 'unknown')}, this run has {value}: "
                    "remove it to start anew, or choose another --run folder"
                )
        for p, saved in zip(self.params, state["params"], strict=True):
            p.data.copy_(saved)
        self.ema = [e.to(p.device) for e, p in zip(state["ema"], self.params, strict=False)]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        print(f"{self.name}: resuming at step {self.step} of {self.config.steps}", file=sys.stderr, flush=True)


def plot(history: list[dict], name: str, path: Path) -> None:
    """The loss curves of a run as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    for key in history[0].keys() - {"step", "seconds"} if history else ():
        axis.plot([h["step"] for h in history], [h[key] for h in history], label=key)
    axis.set(xlabel="step", yscale="log", title=name)
    axis.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
