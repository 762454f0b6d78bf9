"""The loop at scale: processes, kills and restarts change nothing; what is not finite, or stands out, is left out."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from kernels.linear import Linear
from tests.vlv.train import small_run
from vlv.train.objectives import Objective
from vlv.train.parallel import World
from vlv.train.trainer import AnomalyDetector, Trainer

ROOT, SCRIPT = Path(__file__).parents[3], Path(small_run.__file__)
ALONE = [sys.executable, str(SCRIPT)]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
TWO_RESTARTED = [*TWO[:3], "--max-restarts", "2", "--monitor-interval", "0.1", *TWO[3:]]


def start(command, data, folder, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = words or ("ddp",)
    return subprocess.Popen([*command, str(data), str(folder), *words], env=environment, stderr=subprocess.PIPE)


def log(folder):
    file = folder / "toy.log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until_saved(folder, process):
    """Wait for the first whole save, so that a kill finds the run in the middle."""
    deadline = time.monotonic() + 100
    while not list(folder.glob("toy.saves/*/.metadata")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-2000:]
        time.sleep(0.005)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started have: sums over other numbers of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(captioned, tmp_path_factory):
    """The log and the weights of an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    weights = small_run.train(captioned, folder)
    return log(folder), weights, folder


@pytest.fixture(scope="module")
def in_two_processes(captioned, tmp_path_factory):
    """The folder of runs in two processes, each in a folder by its name."""
    folder = tmp_path_factory.mktemp("two")
    process = start(TWO, captioned, folder, "fsdp", "late", "nan-ddp", "nan-fsdp")
    told = process.communicate(timeout=400)[1].decode()
    assert process.returncode == 0, told[-2000:]
    return folder


def same_losses(found, expected, steps=small_run.CONFIG.steps):
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, steps + 1))
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["norm"] == pytest.approx(b["norm"], rel=1e-3)


def test_two_processes_with_shards_of_the_model_do_what_one_does(alone, captioned, in_two_processes):
    same_losses(log(in_two_processes / "fsdp"), alone[0])
    weights = small_run.train(captioned, in_two_processes / "fsdp")  # one process takes up the shards of two
    # over all of them: where a gradient is near zero, rounding alone turns Adam's step around
    apart = sum((weights[name] - w).double().square().sum() for name, w in alone[1].items())
    assert (apart / sum(w.double().square().sum() for w in weights.values())).sqrt() < 1e-4


def test_weights_that_join_late_do_so_in_two_processes_as_in_one(captioned, tmp_path, in_two_processes):
    weights = small_run.train(captioned, tmp_path, replace(small_run.CONFIG, encoder_from=3), small_run.Late)
    same_losses(log(in_two_processes / "late"), log(tmp_path))
    start_weights = small_run.Late().state_dict()
    assert not torch.equal(weights["encoder.bottleneck.decoder.layers.0.attention.qkv.weight"],
                           start_weights["encoder.bottleneck.decoder.layers.0.attention.qkv.weight"])  # fmt: skip


def test_norms_without_weight_decay(captioned, tmp_path):
    """Their group has none, the others the given one; the losses of the first step are the same."""
    config = replace(small_run.CONFIG, steps=1, decay_norms=False, weight_decay=0.5)
    with World.start("cpu") as world:
        trainer = Trainer("toy", tmp_path, config, small_run.Noisy(), world)
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in trainer.params if p.ndim < 2} == {0.0}
    assert {decays[id(p)] for p in trainer.params if p.ndim > 1} == {0.5} and len(decays) == len(trainer.params)


def test_torchrun_starts_a_killed_worker_again_and_the_run_ends_as_if_nothing_had_been(alone, captioned, tmp_path):
    process = start(TWO_RESTARTED, captioned, tmp_path)
    until_saved(tmp_path, process)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if str(SCRIPT) in " ".join(c.cmdline())]
    workers[-1].kill()
    assert process.wait(200) == 0, process.stderr.read().decode()[-2000:]
    assert b"resuming at step" in process.stderr.read()
    same_losses(log(tmp_path), alone[0])


