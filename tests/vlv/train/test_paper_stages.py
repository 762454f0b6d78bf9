"""Both stages by the paper's presets on real files: what learns, the ablations, what is written and refused."""

import contextlib
import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from vlv.checkpoints.folder import Checkpoint
from vlv.model.captioner import Captioner
from vlv.train import stage1, stage2, trainer
from vlv.train.config import STAGE1, STAGE2, TrainConfig
from vlv.train.cost import account, estimate, planned
from vlv.train.initialize import build_stage1, build_stage2

SMALL = "--batch 4 --micro-batch 2 --workers 0 --no-bf16 --device cpu --lr 1e-3 --log-every 1".split()


def command(main, *args):
    """Run a command; an error is raised as it is."""
    assert main([*map(str, args), "--debug"]) == 0


@pytest.fixture(scope="module", autouse=True)
def one_timed_pass():
    """One timed pass before a run instead of four: what it gives is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TIMED_PASSES", 1)
        yield


@pytest.fixture(scope="module")
def trained(run, captioned, tmp_path_factory):
    """The folder of stage 1 with 8 queries and without CLIP's layers, then of stage 2 from it; stderr in said.txt."""
    folder = tmp_path_factory.mktemp("scale")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for main, name, more in (
            (stage1.main, "stage1", ["--ckpt", run / "stage1", "--queries", "8", "--no-clip-layers", "--steps", "2",
                                     "--cache-latents", folder / "latents"]),
            (stage2.main, "stage2", ["--ckpt", folder / "stage1", "--llm", run / "stage2" / "llm", "--steps", "1",
                                     "--gpu-hour", "2", "--parallel", "fsdp"]),
        ):  # fmt: skip
            args = ["--preset", f"paper-{name}", "--data", captioned, "--run", folder, *more, *SMALL]
            command(main, *args)
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def changed(before, after):
    """The names of the parts whose weights differ."""
    return {n for n, w in after.items() if n in before and w.shape == before[n].shape and not torch.equal(w, before[n])}


def test_stage_1_trains_what_the_authors_train(trained, run):
    start, end = Checkpoint.open(run / "stage1"), Checkpoint.open(trained / "stage1")
    assert (end.config.queries, end.config.context_layers, end.config.llm_width) == (8, 0, 0)
    moved = changed(start.load_encoder().state_dict(), end.load_encoder().state_dict())
    assert {n.split(".")[0] for n in moved} == {"bottleneck"}  # the tower and the image projection stay
    assert {n.split(".")[1] for n in moved} == {"prompt", "encoder", "decoder", "projection"}
    assert "reconstruct" in end.can and (trained / "stage1.log.jsonl").read_text().count("\n") == 2


def test_stage_2_trains_the_language_model_and_the_encoder_but_not_the_queries(trained, run):
    start, end = Checkpoint.open(trained / "stage1"), Checkpoint.open(trained / "stage2")
    moved = changed(start.load_encoder().state_dict(), end.load_encoder().state_dict())
    assert {n.split(".")[1] for n in moved} == {"prompt", "encoder", "decoder"}
    captioner = Captioner.load(end)
    assert len(captioner.generate(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), max_new_tokens=4)) == 1


def test_a_narrower_run_is_a_new_run_that_keeps_what_was_trained(trained, run, captioned, tmp_path):
    """Stage 1's BART encoder, trained by the first run, is in the result of a run that trains the decoder alone."""
    flags = ["--preset", "paper-stage1", "--ckpt", run / "stage1", "--queries", "8", "--no-clip-layers"]
    flags += ["--data", captioned, "--cache-latents", trained / "latents", "--steps", "2", *SMALL]
    flags += ["--encoder-part", "decoder"]
    with pytest.raises(ValueError, match="was written with --encoder-part language-model, this run has decoder"):
        command(stage1.main, *flags, "--run", trained)
    command(stage1.main, *flags, "--run", tmp_path, "--continue-from", trained / "stage1.saves")
    before, after = (Checkpoint.open(f / "stage1").load_encoder().state_dict() for f in (trained, tmp_path))
    assert {n.split(".")[1] for n in changed(before, after)} == {"queries", "decoder", "projection"}
    command(stage1.main, *flags, "--run", tmp_path, "--continue-from", trained / "stage1.saves")  # it is finished


