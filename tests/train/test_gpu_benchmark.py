"""benchmarks/gpu/train.py, as far as it goes without a GPU."""

import json

import pytest
import torch

from benchmarks.gpu import train


def test_dry_run_checks_gradients_and_takes_steps_of_both_loops(tmp_path, capsys):
    assert train.main(["--dry-run", "--out", str(tmp_path / "train.json")]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["gradients"]["correct"] and report["gradients"]["rms_of_plain"] > 1e-4  # bfloat16 was really used
    assert report["published"]["images_per_second"] > 0 and report["ours"]["images_per_second"] > 0
    assert "images/s" not in capsys.readouterr().out  # a dry run shows no figure


def test_wrong_gradients_are_not_timed(tmp_path, monkeypatch, capsys):
    real = train.gradients

    def bent(objective, *rest, **more):
        return real(objective, *rest, **more) * (1 if "Published" in repr(objective) else 1.2)

    monkeypatch.setattr(train, "gradients", bent)
    monkeypatch.setattr(train, "published_rate", lambda *_: pytest.fail("it must not be timed"))
    assert train.main(["--dry-run"]) == 1 and "WRONG" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence(capsys):
    assert train.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no CUDA device" in error