def test_kill_9_and_again_gives_the_same_bits(alone, captioned, tmp_path):
    process = start(ALONE, captioned, tmp_path)
    until_saved(tmp_path, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(log(tmp_path)) < small_run.CONFIG.steps, "it was killed too late to show anything"
    weights = small_run.train(captioned, tmp_path)
    assert all(torch.equal(weights[name], w) for name, w in alone[1].items())
    keys = ("step", "loss", "norm")
    assert [[r[k] for k in keys] for r in log(tmp_path)] == [[r[k] for k in keys] for r in alone[0]]


class ToyDecoderLayer(nn.Module):
    """By its name a block of a language model, as small as one can be."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = Linear(12, 24, gelu=True), Linear(24, 12)

    def forward(self, x):
        return x + self.fc2(self.fc1(x))


class Layers(Objective):
    """Two blocks of one kind over rows whose length changes from pass to pass, as captions' does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layers = nn.Linear(3, 12), nn.Sequential(ToyDecoderLayer(), ToyDecoderLayer())

    def forward(self, batch):
        x = (batch["pixels"] / 255).flatten(2).transpose(1, 2)[:, : 100 + batch["position"] % 7]
        return {"loss": (self.layers(self.first(x)) - torch.randn(12)).square().mean()}


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses(captioned, tmp_path):
    """Recomputed activations and all: a graph for the first length and one for every other, none broken in two."""
    config = replace(small_run.CONFIG, steps=3)
    small_run.train(captioned, tmp_path / "eager", config, Layers)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small_run.train(captioned, tmp_path / "compiled", replace(config, compile=True), Layers)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    eager, compiled = log(tmp_path / "eager"), log(tmp_path / "compiled")
    # one forward pass: sums of at most 24 float32 numbers in another order, and their mean
    assert compiled[0]["loss"] == pytest.approx(eager[0]["loss"], rel=24 * 2**-24)
    same_losses(compiled, eager, steps=3)


def test_without_a_compiler_it_says_so(captioned, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile needs a compiler, and there is no no-such-compiler here"):
        small_run.train(captioned, tmp_path, replace(small_run.CONFIG, compile=True))


def test_only_the_last_saves_are_kept(alone):
    assert sorted(f.name for f in (alone[2] / "toy.saves").iterdir()) == ["00000006", "00000008"]


def test_a_save_of_other_flags_is_refused(alone, captioned, monkeypatch):
    with pytest.raises(ValueError, match="--micro-batch 2, this run has 4, which decides the weights"):
        small_run.train(captioned, alone[2], replace(small_run.CONFIG, micro_batch=4))
    monkeypatch.setattr(small_run, "MODEL", replace(small_run.MODEL, width=64))
    with pytest.raises(ValueError, match="does not fit this run"):
        small_run.train(captioned, alone[2])


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="--batch 8 is no multiple of --micro-batch 3 x 2 processes = 6"):
        replace(small_run.CONFIG, micro_batch=3).accumulation(2)


def test_a_step_that_is_not_finite_changes_nothing(captioned, tmp_path, monkeypatch, capsys):
    """The same as if the optimiser had not been called, and the run goes on."""
    real, poisoned = Trainer._forward_backward, []

    def poison(self, batch, last):
        loss = real(self, batch, last)
        if self.step == 1 and last:
            poisoned.append([p.detach().clone() for p in self.params])
            self.params[0].grad.fill_(float("nan"))
        if self.step == 2 and len(poisoned) == 1:
            poisoned.append([p.detach().clone() for p in self.params])
        return loss

    monkeypatch.setattr(Trainer, "_forward_backward", poison)
    weights = small_run.train(captioned, tmp_path, replace(small_run.CONFIG, steps=3))
    assert all(torch.equal(a, b) for a, b in zip(*poisoned, strict=True))
    assert all(w.isfinite().all() for w in weights.values())
    assert log(tmp_path)[-1]["skipped"] == 1 and "step 1, images from 8: left out" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_not_a_number_on_one_of_two_processes_is_left_out_by_both(in_two_processes, parallel):
    """Whichever it is: sums over processes keep a NaN, where Gloo's maximum drops that of the second process."""
    folder = in_two_processes / f"nan-{parallel}"
    told = "".join(file.read_text() for file in folder.glob("*.txt"))
    for step, reason in ((1, "the loss is nan"), (2, "the loss is nan"),
                         (3, "the gradient's norm is nan"), (4, "the gradient's norm is nan")):  # fmt: skip
        assert f"step {step}, images from {8 * step}: left out, {reason}" in told
    records = log(folder)
    assert [r["step"] for r in records] == list(range(1, 7)) and records[-1]["skipped"] == 4
    assert [math.isnan(r["loss"]) for r in records] == [False, True, True, False, False, False]
    assert [math.isnan(r["norm"]) for r in records] == [False, False, False, True, True, False]


def test_the_detector_sees_what_stands_out_and_gives_up_in_the_end():
    detector = AnomalyDetector(spike=5)
    for step in range(40):
        assert detector.reason_to_skip(step, 1.0, 1 + step % 3) is None
    assert "over 5 times the recent median 2" in detector.reason_to_skip(40, 1.0, 11.0)
    assert detector.reason_to_skip(41, 1.0, 9.0) is None and detector.in_a_row == 0
    again = AnomalyDetector(5, **json.loads(json.dumps(detector.state())))
    for step in range(9):
        assert again.reason_to_skip(step, float("nan"), 1.0) == "the loss is nan"
    with pytest.raises(FloatingPointError, match=r"10 steps in a row were left out, the last at step 9.* lower --lr$"):
        again.reason_to_skip(9, 1.0, float("inf"))


def test_the_schedules_begin_and_end_as_published():
    cosine = replace(small_run.CONFIG, steps=100, final_lr=1e-4)
    assert cosine.rate(0) == 1 and cosine.rate(100) == pytest.approx(1e-4)
    linear = replace(cosine, schedule="linear", final_lr=0.0, warmup=10)
    assert [linear.rate(s) for s in (0, 9, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])
