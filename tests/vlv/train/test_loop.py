"""The training loop: exact resume, logs, and refusal of a foreign state."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vlv.train.loop import Loop
from vlv.train.presets import LoopConfig


def fit(folder, steps, stop=None, width=4, **more):
    torch.manual_seed(0)
    net = nn.Linear(width, 1)
    config = LoopConfig(steps=steps, batch=8, lr=1e-2, warmup=3, save_every=max(5, steps // 4), log_every=5)
    config = replace(config, **more)
    loop = Loop("toy", folder, config, {"net": net})

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        return {"loss": (net(torch.randn(8, width)) - 1).square().mean()}

    loop.run(loss)
    return [p.detach().clone() for p in net.parameters()]


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
    with pytest.raises(ValueError, match="another model configuration"):
        fit(tmp_path, 5, width=6)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch": 4}, {"lr": 1e-3}, {"steps": 10}])
def test_a_state_of_other_settings_is_refused(tmp_path, other):
    fit(tmp_path, 5)
    fit(tmp_path, 5, log_every=1)
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=f"was trained with {name} .*, this run has {value}: remove it"):
        fit(tmp_path, **{"steps": 5} | other)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    net = nn.Linear(2, 1)
    loop = Loop("toy", tmp_path, LoopConfig(steps=3, batch=1, lr=1e-2), {"net": net})
    with pytest.raises(FloatingPointError, match="step 0"):
        loop.run(lambda step: {"loss": net(torch.full((1, 2), float("inf"))).sum()})


def test_kill_9_at_any_moment_and_again_gives_the_same_bits(tmp_path):
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); import test_loop; "
        "print('ready', flush=True); test_loop.fit(__import__('pathlib').Path(sys.argv[1]), 400)"
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
