"""Where a run's figures go: JSON lines always, and one of wandb, tensorboard and trackio if asked."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

from vlv.common.command import Misuse
from vlv.common.files import atomic_write

Sink = Callable[[int, dict], None]
KINDS = ("none", "wandb", "tensorboard", "trackio")


def check(kind: str) -> None:
    """Raises Misuse where `kind` is unknown, ValueError where its package is not installed."""
    if kind not in KINDS:
        raise Misuse(f"--log {kind}: one of {', '.join(KINDS)}")
    if kind != "none":
        try:
            importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
        except ImportError as error:
            raise ValueError(f"--log {kind} needs a package that is not installed: pip install {kind}") from error


def open_log(kind: str, run: Path, name: str, config: dict, step: int) -> Sink:
    """A function that takes (step, figures). Lines of steps from `step` on, which a resumed run writes again, go."""
    file = run / f"{name}.log.jsonl"
    if file.exists():
        # what has no end was left unfinished by a killed run
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with atomic_write(file) as rewritten:
            rewritten.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    send = _sender(kind, run, name, config, step)

    def log(step: int, figures: dict) -> None:
        with file.open("a") as stream:
            stream.write(json.dumps({"step": step, **figures}) + "\n")
        send(step, figures)

    return log


def _sender(kind: str, run: Path, name: str, config: dict, step: int) -> Sink:
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard" / name, purge_step=step + 1)

        def write(step: int, figures: dict) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write
    if kind == "none":
        return lambda step, figures: None
    tool = importlib.import_module(kind)
    title = f"{run.resolve().name}-{name}"
    if kind == "wandb":
        tool.init(project="vlv", id=title, name=title, dir=str(run), config=config, resume="allow")
    else:
        tool.init(project="vlv", name=title, config=config, resume="allow")
    return lambda step, figures: tool.log(figures, step=step)
