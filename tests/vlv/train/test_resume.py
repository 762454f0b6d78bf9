"""A run on one process: exact resume, its log, and refusal of a state of other settings."""

import json
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vlv.train.config import TrainConfig
from vlv.train.objectives import Objective
from vlv.train.parallel import World
from vlv.train.trainer import FREE, SkippedRows, Trainer

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


def fit(folder, steps, stop=None, width=4, bad=False, inputs=None, continue_from=None, **more):
    config = replace(CONFIG, steps=steps, save_every=max(5, steps // 4), **more)
    with World.start("cpu") as world:
        trainer = Trainer("toy", Path(folder), config, Line(width, stop, bad), world, inputs, continue_from)
        feed = ({"position": step} for step in range(trainer.step, steps))
        trainer.fit(feed)
        return [trainer.weights()[f"net.{name}"] for name in ("weight", "bias")]


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    whole = fit(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", 20, stop=13)
    parts = fit(tmp_path / "parts", 20)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_folder_is_trained_by_one_run_at_a_time(tmp_path):
    """Another process is refused by name while the first one trains, and goes on when it was killed."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.vlv.train import test_resume
from vlv.train.parallel import World
def feed():
    yield {{"position": 0}}
    print("trains", flush=True)
    time.sleep(600)
with World.start("cpu") as world:
    objective = test_resume.Line()
    test_resume.Trainer("toy", test_resume.Path({str(tmp_path)!r}), test_resume.CONFIG, objective, world).fit(feed())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process.stdout.readline()
        with pytest.raises(ValueError, match=rf"is being trained by process {process.pid} .*: stop that one, or give"):
            fit(tmp_path, 20)
    finally:
        process.kill()
        process.wait()
    assert len(fit(tmp_path, 20)) == 2


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of five steps."""
    folder = tmp_path_factory.mktemp("finished")
    fit(folder, 5, inputs={"data": "a", "ckpt": "b"})
    return folder


FLAGS = [f for f in fields(TrainConfig) if f.metadata and f.name not in FREE]


def other(field, value):
    """Another value that the flag takes."""
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    if isinstance(value, float):
        return value / 2 + 0.25
    return {"micro_batch": 4, "batch": 16}.get(field.name, not value if isinstance(value, bool) else value + 1)


@pytest.mark.parametrize("field", FLAGS, ids=lambda f: f.name)
def test_a_resume_differs_in_no_flag_that_decides_weights_data_or_noise(finished, field):
    value = getattr(replace(CONFIG, steps=5), field.name)
    changed = {field.name: other(field, value)}
    flag = "--" + field.name.replace("_", "-")
    with pytest.raises(ValueError, match=f"was written with {flag} {value}, this run has {changed[field.name]}, which"):
        fit(finished, **{"steps": 5, "inputs": {"data": "a", "ckpt": "b"}} | changed)


@pytest.mark.parametrize("name", ["data", "ckpt"])
def test_a_resume_has_the_same_inputs(finished, name):
    with pytest.raises(ValueError, match=f"was written with another --{name}, which decides"):
        fit(finished, 5, inputs={"data": "a", "ckpt": "b"} | {name: "c"})


def test_flags_that_decide_nothing_may_change(finished):
    names = {f.name for f in fields(TrainConfig) if f.metadata}
    assert names >= FREE
    free = {"compile": True, "checkpoint_activations": True, "workers": 3, "spike": 5.0, "patience": 3, "keep": 3}
    fit(finished, 5, inputs={"data": "a", "ckpt": "b"}, log_every=1, dtype="float32", **free)


def test_continue_from_starts_a_new_run_from_the_weights_of_another(finished, tmp_path):
    inputs = {"data": "a", "ckpt": "b"}
    with pytest.raises(
        ValueError, match=r"was written with --lr 0\.01, this run has 0\.5, .*choose another --run folder"
    ):
        fit(finished, 5, inputs=inputs, lr=0.5)
    with pytest.raises(ValueError, match="was written with --continue-from None, this run has"):
        fit(finished, 5, inputs=inputs, continue_from=finished / "toy.saves")
    with pytest.raises(ValueError, match="nothing has no checkpoint of a run"):
        fit(tmp_path / "new", 5, continue_from=tmp_path / "nothing")
    whole = fit(tmp_path / "whole", 20, continue_from=finished / "toy.saves", lr=0.5)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", 20, stop=13, continue_from=finished / "toy.saves", lr=0.5)
    parts = fit(tmp_path / "parts", 20, continue_from=finished / "toy.saves", lr=0.5)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, fit(tmp_path / "fresh", 20, lr=0.5), strict=True))


class OneOfTwo(Objective):
    """Two layers, of which only the named ones are trained."""

    def __init__(self, *trained):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for name in {"first", "second"} - {*trained}:
            getattr(self, name).requires_grad_(False)

    def forward(self, batch):
        return {"loss": (self.second(self.first(torch.randn(8, 4))) - 1).square().mean()}


def test_a_narrower_run_keeps_every_weight_that_was_trained(tmp_path):
    """The first layer, trained by the first run and frozen in the second, survives the second's checkpoints too."""

    def train(folder, steps, objective, continue_from=None, last=None):
        with World.start("cpu") as world:
            config = replace(CONFIG, steps=steps, save_every=1, ema=0.0)
            trainer = Trainer("toy", folder, config, objective, world, None, continue_from)
            try:
                trainer.fit({"position": step} for step in range(trainer.step, last or steps))
            except StopIteration:  # the feed ends where the kill would be
                trainer.checkpoints.wait()
            return trainer.weights()

    wide = train(tmp_path / "wide", 4, OneOfTwo("first", "second"))
    narrow = (tmp_path / "narrow", 4, OneOfTwo("second"), tmp_path / "wide" / "toy.saves")
    train(*narrow, last=2)
    resumed = train(tmp_path / "narrow", 4, OneOfTwo("second"), tmp_path / "wide" / "toy.saves")
    assert torch.equal(resumed["first.weight"], wide["first.weight"])
    assert not torch.equal(resumed["second.weight"], wide["second.weight"])
    third = train(tmp_path / "third", 1, OneOfTwo("second"), tmp_path / "narrow" / "toy.saves")
    assert torch.equal(third["first.weight"], wide["first.weight"])


def test_rows_without_an_image_are_named_once(tmp_path):
    rows = SkippedRows(tmp_path / "skipped.jsonl")
    rows.add([[("a", "broken"), ("b", "empty")], []])
    (tmp_path / "skipped.jsonl").open("ab").write(b'{"id": "c"')  # a kill in mid-line
    again = SkippedRows(tmp_path / "skipped.jsonl")
    again.add([[("b", "empty")], [("d", "no file")]])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [("a", "broken"), ("b", "empty"), ("d", "no file")]


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
