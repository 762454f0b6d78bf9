"""The command, as users meet it: results, one sentence an error, exit codes, and every way to be stopped."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from serve.vllm_caption import main
from tests.vlv.data.pixel_cases import PROFILES

ROOT = Path(__file__).parents[2]
TOKENS = 24


@pytest.fixture
def caption(captioning_checkpoint, tmp_path, capsys):
    """Run the command in this process: (exit code, records, errors, stderr)."""

    def run(*args, output: Path = tmp_path / "out" / "captions.jsonl", ckpt=captioning_checkpoint):
        flags = ["--engine", "transformers", "--max-tokens", TOKENS, "--prompt-batch", 8, "--workers", 1]
        try:
            code = main([str(a) for a in [*args, "--ckpt", ckpt, "-o", output, *flags]])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, lines(output), lines(output.with_name(output.stem + ".errors.jsonl")), capsys.readouterr().err

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def last(stderr: str) -> str:
    return stderr.strip().splitlines()[-1]


def start(*args, **options) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "serve.vllm_caption", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **options)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_every_kind_of_bad_image(caption, bomb, tmp_path):
    """The good ones have captions, the bad ones one line each that says why, and the exit code tells."""
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "plain.jpg": encode(scene, "JPEG"),
        "sixteen.png": encode(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        "cmyk.jpg": encode(scene.convert("CMYK"), "JPEG"),
        "palette.png": encode(scene.convert("P"), "PNG"),
        "alpha.png": encode(scene.convert("RGBA"), "PNG"),
        "animated.gif": encode(scene, "GIF", save_all=True, append_images=[scene.rotate(90)]),
        "rotated.jpg": encode(scene, "JPEG", exif=exif),
        "one.png": encode(Image.new("RGB", (1, 1)), "PNG"),
    }
    bad = {
        "truncated.jpg": (good["plain.jpg"][: len(good["plain.jpg"]) // 2], "damaged"),
        "zero.jpg": (b"", "empty"),
        "text.jpg": (b"not a picture at all", "format"),
        "bomb.png": (bomb(30000, 30000), "too-large"),
    }
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in [*good.items(), *((n, c) for n, (c, _) in bad.items())]:
        (folder / name).write_bytes(content)
    code, records, errors, stderr = caption(folder)
    assert code == 1
    assert {Path(r["id"]).name for r in records} == set(good)
    assert {Path(e["id"]).name: e["kind"] for e in errors} == {name: kind for name, (_, kind) in bad.items()}
    assert last(stderr) == f"4 of 12 images failed: see {tmp_path}/out/captions.errors.jsonl"
    for record in records:
        assert set(record) == {
            "id",
            "path",
            "caption",
            "tokens",
            "finish_reason",
            "timings",
            "model",
            "flags",
            "bytes",
            "mtime_ns",
        }
        assert 0 <= record["tokens"] <= TOKENS and record["finish_reason"] in ("stop", "length")


def test_raw_captions_and_the_clean_up(caption, scene_images, tmp_path):
    from vlv.model.clean_up import clean_caption

    code, records, errors, stderr = caption(scene_images, "--limit", 8)
    assert (code, len(records), errors) == (0, 8, [])
    assert "8 images captioned in 0:" in last(stderr)
    code, raw, *_ = caption(scene_images, "--limit", 8, "--raw", output=tmp_path / "raw.jsonl")
    assert {r["id"]: r["caption"] for r in records} == {r["id"]: clean_caption(r["caption"]) for r in raw}


def test_stop_strings_and_several_captions(caption, scene_images, tmp_path):
    code, records, *_ = caption(scene_images, "--limit", 8, "--raw", "--stop", " is", "--stop", "never said")
    _, plain, *_ = caption(scene_images, "--limit", 8, "--raw", output=tmp_path / "plain.jsonl")
    assert code == 0
    assert {r["id"]: r["caption"] for r in records} == {r["id"]: r["caption"].split(" is")[0] for r in plain}
    drawn = ["--limit", 4, "-n", 3, "--temperature", 1]
    code, records, *_ = caption(scene_images, *drawn, output=tmp_path / "drawn.jsonl")
    assert code == 0 and all(1 <= len(set(r["captions"])) == len(r["captions"]) <= 3 for r in records)
    assert max(len(r["captions"]) for r in records) > 1


def test_resuming_after_all_is_done(caption, scene_images):
    caption(scene_images, "--limit", 3)
    code, records, _, stderr = caption(scene_images, "--limit", 3)
    assert (code, len(records)) == (0, 3) and "3 done before" in last(stderr)
    code, records, *_ = caption(scene_images, "--limit", 2, "--no-resume")
    assert (code, len(records)) == (0, 2)


def test_other_flags_do_not_go_on_in_the_same_file(caption, scene_images):
    """Of --raw, -n and --max-tokens the file would hold a mixture without a word."""
    caption(scene_images, "--limit", 2)
    code, records, _, stderr = caption(scene_images, "--limit", 3, "--raw")
    assert code == 1 and len(records) == 2
    assert "holds captions made with --max-tokens 24, and this run is with --max-tokens 24 --raw: choose" in last(
        stderr
    )
    code, records, *_ = caption(scene_images, "--limit", 3, "--raw", "--no-resume")
    assert code == 0 and {r["flags"] for r in records} == {"--max-tokens 24 --raw"}
    code, *_, stderr = caption(scene_images, "--limit", 3, "--raw", "--crop", "pad")
    assert code == 1 and "and this run is with --max-tokens 24 --crop pad --raw: choose" in last(stderr)
    code, records, *_ = caption(scene_images, "--limit", 3, "--crop", "pad", "--no-resume")
    assert code == 0 and {(r["flags"], r["crop"]) for r in records} == {("--max-tokens 24 --crop pad", "pad")}


def test_text_files_alone(captioning_checkpoint, scene_images, tmp_path, capsys, monkeypatch):
    """No other file is made; what has a text file is skipped, one that is deleted is written again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, place in enumerate(("in/0.png", "in/1.png", "in/deep/2.png")):
        shutil.copy(scene_images / f"{i:02}.png", place)
    flags = ["--ckpt", captioning_checkpoint, "--engine", "transformers", "--max-tokens", TOKENS, "--workers", 1]
    flags += ["--format", "txt"]

    def run(*args) -> tuple[int, str]:
        code = main([str(a) for a in ["in", *flags, *args]])
        return code, capsys.readouterr().err

    def files() -> set[str]:
        return {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".png"}

    Path("in/1.txt").write_text("mine")
    code, _ = run("--template", "sks, {caption}", "--max-sentences", 1)
    assert code == 0 and files() == {"in/0.txt", "in/1.txt", "in/deep/2.txt"} and Path("in/1.txt").read_text() == "mine"
    text = Path("in/0.txt").read_text()
    assert text.startswith("sks, ") and text.count(".") == 1
    code, stderr = run()
    assert code == 0 and "3 done before" in stderr and Path("in/0.txt").read_text() == text
    Path("in/0.txt").unlink()
    assert run("--overwrite")[0] == 0
    assert Path("in/1.txt").read_text() != "mine" and not Path("in/0.txt").read_text().startswith("sks")
    code, _ = run("--caption-extension", "caption", "--output-dir", "out")
    assert code == 0 and files() >= {"out/0.caption", "out/1.caption", "out/deep/2.caption"}
    shutil.copy("in/0.png", "in/0.webp")
    Path("in/0.txt").unlink()
    code, stderr = run()
    assert code == 1 and "whose name differs in its ending only" in stderr and "2 done before" in stderr
    assert '"id": "in/0.webp"' in stderr  # the first by name has the text file
    code, stderr = run()
    assert code == 1 and '"id": "in/0.webp"' in stderr and "3 done before" in stderr  # and so in every run
    code, stderr = run("--output-dir", "out", "-o", "c.jsonl")
    assert code == 2 and "go with --format txt and without -o" in stderr
    code, stderr = run("--template", "no place")
    assert code == 2 and stderr.startswith("error: --template 'no place': expected a text with {caption}")


