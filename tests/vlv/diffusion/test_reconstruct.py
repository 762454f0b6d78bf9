"""Images through the embeddings: every sampler, interpolation, mixing, captions, and bad input."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vlv import reconstruct
from vlv.checkpoints.folder import Checkpoint
from vlv.data import scenes
from vlv.diffusion.reconstruct_files import unique_names
from vlv.diffusion.reconstruction import CaptionReconstructor, interpolate, mix
from vlv.diffusion.samplers import SAMPLERS
from vlv.diffusion.scheduler import DiffusionError, make_scheduler
from vlv.diffusion.t2i import T2I


@pytest.fixture(scope="module")
def bundled(captioning_checkpoint):
    try:
        Checkpoint.open(captioning_checkpoint).t2i  # noqa: B018
    except ValueError as error:
        pytest.skip(str(error))
    return captioning_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for i, name in enumerate(("first", "second")):
        Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + i))).save(folder / f"{name}.png")
    return [str(folder / "first.png"), str(folder / "second.png")]


def run(pair, bundled, out, *options):
    return reconstruct.main([*pair, "--ckpt", str(bundled), "-o", str(out), "--steps", "3", *options])


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_images_and_grid(pair, bundled, tmp_path, capsys):
    assert run(pair, bundled, tmp_path / "a") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "grid.png")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["first.png", "grid.png", "second.png"]
    grid = pixels(tmp_path / "a" / "grid.png")
    side = pixels(pair[0]).shape[0]
    assert grid.shape == (2 * side, 2 * side, 3)
    assert (grid[:side, :side] == pixels(pair[0])).all()
    assert (grid[side:, side:] == pixels(tmp_path / "a" / "second.png")).all()
    # alone, and from a folder, a image stays what it is
    assert run(pair[1:], bundled, tmp_path / "b") == 0
    assert abs(pixels(tmp_path / "a" / "second.png") - pixels(tmp_path / "b" / "second.png")).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_draw_alike_whatever_the_batch(sampler, bundled):
    t2i = T2I.load(Checkpoint.open(bundled).t2i)
    context = t2i.encode_text(["a large cat at the top left, on a blue background", "a small bus"])
    both = t2i.reconstruct(context, steps=4, sampler=sampler)
    alone = t2i.reconstruct(context[1:], steps=4, sampler=sampler)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    assert both.float().std() > 5  # neither black nor constant


def test_an_unknown_sampler_is_told_the_known_ones(bundled):
    t2i = T2I.load(Checkpoint.open(bundled).t2i)
    with pytest.raises(ValueError, match="no sampler 'euler'; there are ddim"):
        t2i.reconstruct(t2i.encode_text(["a cat"]), sampler="euler")


def test_interpolation_begins_and_ends_with_the_images(pair, bundled, tmp_path):
    assert run(pair, bundled, tmp_path / "plain") == run(pair, bundled, tmp_path, "--interpolate", "3") == 0
    for end, name in (("between-0", "first"), ("between-2", "second")):
        assert abs(pixels(tmp_path / f"{end}.png") - pixels(tmp_path / "plain" / f"{name}.png")).max() <= 1
    assert pixels(tmp_path / "grid.png").shape[1] == 5 * pixels(pair[0]).shape[1]


def test_mixing_takes_tokens_from_both():
    first, second = torch.zeros(8, 2), torch.ones(8, 2)
    assert mix(first, second, 0.25)[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert interpolate(first, second, 3)[1].unique().tolist() == [0.5]


def test_mixing_draws_one_image(pair, bundled, tmp_path):
    assert run(pair, bundled, tmp_path, "--mix", "1") == run(pair, bundled, tmp_path / "plain") == 0
    assert abs(pixels(tmp_path / "mix.png") - pixels(tmp_path / "plain" / "first.png")).max() <= 1


def test_from_captions(bundled, tmp_path):
    records = [{"id": f"{n}/cat.jpg", "caption": "a large cat"} for n in "ab"]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    t2i = str(bundled / "t2i")
    arguments = ["--captions", str(tmp_path / "captions.jsonl"), "--t2i", t2i, "-o", str(tmp_path / "out")]
    assert reconstruct.main([*arguments, "--steps", "2"]) == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["cat-2.png", "cat.png", "grid.png"]
    assert (pixels(tmp_path / "out" / "cat.png") == pixels(tmp_path / "out" / "cat-2.png")).all()


def test_every_image_has_a_name_of_its_own():
    assert unique_names(["a", "a-2", "a", "grid", "a"]) == ["a", "a-2", "a-3", "grid-2", "a-4"]


def test_only_what_would_be_overwritten_is_refused(pair, bundled, tmp_path, capsys):
    for source, name in zip(pair, ("first", "grid"), strict=True):
        shutil.copy(source, tmp_path / f"{name}.png")
    before = (tmp_path / "grid.png").read_bytes()
    assert run([str(tmp_path / "grid.png")], bundled, tmp_path) == 2
    assert "would overwrite the images" in capsys.readouterr().err
    assert (tmp_path / "grid.png").read_bytes() == before
    (tmp_path / "grid.png").rename(tmp_path / "second.png")
    assert run([str(tmp_path / f"{name}.png") for name in ("first", "second")], bundled, tmp_path, "--mix", "1") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either images or --captions"),
        (["a.png"], "--ckpt is needed"),
        (["a.png", "--ckpt", "x", "--mix", "0.5"], "two image files, not 1"),
        (["a.png", "b.png", "--ckpt", "x", "--mix", "1.5"], "--mix 1.5"),
        (["a.png", "b.png", "--ckpt", "x", "--interpolate", "1"], "--interpolate 1"),
        (["a.png", "--ckpt", "x", "--steps", "0"], "--steps 0"),
    ],
)
def test_misuse(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_failures_are_one_sentence(pair, bundled, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    for images, options, code, message in (
        ([str(broken)], [], 1, "broken.jpg: not recognised"),
        ([str(tmp_path / "none.png")], [], 2, "there is no such file"),
        ([pair[0]], ["-o", pair[0].rsplit("/", 1)[0]], 2, "would overwrite the images"),
        ([pair[0]], ["--ckpt", str(tmp_path)], 1, "error: "),
    ):
        assert run(images, bundled, tmp_path / "out", *options) == code
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and message in error


def test_help_is_quick():
    start = time.perf_counter()
    text = subprocess.run([sys.executable, "-m", "vlv.reconstruct", "--help"], capture_output=True, text=True).stdout
    assert "--interpolate" in text and time.perf_counter() - start < 2


# the scheduler of SD 2.1-base, as published
SD21 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading",
}  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 50, 333, 500, 1000])
def test_time_steps_stay_within_the_schedule(sampler, steps):
    schedule = make_scheduler(sampler, SD21, steps)
    schedule.set_timesteps(steps)
    assert schedule.timesteps.min() >= 0 and schedule.timesteps.max() <= 999
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for step in schedule.timesteps:  # dpm++ and unipc take one step more to the end
        x = schedule.step(x / 2, step, x).prev_sample
    assert torch.isfinite(x).all()
    if steps == 1000:
        assert schedule.timesteps.max() == 999 and len(schedule.timesteps.unique()) == 1000


@pytest.mark.parametrize("steps", [501, 750, 999, 1001])
def test_numbers_of_steps_that_no_schedule_takes(steps, pair, bundled, tmp_path, capsys):
    assert run(pair[:1], bundled, tmp_path / "out", "--steps", str(steps)) == 1
    assert f"{steps} steps: this model's schedule of 1000 time steps takes 1 to 500, or 1000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_instead_of_black(value, bundled):
    t2i = T2I.load(Checkpoint.open(bundled).t2i)
    context = t2i.encode_text(["a large cat"])
    with pytest.raises(DiffusionError, match="latents are not finite"):
        t2i.reconstruct(context * value, steps=2)
    t2i.vae.decoder.conv_out.weight.fill_(value)
    with pytest.raises(DiffusionError, match="images are not finite"):
        t2i.reconstruct(context, steps=2)


def test_captions_whose_images_are_not_finite(bundled):
    reconstructor = CaptionReconstructor(Checkpoint.open(bundled).t2i, "cpu")
    reconstructor._pipeline.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(DiffusionError, match="images are not finite"):
        reconstructor.reconstruct(["a large cat"], 2, 2.0, 0, "ddim")
