"""Compare the batch command's images per second with those of the build before, in turns on one machine.

    python -m benchmarks.reruns_speed ../before                      # into benchmarks/reruns_speed.json
    python -m benchmarks.reruns_speed ../before --images 500 --pairs 1 -o /tmp/try.json

Generated scenes of 64 px are captioned by the command as users give it (`with_models`), and once more with hashes in
the place of encoder and language model (`without_models`, benchmarks/reruns_engine.py), where listing, decoding,
records and files are all that takes time. The order of the two builds changes from pair to pair. Each figure is the
median of its runs; a ratio is that of the medians. CPU seconds are those of all processes of a run, start-up included.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe
from vlv.common.command import command_line, say
from vlv.common.files import write_json
from vlv.data import scenes

ROOT = Path(__file__).resolve().parents[1]
RATE = re.compile(r"then ([0-9.]+) images/s")


def run(checkout: Path, engine: str, images: Path, output: Path) -> dict[str, float]:
    """Caption the images once; return the rate after the first caption, and the seconds of everything."""
    hashes = engine == "pixels"
    script = ["-P", str(ROOT / "benchmarks" / "reruns_engine.py")] if hashes else ["-m", "serve.vllm_caption"]
    command = [sys.executable, *script, str(images), "-o", str(output), "--ckpt", str(checkout / "assets/vlv-tiny")]
    command += ["--engine", "transformers" if hashes else engine]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    count = output.read_bytes().count(b"\n") if output.exists() else 0
    found = RATE.search(done.stderr)
    if done.returncode or not found or count != len(list(images.glob("*.png"))):
        raise SystemExit(f"{checkout}: {count} records, exit code {done.returncode}: {done.stderr[-2000:]}")
    output.unlink()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"images_per_second": float(found[1]), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def compare(checkouts: dict[str, Path], engine: str, images: int, pairs: int, work: Path) -> dict:
    """Run both checkouts in turns; return all figures, their medians, and their ratios, after to before."""
    folder = work / engine
    scenes.write_scenes(folder, scenes.HELD_OUT, images)
    runs: dict[str, list[dict]] = {name: [] for name in checkouts}
    for pair in range(pairs):
        for name in sorted(checkouts, reverse=pair % 2 == 0):
            runs[name].append(run(checkouts[name], engine, folder, work / f"{name}.jsonl"))
            say(f"{engine}, pair {pair + 1}, {name}: {runs[name][-1]}")
    keys = runs["after"][0]
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in keys} for name, found in runs.items()
    }
    ratios = {key: round(medians["after"][key] / medians["before"][key], 3) for key in keys}
    return {"images": images, "engine": engine, "runs": runs, "medians": medians, "after_to_before": ratios}


def main() -> None:
    """Measure and write, after each part."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("before", type=Path, help="checkout of the build before")
    p.add_argument("--images", type=int, default=4000, help="scenes of a run with the models (4000; 0: none)")
    p.add_argument("--hashed", type=int, default=20_000, help="scenes of a run without them (20000; 0: none)")
    p.add_argument("--pairs", type=int, default=5, help="runs of each checkout (5)")
    p.add_argument("--engine", default="vllm", help="of the runs with the models (vllm)")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "reruns_speed.json", metavar="JSON")
    args = p.parse_args()
    checkouts = {"before": args.before.resolve(), "after": ROOT}
    report = {"command": command_line("benchmarks.reruns_speed"), **describe()}
    with tempfile.TemporaryDirectory(prefix="reruns-speed-") as work:
        for part, engine, images in (
            ("without_models", "pixels", args.hashed),
            ("with_models", args.engine, args.images),
        ):
            if not images:
                continue
            report[part] = compare(checkouts, engine, images, args.pairs, Path(work))
            write_json(args.output, report)
            print(part, report[part]["after_to_before"])


if __name__ == "__main__":
    main()
