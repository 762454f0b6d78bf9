"""Measure the edge bundle in an environment of its own: size, start, memory, captions a minute; and on aarch64.

    python -m benchmarks.edge_bundle -o benchmarks/edge_bundle.json
    python -m benchmarks.edge_bundle -o benchmarks/edge_bundle.json --aarch64 'qemu-aarch64 -L ROOT ROOT/bin/python3'

For each pair of --variants a bundle is exported. A fresh environment gets what its requirements.txt names and nothing
else, and its caption.py runs there: on one image again and again, for the time from the command to the caption, and on
many, for the rate. A photo of 12 megapixels shows what decoding and the crop take. --aarch64 is the command of a Python
that runs aarch64's wheels (PYTHONPATH is set to them); then the test vectors run there too. Parts that are measured
already stay in the file; each is written when it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import machine
from vlv.common.command import Parser, command_line, positive, say
from vlv.common.files import write_json
from vlv.data.scenes import write_scenes

ROOT = Path(__file__).resolve().parents[1]
FIRST_SCENE = 7_000_000  # held-out scenes that nothing else uses
# without PYTHONPATH, whose packages pip would take for those of the new environment
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    p = Parser(prog="python -m benchmarks.edge_bundle", description=__doc__)
    p.add_argument("--ckpt", default="assets/vlv-tiny", metavar="DIR")
    p.add_argument("--variants", nargs="+", default=["fp32:f16", "int8:q8_0"], metavar="PRECISION:TYPE")
    p.add_argument("--images", type=positive, default=512, metavar="N", help="scenes for the rate (512)")
    p.add_argument("--repeats", type=positive, default=7, metavar="N", help="commands with one image (7)")
    p.add_argument("--aarch64", metavar="COMMAND", help="a Python for aarch64, natively or in an emulator")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the measurements; return the exit code."""
    args = parser().parse_args(argv)
    found = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    found = {"command": command_line("benchmarks.edge_bundle"), **machine.describe(), "parts": found["parts"]}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_scenes(work / "scenes", FIRST_SCENE, args.images)
        scenes = sorted((work / "scenes").glob("*.png"))
        noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        photo = work / "photo.jpg"
        Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC).save(photo, quality=90)
        python = None
        for variant in args.variants:
            bundle = export(args.ckpt, variant, work)
            if python is None:
                python, found["parts"]["environment"] = environment(bundle, work)
                write_json(args.output, found)
            found["parts"][variant] = measure(python, bundle, scenes, photo, args.repeats)
            write_json(args.output, found)
            if args.aarch64:
                found["parts"][f"{variant} on aarch64"] = on_aarch64(
                    shlex.split(args.aarch64), bundle, work, scenes[:2]
                )
                write_json(args.output, found)
    return 0