def test_a_gallery_and_the_patch_of_its_edits(caption, scene_images, tmp_path):
    """The same command with the patch corrects records, writes text files again, and captions nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        shutil.copy(scene_images / f"{i:02}.png", folder)
    flags = [folder, "--format", "txt"]
    code, records, *_ = caption(*flags, "--gallery", tmp_path / "g.html")
    assert code == 0 and all(json.dumps(record["caption"]) in (tmp_path / "g.html").read_text() for record in records)
    edit = {"id": records[0]["id"], "before": records[0]["caption"], "caption": "Mine."}
    (tmp_path / "p.jsonl").write_text(json.dumps(edit) + "\n" + json.dumps({**edit, "id": "gone"}) + "\n")
    code, after, _, stderr = caption(*flags, "--patch", tmp_path / "p.jsonl")
    assert code == 0 and "1 captions corrected; 1 of the patch were not as the page showed them" in stderr
    assert [record["caption"] for record in after] == ["Mine.", *(record["caption"] for record in records[1:])]
    assert Path(records[0]["path"]).with_suffix(".txt").read_text() == "Mine.\n"
    code, *_, stderr = caption(folder, "--format", "parquet", "--patch", "p", output=tmp_path / "c.parquet")
    assert code == 2 and "which --patch edits: give -o a file" in stderr


def test_truncated_images_are_captioned_where_that_is_asked_for(caption, tmp_path):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    content = encode(pixels, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    code, records, errors, _ = caption(tmp_path / "cut.jpg")
    assert (code, records, [error["kind"] for error in errors]) == (1, [], ["damaged"])
    code, records, *_ = caption(tmp_path / "cut.jpg", "--lenient", output=tmp_path / "lenient.jsonl")
    assert code == 0 and len(records) == 1 and "--lenient" in records[0]["flags"]


def test_a_dry_run_loads_nothing(scene_images, tmp_path, capsys):
    (tmp_path / "a.psd").write_bytes(b"")
    for i in range(3):
        shutil.copy(scene_images / f"{i:02}.png", tmp_path)
    (tmp_path / "01.txt").write_text("there")
    assert main([str(tmp_path), "--format", "txt", "--dry-run"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.split() == [f"{tmp_path}/00.png", f"{tmp_path}/02.png"]
    assert "2 images to caption, 1 have a text file" in stderr and "left out: 1 .psd" in stderr
    assert main([str(tmp_path), f"{tmp_path}/../{tmp_path.name}/*.png", "--dry-run"]) == 0
    assert len(capsys.readouterr().out.split()) == 3  # each once, however it is spelled
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_is_left_out_is_said_and_strict_fails(caption, scene_images, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(scene_images / "00.png", folder)
    (folder / "drawing.psd").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    code, records, _, stderr = caption(folder)
    assert code == 0 and len(records) == 1
    assert last(stderr) == "left out: 1 .psd; 1 other files (.md)"
    assert caption(folder, "--strict")[0] == 1
    (folder / "drawing.psd").unlink()
    assert caption(folder, "--strict")[0] == 0


def test_tar_shards_lists_and_globs(caption, scene_images, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(scene_images / "03.png", "sample/3.png")
        tar.add(scene_images / "04.png", "sample/4.png")
    (tmp_path / "list.txt").write_text(f"{scene_images}/01.png\n{scene_images}/absent.png\n")
    code, records, errors, _ = caption(tmp_path / "shard.tar", tmp_path / "list.txt", f"{scene_images}/0[0-2].png")
    assert code == 1 and [e["kind"] for e in errors] == ["missing"]
    names = [f"{tmp_path}/shard.tar/sample/{i}.png" for i in (3, 4)] + [f"{scene_images}/0{i}.png" for i in range(3)]
    assert sorted(r["id"] for r in records) == sorted(names)
    assert {r["path"] for r in records if "shard" in r["id"]} == {f"{tmp_path}/shard.tar"}


def test_formats_and_parts_of_the_input(caption, scene_images, tmp_path):
    """Three workers share the input; each writes a file of its own, in the format asked for."""
    names = []
    for part in (1, 2, 3):
        code, *_ = caption(
            scene_images, "--limit", 3, "--shard", f"{part}/3", "--format", "coco", output=tmp_path / "c.json"
        )
        content = json.loads((tmp_path / f"c-{part}-of-3.json").read_text())
        assert code == 0 and len(content["annotations"]) == len(content["images"]) == 3
        names += [image["file_name"] for image in content["images"]]
    assert len(set(names)) == 9
    flags = ["--limit", 2, "--format", "webdataset", "--trace", tmp_path / "trace.json"]
    code, *_, stderr = caption(scene_images, *flags, output=tmp_path / "shards")
    assert code == 0 and "2 images captioned" in stderr and "busy: decoding" in stderr
    assert json.loads((tmp_path / "trace.json").read_text())
    with tarfile.open(tmp_path / "shards" / "000000.tar") as shard:
        assert len(shard.getnames()) == 6
        texts = [shard.extractfile(n).read().decode() for n in shard.getnames() if n.endswith(".json")]
    assert all(json.loads(text)["caption"] for text in texts)


def test_arguments_that_cannot_be_meant(caption, scene_images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for args, words in {
        (tmp_path / "absent",): f"error: no such file or folder: {tmp_path}/absent",
        (tmp_path / "empty",): f"error: no images in {tmp_path}/empty: looked for",
        (): "error: PATH and --ckpt are needed",
        (scene_images, "--limit", "0"): "error: argument --limit: expected a positive integer, got '0'",
        (
            scene_images,
            "--temperature",
            "-1",
        ): ("error: argument --temperature: expected a number from 0 to 10, got '-1'"),
        (
            scene_images,
            "--shard",
            "0/3",
        ): ("error: argument --shard: expected a part such as 3/16 (from 1/16 to 16/16), got '0/3'"),
        (scene_images, "-n", "3"): "error: -n 3 draws captions: give --temperature above 0",
        (scene_images, "--stop", ""): "error: --stop needs a text",
        (scene_images, "--workers", "1025"): "error: argument --workers: expected at most 1024 processes, got '1025'",
        (scene_images, "--lora", "x"): "error: --lora does not go with --engine transformers",
        (scene_images, "--engine", "magic"): "error: argument --engine: invalid choice: 'magic'",
    }.items():
        code, *_, stderr = caption(*args)
        assert code == 2 and stderr.startswith(words) and stderr.count("\n") == 1, stderr
    code, *_, stderr = caption(scene_images, ckpt=tmp_path / "absent")
    assert code == 2 and stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"error: --ckpt: no checkpoint at {tmp_path}/absent")
    code = main([str(scene_images), "--ckpt", "x", "-o", "-", "--gallery", "g.html"])
    assert code == 2 and "--gallery reads the captions back" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reports_and_text_files_replace_no_other_file(caption, scene_images, tmp_path, capsys):
    """A report that names the output, an image or the patch, and text files that are called as the images."""
    image, patch = tmp_path / "a.png", tmp_path / "p.jsonl"
    shutil.copy(scene_images / "00.png", image)
    shutil.copy(image, patch)
    before, output = image.read_bytes(), tmp_path / "out" / "captions.jsonl"
    for args, words in (
        (("--trace", output), f"error: -o and --trace are one file, {output}: choose"),
        (("--gallery", f"{output.parent}/./captions.jsonl"), "error: -o and --gallery are one file"),
        (("--gallery", tmp_path / "x", "--trace", tmp_path / "x"), "error: --gallery and --trace are one file"),
        (("--patch", patch, "--trace", patch), "error: --patch and --trace are one file"),
        (("--gallery", image), f"error: --gallery {image} is there already, and no such report: choose"),
        (("--trace", image), f"error: --trace {image} is there already, and no such report: choose"),
    ):
        code, *_, stderr = caption(image, *args)
        assert code == 2 and stderr.startswith(words) and stderr.count("\n") == 1, stderr
    for extension in ("png", ".JPG", "", ".", "../x"):
        texts = ["--ckpt", "x", "--format", "txt", "--overwrite", "--caption-extension", extension]
        assert main([str(image), *texts]) == 2
        assert capsys.readouterr().err.startswith(
            f"error: --caption-extension {extension!r}: expected the ending of a "
        )
    assert image.read_bytes() == patch.read_bytes() == before and not output.exists()


def test_too_many_tokens(random_checkpoint, scene_images, tmp_path, capsys):
    args = [scene_images, "--ckpt", random_checkpoint, "-o", tmp_path / "c.jsonl", "--max-tokens", "993"]
    assert main([str(a) for a in args]) == 2
    assert capsys.readouterr().err.startswith("error: --max-tokens: 993 tokens a caption: this model takes 1 to 992 ")


def test_checkpoints_that_do_not_fit(caption, random_checkpoint, scene_images, tmp_path):
    copies = itertools.count()

    def damage(file: str, change) -> tuple[int, str]:
        # each its own: a failed run's engine may still be loading, and what is truncated under it ends the process
        copy = tmp_path / str(next(copies))
        shutil.copytree(random_checkpoint, copy)
        change(copy / file)
        code, *_, stderr = caption(scene_images, ckpt=copy)
        assert "Traceback" not in stderr
        return code, last(stderr).replace(str(copy), "COPY")

    def other_width(file: Path) -> None:
        description = json.loads(file.read_text())
        description["model"]["llm_width"] = 256
        file.write_text(json.dumps(description))

    def other_layers(file: Path) -> None:
        description = json.loads(file.read_text())
        description["model"]["width"] = 64
        file.write_text(json.dumps(description))

    def not_a_number(file: Path) -> None:
        weights = load_file(file)
        weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
        file.unlink()
        save_file(weights, file, metadata={"format": "pt"})

    code, error = damage("vlv.json", other_width)
    assert code == 1 and "has a hidden size of 128" in error and "width 256" in error
    code, error = damage("vlv.json", other_layers)
    assert code == 1 and "encoder.safetensors does not fit vlv.json" in error
    code, error = damage("encoder.safetensors", lambda file: os.truncate(file, 1000))
    assert code == 1 and "encoder.safetensors is damaged" in error
    code, error = damage("llm/model.safetensors", lambda file: os.truncate(file, 1000))
    assert code == 1 and error.startswith("error: transformers cannot load COPY/llm")
    code, error = damage("llm/model.safetensors", not_a_number)
    assert code == 1 and "the language model computes NaN: its weights are damaged" in error
    code, error = damage("llm/config.json", os.unlink)
    assert code == 1 and "has no llm/" in error


def test_output_that_cannot_be_written(caption, scene_images, tmp_path):
    (tmp_path / "file").touch()
    code, *_, stderr = caption(scene_images, output=tmp_path / "file" / "c.jsonl")
    assert code == 1 and stderr.startswith(f"error: cannot write {tmp_path}/file/c.jsonl: ") and stderr.count("\n") == 1
    code, *_, stderr = caption(scene_images, output=Path("/dev/full"))
    assert code == 1 and last(stderr).startswith("error: cannot write /dev/full: the disk is full: make room and run")


def test_stdout_carries_data_only(captioning_checkpoint, scene_images):
    run = start(scene_images, "--ckpt", captioning_checkpoint, "-o", "-", "--engine", "transformers", "--limit", 4)
    stdout, stderr = run.communicate(timeout=200)
    assert run.returncode == 0, stderr
    assert len([json.loads(line) for line in stdout.splitlines()]) == 4
    assert b"4 images captioned" in stderr and b"Traceback" not in stderr


@pytest.fixture
def slowly(captioning_checkpoint, scene_images, tmp_path):
    """Arguments of a run that takes its time: few captions at once."""
    flags = ["--engine", "transformers", "--in-flight", 2, "--prompt-batch", 2, "--max-tokens", TOKENS]
    return [scene_images, "--ckpt", captioning_checkpoint, "-o", tmp_path / "c.jsonl", *flags]


def wait_for_lines(file: Path, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(slowly, tmp_path, number):
    run = start(*slowly)
    wait_for_lines(tmp_path / "c.jsonl", 6, run)
    os.killpg(run.pid, number)  # as a terminal or a scheduler does: to us and all our processes
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    *_, message = stderr.decode().splitlines()
    assert message.startswith(f"stopped by {number.name}: what is captioned so far is kept")
    assert b"Traceback" not in stderr
    assert 6 <= len(lines(tmp_path / "c.jsonl")) < 64


def test_killed_and_taken_up_again(slowly, tmp_path, capsys):
    """kill -9 in mid-run, twice, then to the end: nothing lost, nothing doubled."""
    output = tmp_path / "c.jsonl"
    for so_far in (6, 20):
        run = start(*slowly)
        wait_for_lines(output, so_far, run)
        run.kill()
        run.communicate()
    before = lines(output)
    with open(output, "ab") as file:
        file.write(b'{"id": "half a rec')  # what a crash of the whole machine may leave
    assert main([str(a) for a in slowly]) == 0
    records = lines(output)
    assert records[: len(before)] == before
    assert len(records) == len({r["id"] for r in records}) == 64
    assert f"{len(before)} done before" in last(capsys.readouterr().err)


def test_disk_full_in_mid_run(slowly, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    run = start(*slowly)
    wait_for_lines(output, 4, run)
    full = output.stat().st_size + 1000
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (full, full))  # from here on, a few records more fit
    _, stderr = run.communicate(timeout=200)
    assert run.returncode == 1
    assert last(stderr.decode()).startswith(f"error: cannot write {output}: the file may not grow further")
    before = lines(output)
    assert len(before) >= 4 and output.stat().st_size <= full and output.read_bytes().endswith(b"\n")
    assert main([str(a) for a in slowly]) == 0
    records = lines(output)
    assert records[: len(before)] == before and len({r["id"] for r in records}) == len(records) == 64
    capsys.readouterr()


def test_two_runs_on_one_output(slowly, tmp_path):
    run = start(*slowly)
    wait_for_lines(tmp_path / "c.jsonl", 1, run)
    run.send_signal(signal.SIGSTOP)  # it would come to its end while the second one starts on a busy machine
    second = start(*slowly)
    _, stderr = second.communicate(timeout=100)
    assert second.returncode == 1 and b"error: another run is writing" in stderr and stderr.count(b"\n") == 1
    run.kill()
    run.communicate()


def test_help_is_quick():
    started = time.monotonic()
    run = start("--help")
    stdout, _ = run.communicate()
    assert run.returncode == 0 and b"exit codes" in stdout
    assert time.monotonic() - started < 2


def test_profiles_are_converted_unless_they_are_to_be_ignored(caption, scene_images, tmp_path):
    """A scene with red and green swapped, and a profile that swaps them back, is the scene; ignored, it is not."""
    plain, tagged, raw = (tmp_path / name for name in ("plain", "tagged", "raw"))
    for folder in (plain, tagged, raw):
        folder.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        image = Image.open(scene_images / name)
        swapped = Image.fromarray(np.asarray(image)[..., [1, 0, 2]].copy())
        image.save(plain / name)
        swapped.save(raw / name)
        swapped.save(tagged / name, icc_profile=PROFILES["swapped"])
    texts = {}
    for folder, flags in ((plain, []), (tagged, []), (raw, []), (tagged, ["--ignore-icc"])):
        output = tmp_path / f"{folder.name}{len(flags)}.jsonl"
        code, records, _, _ = caption(folder, *flags, output=output)
        assert code == 0
        texts[folder.name, len(flags)] = [record["caption"] for record in sorted(records, key=lambda r: r["id"])]
    assert texts["tagged", 1] == texts["raw", 0] != texts["plain", 0]
    grounds = [
        [text.split(" background")[0].split()[-1] for text in texts[key]] for key in (("plain", 0), ("tagged", 0))
    ]
    assert grounds[0] == grounds[1]
    assert all("--ignore-icc" in record["flags"] for record in lines(tmp_path / "tagged1.jsonl"))
    code, _, _, said = caption(tagged, output=tmp_path / "tagged1.jsonl")
    assert code != 0 and "--ignore-icc" in said
