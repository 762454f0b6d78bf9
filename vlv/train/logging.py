"""Where a run's figures go: JSON lines always, and one of wandb, tensorboard and trackio if asked."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from vlv.common.command import Misuse, say
from vlv.common.files import atomic_write, write_json
from vlv.common.jsonl import read_records
from vlv.train.config import TrainError

Sink = Callable[[int, dict], None]
KINDS = ("none", "wandb", "tensorboard", "trackio")
NOT_LOSSES = {"step", "norm", "lr", "images_per_second", "replaced", "skipped", "seconds"}


def check(kind: str) -> None:
    """Raise Misuse where `kind` is unknown, TrainError where its package is not installed."""
    if kind not in KINDS:
        raise Misuse(f"--log {kind}: one of {', '.join(KINDS)}")
    if kind != "none":
        try:
            importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
        except ImportError as error:
            raise TrainError(f"--log {kind} needs a package that is not installed: pip install {kind}") from error


def open_log(kind: str, run: Path, name: str, config: dict, step: int) -> Sink:
    """Return a function that takes (step, figures); lines of later steps, which a resumed run writes again, go."""
    file = run / f"{name}.log.jsonl"
    kept = [record for record in read_records(file) if record["step"] <= step]
    if file.exists():
        with atomic_write(file) as rewritten:
            rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
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


def write_summary(run: Path, name: str, config: dict) -> None:
    """Write RUN/NAME.json (settings and history, from the log) and RUN/NAME.png (the curves of the losses)."""
    history = list(read_records(run / f"{name}.log.jsonl"))
    log = {"stage": name, "config": config, "torch": torch.__version__, "history": history}
    write_json(run / f"{name}.json", log, indent=1)
    try:
        import matplotlib
    except ImportError:
        say(f"{name}: no curve is drawn, matplotlib is not installed: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    for key in sorted(history[0].keys() - NOT_LOSSES) if history else ():
        axis.plot([h["step"] for h in history], [h[key] for h in history], label=key)
    axis.set(xlabel="step", yscale="log", title=name)
    if history:
        axis.legend()
    figure.tight_layout()
    with atomic_write(run / f"{name}.png") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
