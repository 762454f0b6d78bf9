"""The image metrics as a command: a sweep with controls, resumed; images from captions and from a folder."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchmetrics", reason="pip install --no-deps torchmetrics lightning-utilities")

from vlv.checkpoints.folder import Checkpoint
from vlv.evaluate.__main__ import main


@pytest.fixture(scope="module")
def bundled(captioning_checkpoint):
    if "reconstruct" not in Checkpoint.open(captioning_checkpoint).can:
        pytest.skip("no checkpoint with a text-to-image model")
    return captioning_checkpoint


@pytest.fixture(scope="module")
def originals(scene_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for i in range(8):
        shutil.copy(scene_images / f"{i:02}.png", folder)
    return folder


def run(tmp_path, originals, *options):
    words = ["images", originals, "-o", tmp_path / "out.json", "--work", tmp_path / "drawn", *options]
    code = main([str(w) for w in words])
    return code, json.loads((tmp_path / "out.json").read_text()) if code == 0 else None


def test_a_sweep_with_controls_and_its_resumption(tmp_path, originals, bundled, scene_net):
    options = ["--ckpt", bundled, "--net", f"scenes={scene_net}", "--guidance", "2", "1", "--steps", "4"]
    options += ["--shuffled", "--batch", "4"]
    code, found = run(tmp_path, originals, *options)
    assert code == 0 and found["kind"] == "images" and found["images"] == 8
    rows = {(r["guidance"], r["control"]): r["scenes"] for r in found["rows"]}
    assert len(rows) == 4  # controls at the first guidance only
    plain, other, mixed = (rows[2.0, c] for c in ("", "another image's embeddings", "mixed embeddings"))
    # the same set in another order: the same distances of sets, other pairs
    # 8 images leave 121 of 128 eigenvalues at rounding's 1e-16, whose roots of 1e-8 add up
    assert other["frechet"] == pytest.approx(plain["frechet"], abs=128 * 1e-7)
    assert other["cosine"] < plain["cosine"]
    assert mixed["cosine"] < plain["cosine"]
    assert set(plain) == {"frechet", "kernel", "cmmd", "cosine"}
    # a run that was stopped draws what is missing, the same, and nothing else
    file, kept = tmp_path / "drawn" / "drawn-2" / "05.png", tmp_path / "drawn" / "drawn-2" / "00.png"
    before, content = kept.stat().st_mtime_ns, np.asarray(Image.open(file))
    file.unlink()
    assert run(tmp_path, originals, *options)[1]["rows"] == found["rows"]
    assert (np.asarray(Image.open(file)) == content).all() and kept.stat().st_mtime_ns == before


def test_other_settings_are_not_mixed_in(tmp_path, originals, bundled, scene_net, capsys):
    options = ["--ckpt", bundled, "--net", f"scenes={scene_net}", "--limit", "2", "--steps"]
    assert run(tmp_path, originals, *options, "2")[0] == 0
    assert run(tmp_path, originals, *options, "3")[0] == 1
    assert "holds images of other settings" in capsys.readouterr().err


def test_from_captions(tmp_path, originals, bundled, scene_net, capsys):
    captions = {f"elsewhere/{i:02}.png": f"a large cat, picture {i}" for i in range(3)} | {"unknown.png": "a bus"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    options = ["--captions", tmp_path / "captions.json", "--t2i", bundled / "t2i", "--net", f"scenes={scene_net}"]
    code, found = run(tmp_path, originals, *options, "--steps", "2")
    assert code == 0 and found["images"] == 3
    assert found["rows"][0]["scenes"]["frechet"] > 0
    assert {f.name for f in (tmp_path / "drawn" / "drawn-2").glob("*.png")} == {"00.png", "01.png", "02.png"}
    captions["elsewhere/01.png"] = "a small bus"  # of the same name, the file says something else
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert run(tmp_path, originals, *options, "--steps", "2")[0] == 1
    assert "holds images of other settings" in capsys.readouterr().err


def test_every_image_has_its_own_noise_whatever_the_batch(tmp_path, originals, bundled, scene_net):
    """One caption for all: the images differ only in their noise."""
    (tmp_path / "captions.json").write_text(json.dumps({f"{i:02}.png": "a large cat" for i in range(3)}))
    images = {}
    for batch in ("3", "2"):
        options = ["--captions", tmp_path / "captions.json", "--t2i", bundled / "t2i", "--net", f"scenes={scene_net}"]
        assert run(tmp_path / batch, originals, *options, "--steps", "2", "--batch", batch)[0] == 0
        files = [tmp_path / batch / "drawn" / "drawn-2" / f"{i:02}.png" for i in range(3)]
        images[batch] = np.stack([np.asarray(Image.open(f)) for f in files]).astype(int)
    assert abs(images["3"] - images["2"]).max() <= 1  # sums in another order, rounded
    assert all(abs(images["3"][i] - images["3"][j]).mean() > 2 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_images_that_are_the_originals(tmp_path, originals, scene_net, capsys):
    code, found = run(tmp_path, originals, "--drawn", originals, "--net", f"scenes={scene_net}")
    row = found["rows"][0]["scenes"]
    assert code == 0 and row["cosine"] == pytest.approx(1, abs=1e-6)
    # float32 features give sets that are equal to the last bit
    assert row["frechet"] == pytest.approx(0, abs=1e-4) and row["cmmd"] == pytest.approx(0, abs=1e-6)
    assert run(tmp_path, originals, "--drawn", tmp_path, "--net", f"scenes={scene_net}")[0] == 1
    assert "every original needs its reconstruction" in capsys.readouterr().err


def test_lpips_of_the_command(tmp_path, originals):
    import torch

    from vlv.evaluate.metrics.lpips import vgg16

    torch.manual_seed(0)
    torch.save({f"features.{k}": v for k, v in vgg16().state_dict().items()}, tmp_path / "vgg.pth")
    code, found = run(tmp_path, originals, "--drawn", originals, "--lpips", tmp_path / "vgg.pth", "--limit", "2")
    assert code == 0 and found["rows"][0]["lpips"] == pytest.approx(0, abs=1e-9)


def test_mixing_needs_company(tmp_path, originals, bundled, scene_net, capsys):
    options = ["--ckpt", bundled, "--net", f"scenes={scene_net}", "--steps", "2", "--shuffled"]
    assert run(tmp_path, originals, *options, "--limit", "3", "--batch", "2")[0] == 1
    assert "the last has only one: change --batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --ckpt"),
        (["--captions", "c.json", "--net", "a=b"], "--captions needs --t2i"),
        (["--drawn", "d", "--shuffled", "--net", "a=b"], "--shuffled mixes embeddings"),
        (["--drawn", "d"], "nothing would be measured"),
        (["--drawn", "d", "--net", "a=b", "--net", "a=c"], "the same name"),
    ],
)
def test_misuse(options, message, capsys):
    assert main(["images", "x", *options]) == 2
    assert message in capsys.readouterr().err


def test_two_originals_of_one_name(tmp_path, capsys):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "cat.png")
    assert main(["images", str(tmp_path), "--drawn", str(tmp_path), "--net", "a=b"]) == 1
    assert "have the same name" in capsys.readouterr().err
