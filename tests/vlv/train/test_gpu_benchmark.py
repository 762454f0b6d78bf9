"""benchmarks/gpu/train.py, as far as it goes without a GPU."""

import contextlib
import io
import json

import pytest
import torch

from benchmarks.gpu import train


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A whole dry run: its exit code, report and output, and the gradients of the check in their order."""
    out, found, said = tmp_path_factory.mktemp("dry") / "train.json", [], io.StringIO()
    real = train.gradients

    def kept(*args, **more):
        found.append(real(*args, **more))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train, "gradients", kept)
        code = train.main(["--dry-run", "--out", str(out)])
    return code, json.loads(out.read_text()), said.getvalue(), found


def test_dry_run_checks_gradients_and_takes_steps_of_both_loops(dry):
    code, report, said, _ = dry
    assert code == 0 and report["gradients"]["correct"]
    assert report["gradients"]["rms_of_plain"] > 1e-4  # bfloat16 was really used
    assert report["published"]["images_per_second"] > 0 and report["ours"]["images_per_second"] > 0
    assert "images/s" not in said  # a dry run shows no figure


def test_nothing_is_begun_that_would_not_end_within_the_budget(tmp_path):
    assert train.main(["--dry-run", "--budget", "0", "--out", str(tmp_path / "train.json")]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["gradients"]["correct"] and not report["runs"] and "speedup" not in report
    assert [run["loop"] for run in report["left_out"]] == ["ours", "published"]


def test_speedup_and_memory_are_of_the_same_micro_batch():
    def run(loop, micro_batch, compile, rate, gib):
        return {
            "loop": loop,
            "micro_batch": micro_batch,
            "compile": compile,
            "images_per_second": rate,
            "peak_gib": gib,
        }

    report = {"runs": [
        run("ours", 32, False, 90.0, 20.0), run("published", 32, False, 20.0, 40.0), run("ours", 32, True, 100.0, 22.0),
        run("ours", 64, False, 120.0, 40.0), {"loop": "published", "micro_batch": 64, "error": "out of memory"},
    ]}  # fmt: skip
    train.compare(report)
    assert report["speedup"] == 5.0 and report["memory"] == 0.55 and report["ours"]["compile"]


def test_wrong_gradients_are_not_timed(dry, monkeypatch, capsys):
    exact, plain, ours = dry[3]
    bent = iter([exact, plain, 1.2 * ours])
    monkeypatch.setattr(train, "gradients", lambda *args, **more: next(bent))
    monkeypatch.setattr(train, "published_rate", lambda *_: pytest.fail("it must not be timed"))
    assert train.main(["--dry-run"]) == 1 and "WRONG" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence(capsys):
    assert train.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no CUDA device" in error
