"""A run on one process: exact resume, its log, and refusal of a state of other settings."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vlv.train.config import TrainConfig
from vlv.train.objectives import Objective
from vlv.train.parallel import World
from vlv.train.trainer import Trainer

CONFIG = TrainConfig(
    steps=20, batch=8, micro_batch=8, lr=1e-2, final_lr=0.02, warmup=3, ema=0.995, bf16=False, spike=0, patience=1,
    save_every=5, log_every=5, workers=0, checkpoint_activations=False,
)  # fmt: skip


class Line(Objective):
    """A linear layer towards 1 on noise; `stop` is the pass in which Ctrl-C arrives."""

    def __init__(self, width=4, stop=None, bad=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.width, self.stop, self.bad = nn.Linear(width, 1), width, stop, bad

    def forward(self, batch):
        if batch["position"] == self.stop:
            raise KeyboardInterrupt
        x = torch.full((8, self.width), float("inf")) if self.bad else torch.randn(8, self.width)
        return {"loss": (self.net(x) - 1).square().mean()}


def fit(folder, steps, stop=None, width=4, bad=False, **more):
    config = replace(CONFIG, steps=steps, save_every=max(5, steps // 4), **more)
    with World.start("cpu") as world:
        trainer = Trainer("toy", Path(folder), config, Line(width, stop, bad), world)
        feed = ({"position": step} for step in range(trainer.step, steps))
        trainer.fit(feed)
        return [trainer.weights()[f"net.{name}"] for name in ("weight", "bias")]


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    whole = fit(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", 20, stop=13)
    parts = fit(tmp_path / "parts", 20)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_log_holds_settings_and_curve(tmp_path):
    fit(tmp_path, 20)
    log = json.loads((tmp_path / "toy.json").read_text())
    assert [h["step"] for h in log["history"]] == [5, 10, 15, 20]
    assert log["config"]["steps"] == 20
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_a_state_of_another_model_is_refused(tmp_path):
    fit(tmp_path, 5)
    with pytest.raises(ValueError, match=r"does not fit this run .*: it was written with other flags"):
        fit(tmp_path, 5, width=6)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch": 4, "micro_batch": 4}, {"lr": 1e-3}, {"steps": 10}])
def test_a_state_of_other_settings_is_refused(tmp_path, other):
    fit(tmp_path, 5)
    fit(tmp_path, 5, log_every=1)
    name, value = next(iter(other.items()))
    with pytest.raises(ValueError, match=f"was written with --{name} .*, this run has {value}, which decides the wei"):
        fit(tmp_path, **{"steps": 5} | other)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(tmp_path, 3, bad=True)


def test_kill_9_at_any_moment_and_again_gives_the_same_bits(tmp_path):
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); import test_resume; "
        "print('ready', flush=True); test_resume.fit(__import__('pathlib').Path(sys.argv[1]), 400)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "killed"), str(Path(__file__).parent)]
    for delay in (0.05, 0.15):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
    killed, whole = fit(tmp_path / "killed", 400), fit(tmp_path / "whole", 400)
    assert all(torch.equal(a, b) for a, b in zip(whole, killed, strict=True))


class TwoParts(Objective):
    """Two layers, of which the second joins at step 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def before_step(self, step):
        self.late.requires_grad_(step >= 4)

    def forward(self, batch):
        return {"loss": (self.late(self.first(torch.randn(8, 4))) - 1).square().mean()}


def test_weights_that_join_later_are_kept_by_every_checkpoint(tmp_path):
    """Resumed before they join and after it, the run gives the bits of an uninterrupted one."""

    def train(folder, passes):
        with World.start("cpu") as world:
            trainer = Trainer("toy", folder, replace(CONFIG, steps=8, save_every=1, ema=0.0), TwoParts(), world)
            feed = ({"position": step} for step in range(trainer.step, passes))
            try:
                trainer.fit(feed)
            except StopIteration:  # the feed ends where the kill would be
                trainer.checkpoints.wait()
            return trainer.step, trainer.weights()

    _, whole = train(tmp_path / "whole", 8)
    for passes in (2, 6, 8):
        step, parts = train(tmp_path / "parts", passes)
        assert step == passes
    assert all(torch.equal(parts[name], w) for name, w in whole.items())
    assert not torch.equal(whole["late.weight"], TwoParts().late.weight)