def export(ckpt: str, variant: str, work: Path) -> Path:
    """Export a bundle; return its folder."""
    precision, llm_type = variant.split(":")
    out = work / variant.replace(":", "-")
    words = ["--ckpt", ckpt, "--out", str(out), "--precision", precision, "--llm-type", llm_type, "--no-captions"]
    subprocess.run([sys.executable, "-m", "export.edge", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def size(folder: Path) -> float:
    """Return the megabytes of a folder's files."""
    return round(sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1)


def environment(bundle: Path, work: Path) -> tuple[Path, dict]:
    """Make an environment of the bundle's requirements alone; return its Python, and its size by package."""
    env = work / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-compile"]
    subprocess.run([sys.executable, *install, "-r", bundle / "requirements.txt"], check=True, env=ALONE)
    (site,) = env.glob("lib/python*/site-packages")
    packages = {folder.name: size(folder) for folder in sorted(site.iterdir()) if folder.is_dir()}
    say(f"environment: {size(env)} MB")
    return python, {
        "megabytes": size(env),
        "requirements": (bundle / "requirements.txt").read_text().split(),
        "by_package": {name: megabytes for name, megabytes in packages.items() if megabytes >= 1},
    }


def run(command: list[str], env: dict[str, str]) -> tuple[list[float], list[str], int]:
    """Run a command; return the seconds until each line of its output, the lines, and its peak memory in bytes."""
    start, times, lines = time.monotonic(), [], []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        times.append(time.monotonic() - start)
        lines.append(line)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors
    return times, lines, usage.ru_maxrss * 1024


def measure(python: Path, bundle: Path, scenes: list[Path], photo: Path, repeats: int) -> dict:
    """Measure a bundle in its environment: the test vectors, single images, many images, a photo."""
    env = {"PATH": os.environ["PATH"]}
    program = [str(python), str(bundle / "caption.py")]
    check = subprocess.run([*program, "--check"], capture_output=True, text=True, env=env)
    assert check.returncode == 0, check.stderr
    firsts, peaks = [], []
    for scene in scenes[:repeats]:
        times, _, peak = run([*program, str(scene)], env)
        firsts.append(times[0])
        peaks.append(peak)
    times, lines, peak = run([*program, *map(str, scenes)], env)
    photo_times, _, photo_peak = run([*program, str(photo), str(photo), str(photo)], env)
    figures = {
        "bundle_megabytes": size(bundle),
        "encoder_megabytes": round((bundle / "encoder.onnx").stat().st_size / 1e6, 2),
        "llm_megabytes": round((bundle / "llm.gguf").stat().st_size / 1e6, 2),
        "vectors": check.stderr.splitlines(),
        "first_caption_seconds": {
            "first": round(firsts[0], 3),
            "median": round(statistics.median(firsts), 3),
            "max": round(max(firsts), 3),
        },
        "peak_megabytes": round(max(peaks) / 1e6, 1),
        "images": len(scenes),
        "captions_per_minute": round(60 * (len(scenes) - 1) / (times[-1] - times[0])),
        "peak_megabytes_of_many": round(peak / 1e6, 1),
        "photo_of_12_megapixels": {
            "seconds_each": round((photo_times[-1] - photo_times[0]) / (len(photo_times) - 1), 3),
            "peak_megabytes": round(photo_peak / 1e6, 1),
        },
    }
    assert len(lines) == len(scenes)
    say(f"{bundle.name}: {json.dumps(figures)}")
    return figures


def on_aarch64(python: list[str], bundle: Path, work: Path, scenes: list[Path]) -> dict:
    """Fetch the wheels of the bundle's requirements for aarch64, and run its program with them."""
    site = work / "aarch64"
    if not site.exists():
        install = ["-m", "pip", "install", "-q", "--target", str(site), "--no-deps", "--only-binary=:all:"]
        install += [f"--platform={name}" for name in PLATFORMS]
        version = subprocess.run(
            [*python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], stdout=-1, text=True
        )
        install += ["--implementation", "cp", "--python-version", version.stdout.strip()]
        subprocess.run([sys.executable, *install, "-r", bundle / "requirements.txt"], check=True, env=ALONE)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site)}
    command = [*python, str(bundle / "caption.py"), "--threads", "1", "--check", *map(str, scenes)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    tags = {}
    for wheel in site.glob("*.dist-info/WHEEL"):
        lines = [line.split(": ")[1] for line in wheel.read_text().splitlines() if line.startswith("Tag: ")]
        tags[wheel.parent.name.removesuffix(".dist-info")] = lines
    machine_name = subprocess.run([*python, "-c", "import platform; print(platform.machine())"], stdout=-1, text=True)
    figures = {
        "machine": machine_name.stdout.strip(),
        "wheels": tags,
        "exit_code": done.returncode,
        "vectors": [line for line in done.stderr.splitlines() if "crop off" in line],
        "captions": [json.loads(line)["caption"] for line in done.stdout.splitlines()],
        "seconds_in_all": round(time.monotonic() - start, 1),
    }
    say(f"aarch64: {json.dumps(figures)}")
    return figures


if __name__ == "__main__":
    sys.exit(main())