def test_other_data_or_another_start_is_refused_on_resume(trained, run, captioned, tmp_path):
    flags = ["--preset", "paper-stage2", "--run", trained, "--llm", run / "stage2" / "llm", "--steps", "1",
             "--parallel", "fsdp", *SMALL]  # fmt: skip
    fewer = shutil.copytree(captioned, tmp_path / "fewer")
    (fewer / "00.png").unlink()
    for data, start, llm, flag in (
        (fewer, trained / "stage1", run / "stage2" / "llm", "data"),
        (captioned, run / "stage2", run / "stage2" / "llm", "ckpt"),
    ):
        with pytest.raises(ValueError, match=f"was written with another --{flag}"):
            command(stage2.main, *flags, "--data", data, "--ckpt", start, "--llm", llm)


def test_bad_images_are_named_in_the_run(run, captioned, tmp_path, monkeypatch):
    """One that the pass over the data finds, and one that only decoding finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(captioned, tmp_path / "images")
    (folder / "03.png").write_bytes(b"broken")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:-1000])
    flags = ["--preset", "paper-stage1", "--ckpt", run / "stage1", "--data", folder, "--min-side", "10"]
    command(stage1.main, *flags, "--steps", "3", "--run", tmp_path / "run", *SMALL)  # 12 images: an epoch of 11 rows
    lines = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    found = {line["id"][-6:]: line["reason"] for line in lines}
    assert sorted(found) == ["03.png", "04.png"]
    assert "not recognised" in found["03.png"] and "damaged or truncated" in found["04.png"]


def test_files_are_for_other_users_and_say_their_dtype(trained, run):
    umask = os.umask(0o022)
    os.umask(umask)
    for folder in (run / "stage1", run / "stage2", run / "t2i", trained / "stage1", trained / "stage2"):
        modes = {file: file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
        assert not {file: oct(mode) for file, mode in modes.items() if mode != 0o666 & ~umask}
    for folder, dtype in ((run, torch.float16), (trained, torch.float32)):
        assert load_file(folder / "stage2" / "llm" / "model.safetensors")["model.norm.weight"].dtype == dtype
        config = json.loads((folder / "stage2" / "llm" / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.") and "torch_dtype" not in config


@pytest.mark.parametrize("bf16", [True, False])
def test_noise_is_added_in_float32(run, bf16):
    """diffusers adds none at the first time steps in bfloat16, whose alphas round to 1: no path of ours is touched."""
    from vlv.train import initialize

    config = TrainConfig(bf16=bf16, checkpoint_activations=False)
    stage = initialize.build_stage1(config, Checkpoint.open(run / "stage1"), run / "t2i", torch.device("cpu"))
    scheduler, seen = stage.t2i.scheduler, []
    add_noise = scheduler.add_noise

    def record(latents, noise, steps):
        noisy = add_noise(latents, noise, steps)
        first = torch.zeros_like(steps)
        alpha = scheduler.alphas_cumprod[0].double()
        exact = alpha.sqrt() * latents.double() + (1 - alpha).sqrt() * noise.double()
        seen.append((latents.dtype, (add_noise(latents, noise, first) - exact).abs().max().item(), noisy.dtype))
        return noisy

    scheduler.add_noise = record
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    for batch in ({"pixels": pixels}, {"pixels": pixels, "latents": torch.randn(2, 12, 8, 8)}):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert stage.objective(batch)["loss"].isfinite()
    assert len(seen) == 2
    assert all(dtype == noisy == torch.float32 and error < 1e-5 for dtype, error, noisy in seen)


def test_the_cost_is_told_before_and_after(trained):
    said = (trained / "said.txt").read_text()
    assert "stage1: 8 images to go at " in said and "(--gpu-hour USD gives the cost)" in said
    before, after = (line for line in said.splitlines() if line.startswith("stage2: ") and "at $2 a GPU-hour" in line)
    assert "4 images to go" in before and "measured just now on 1 process" in before
    assert after.startswith("stage2: 4 images in 0.0") and said.index(before) < said.index("1/1 loss") < said.index(
        after
    )


def test_latents_are_the_same_from_the_cache_and_after_damage(trained, run, captioned):
    from vlv.data.latents import LatentCache
    from vlv.data.sources import open_sources

    source = open_sources([str(captioned)])
    (made,) = (trained / "latents").iterdir()
    assert (made / "000000.f16").stat().st_size == 12 * 2 * 12 * 8 * 8 * 2  # rows, mean and deviation, c, s, s, bytes
    cache = LatentCache(trained / "latents2", run / "t2i" / "vae", source, 64)
    fresh, places = torch.randn(2, 2, 12, 8, 8), [(0, 3), (0, 7)]
    kept = cache.moments(places, lambda: fresh)
    assert torch.equal(kept, fresh.half().float())
    assert torch.equal(cache.moments(places, lambda: pytest.fail("they are there")), kept)
    with next(cache.folder.glob("*.f16")).open("r+b") as stream:
        stream.seek(3 * 2 * 12 * 8 * 8 * 2)
        stream.write(b"\x7f" * 8)
    assert torch.equal(cache.moments(places, lambda: fresh + 1)[0], (fresh + 1)[0].half().float())


def test_sources_whose_ids_agree_share_no_latents(run, tmp_path):
    from vlv.data.latents import LatentCache
    from vlv.data.sources import Sample

    class Numbered:
        rows = (0, 2)  # an empty shard first

        def __init__(self, image):
            self.image = image

        def read(self, shard, row):
            return Sample(str(range(self.rows[shard])[row]), self.image)

    caches = [LatentCache(tmp_path, run / "t2i" / "vae", Numbered(image), 64).folder for image in (b"a", b"b", b"a")]
    assert caches[0] == caches[2] != caches[1]


@pytest.mark.parametrize(
    ("part", "count"), [("all", 5), ("language-model", 3), ("decoder", 1), ("none", 0)]
)  # parts of Florence-2 that learn
def test_unfreezing_modes(run, part, count):
    from vlv.train.initialize import unfreeze_encoder

    encoder = Checkpoint.open(run / "stage1").load_encoder()
    unfreeze_encoder(encoder, part)
    b = encoder.bottleneck
    parts = [[b.prompt], *(list(m.parameters()) for m in (encoder.vision, encoder.image, b.encoder, b.decoder))]
    learning = [[p.requires_grad for p in group] for group in parts]
    assert all(all(group) or not any(group) for group in learning) and sum(map(all, learning)) == count
    assert not b.queries.requires_grad and not any(p.requires_grad for p in b.text.parameters())


def test_progressive_unfreezing(run):
    from dataclasses import replace

    from vlv.train.initialize import unfreeze_stage2

    captioner = Captioner.load(Checkpoint.open(run / "stage2"))
    for unfreeze, expected in {"mlp": (1, 0, 0), "llm": (1, 1, 0), "encoder": (1, 1, 1)}.items():
        unfreeze_stage2(captioner, replace(STAGE2["paper-stage2"], unfreeze=unfreeze))
        parts = (captioner.encoder.to_llm, captioner.llm, captioner.encoder.bottleneck.decoder)
        assert tuple(int(all(p.requires_grad for p in m.parameters())) for m in parts) == expected


def test_more_queries_keep_the_trained_ones(run):
    from vlv.train.initialize import build_encoder, model_config

    start = Checkpoint.open(run / "stage1")
    model = model_config(start.config, TrainConfig(queries=40), 0)
    grown, old = build_encoder(start, model), start.load_encoder()
    assert torch.equal(grown.bottleneck.queries[:32], old.bottleneck.queries) and len(grown.bottleneck.queries) == 40
    with pytest.raises(ValueError, match="--image-size 640 gives a map of 40 x 40"):
        model_config(start.config, TrainConfig(image_size=640), 0)


def test_the_plan_counts_every_weight(run, capsys):
    plan = ["--preset", "paper-stage1", "--ckpt", run / "stage1", "--t2i", run / "t2i", "--plan", "2", *SMALL]
    command(stage1.main, *plan)
    text = capsys.readouterr().out
    encoder = Checkpoint.open(run / "stage1").load_encoder().bottleneck
    learning = [encoder.queries, encoder.prompt]
    learning += [p for m in (encoder.encoder, encoder.decoder, encoder.projection) for p in m.parameters()]
    assert f"{sum(p.numel() for p in learning):,} parameters learn" in text and "2 GPUs x 1 passes x 2" in text
    with pytest.raises(ValueError, match="no multiple of --micro-batch 2 x 3 processes"):
        command(stage1.main, *plan[: -len(SMALL) - 1], "3", *SMALL)


def test_the_plan_takes_published_weights(tmp_path, capsys, monkeypatch):
    from tests.vlv.official import Recording

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = Recording.slim(tmp_path / "published").source
    plan = ["--preset", "paper-stage2", "--ckpt", published, "--plan", *SMALL]
    command(stage2.main, *plan, "--unfreeze", "mlp")
    (folder,) = (tmp_path / "cache" / "vlv" / "published").iterdir()
    learning = Checkpoint.open(folder).load_encoder().to_llm.parameters()
    assert f"{sum(p.numel() for p in learning):,} parameters learn" in capsys.readouterr().out


def test_more_images_and_kept_activations_need_more_memory(run):
    from dataclasses import replace

    from vlv.train import initialize
    from vlv.train.memory_plan import measure

    start, config = Checkpoint.open(run / "stage1"), TrainConfig(micro_batch=2, batch=2, bf16=False)

    def build(config):
        return initialize.build_stage1(config, start, run / "t2i", weights=False)

    base = measure(build, config)
    double = measure(build, replace(config, micro_batch=4))
    kept = measure(build, replace(config, checkpoint_activations=False))
    assert base["weights"] == double["weights"] == base["gradients"] == base["moments"] // 2
    assert 1.5 < double["activations"] / base["activations"] < 2.5 and kept["activations"] > 1.5 * base["activations"]


def test_the_published_figures():
    """The paper's section 4.1 and the authors' scripts, as vlv.train.config names them."""
    one, two = STAGE1["paper-stage1"], STAGE2["paper-stage2"]
    assert (one.steps, one.batch, one.lr, one.schedule, one.warmup) == (200_000, 512, 5e-5, "cosine", 0)
    assert (one.beta2, one.weight_decay, one.clip, one.encoder_part) == (0.99, 0.01, 1, "language-model")
    assert (two.steps, two.batch, two.lr, two.schedule, two.warmup) == (100_000, 64, 1e-5, "linear", 0)
    assert (two.beta2, two.weight_decay, two.max_tokens, two.unfreeze) == (0.999, 0.01, 300, "encoder")
    assert one.rate(200_000) == pytest.approx(1e-4) and two.rate(100_000) == 0


def test_the_planned_cost_takes_the_rate_that_a_gpu_gave(tmp_path):
    text = planned(102_400_000, 8, 2.0, tmp_path / "none.json")
    assert "at 37.0 a second and GPU (the paper's, on RTX 6000 Ada): 96.1 h, 768.77 GPU-hours, $1,537.54" in text
    (tmp_path / "train.json").write_text('{"speedup": 5, "ours": {"images_per_second": 370}, "device": "NVIDIA H200"}')
    assert "at 370.0 a second and GPU (measured on NVIDIA H200)" in planned(1000, 8, None, tmp_path / "train.json")


def test_cost_before_and_after():
    text, dollars = estimate(102_400_000, 800, 8, 2.0)
    assert dollars == pytest.approx(102_400_000 / 800 / 3600 * 8 * 2) and "$568.89 at $2 a GPU-hour" in text
    assert "35.56 h" in text and "284.44 GPU-hours" in text
    assert account(1000, 100, 800, None).startswith("1,000 images in 0.03 h, 10.0 a second: 0.22 GPU-hours (--gpu-hour")


def test_what_is_refused(run, captioned, tmp_path, capsys):
    at_scale = ["--preset", "paper-stage1", "--run", tmp_path, "--device", "cpu"]
    ready = [*at_scale, "--data", captioned, "--ckpt", run / "stage1", *SMALL]
    for args, words in {
        (*at_scale,): "needs --data and --ckpt",
        (*ready, "--log", "paper"): "--log paper: one of none, wandb",
        (*ready, "--steps", "0"): "--steps 0: at least 1",
        (*ready, "--max-tokens", "0"): "--max-tokens 0: at least 1",
        (*ready, "--clip", "0"): "--clip 0.0: above 0",
        (*ready, "--max-cost", "1"): "--max-cost needs --gpu-hour",
        (*ready, "--micro-batch", "3"): "--batch 4 is no multiple of --micro-batch 3 x 1 processes",
        (*ready, "--gpu-hour", "1e9", "--max-cost", "1"): "over --max-cost 1: not started",
        (*ready, "--encoder-part", "none", "--t2i", tmp_path / "no"): "no diffusers text-to-image folder",
    }.items():
        with pytest.raises((ValueError, OSError), match=words):
            command(stage1.main, *args)
    capsys.readouterr()
    for args, code in {
        (*at_scale,): 2,
        (*ready, "--steps", "0"): 2,
        (*ready, "--encoder-part", "none", "--t2i", tmp_path / "no"): 2,
        (*ready, "--data", tmp_path / "no.tar"): 1,
    }.items():
        assert stage1.main([*map(str, args)]) == code and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="belong to stage 1"):
        command(stage2.main, *[str(a).replace("stage1", "stage2") for a in ready[:2]], *ready[2:], "--queries", "4")
    assert stage2.main(["--preset", "paper-stage2", "--stage1", str(run / "stage1"), *map(str, ready[2:])]) == 2
    assert "--stage1 belongs to the toy presets" in capsys.readouterr().err
    for flag, value in {"--data": captioned, "--gpu-hour": 0, "--max-cost": 1, "--log": "wandb", "--llm": "x"}.items():
        assert stage2.main(["--preset", "tiny", flag, str(value)]) == 2
        assert f"{flag} belongs to the paper's presets" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        command(stage1.main, *at_scale, "--plan", "-1")
    assert ended.value.code == 2 and "expected a positive integer, got '-1'" in capsys.readouterr().err


def test_a_log_whose_package_is_not_there_is_named(monkeypatch):
    from vlv.train import logging as logs

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="--log trackio needs a package that is not installed: pip install trackio"):
        logs.check("trackio")


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vlv.train.logging import open_log

    for first in (0, 2):  # the second run goes on from step 2
        log = open_log("tensorboard", tmp_path, "stage1", {"lr": 1}, first)
        for step in range(first + 1, first + 4):
            log(step, {"loss": step})
    found = EventAccumulator(str(tmp_path / "tensorboard" / "stage1")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(i, i) for i in range(1, 6)]


def test_figures_go_to_the_tool_and_lines_after_the_save_are_written_again(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from vlv.train.logging import open_log

    sent = []
    tool = SimpleNamespace(init=lambda **kw: sent.append(kw), log=lambda figures, step: sent.append((step, figures)))
    monkeypatch.setitem(sys.modules, "wandb", tool)
    for first in (0, 2):
        with (tmp_path / "stage1.log.jsonl").open("a") as stream:
            stream.write('{"step": ' if first else "")  # a kill in mid-line
        log = open_log("wandb", tmp_path, "stage1", {"lr": 1}, first)
        for step in range(first + 1, first + 4):
            log(step, {"loss": step})
    lines = (tmp_path / "stage1.log.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step": {i}' for i in (1, 2, 3, 4, 5)]
    assert sent[0]["resume"] == "allow" and sent[0]["id"] == sent[4]["id"] and sent[-1] == (5, {"loss": 5})


def test_what_the_published_layout_needs_travels_with_every_result(run, tmp_path):
    """A run from converted weights, and a run from that run, can be written back to the published layout."""
    start = tmp_path / "start"
    shutil.copytree(run / "stage1", start)
    (start / "published.safetensors").write_bytes(b"kept")
    first = build_stage1(STAGE1["smoke"], Checkpoint.open(start), run / "t2i")
    first.write(first.objective.state_dict(), tmp_path / "first")
    second = build_stage2(STAGE2["smoke"], Checkpoint.open(tmp_path / "first"), None)
    second.write(second.objective.state_dict(), tmp_path / "second")
    assert (tmp_path / "second" / "published.safetensors").read_bytes() == b"kept"
    assert Checkpoint.open(tmp_path / "second").can == ["caption", "reconstruct", "to-published"]
