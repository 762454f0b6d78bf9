"""Compare captioning and serving of two checkouts of this repository, in turns, on one machine.

    python -m benchmarks.side_by_side ../before --pairs 3 --images 512 -o benchmarks/side_by_side.json

Each pair runs benchmarks/caption.py (the service without its baselines) and benchmarks/serve.py first in one checkout
and then in the other; the order changes from pair to pair, so that the machine's other load affects both alike. The
captions of the two commands, with their numbers of tokens, are compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.serve_fuzz import scene
from vlv.common.command import command_line, say
from vlv.common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CKPT = ROOT / "assets" / "vlv-tiny"


def main() -> None:
    """Run the pairs and write the rates, their medians and the ratios."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("before", type=Path, help="checkout of the build before")
    p.add_argument("--pairs", type=int, default=3, help="runs of each checkout (3)")
    p.add_argument("--images", type=int, default=512, help="held-out scenes of a run (512)")
    p.add_argument("--engine", default="vllm", help="of benchmarks.serve (vllm)")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "side_by_side.json", metavar="JSON")
    args = p.parse_args()
    checkouts = {"before": args.before.resolve(), "after": ROOT}
    rates: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        equal, count = compare_captions(checkouts, Path(folder), min(args.images, 128))
        say(f"{equal} of {count} records have equal captions, tokens and finish reasons")
        for pair in range(args.pairs):
            for name in sorted(checkouts, reverse=pair % 2 == 0):
                for figure, rate in measure(checkouts[name], args, Path(folder)).items():
                    rates.setdefault(figure, {}).setdefault(name, []).append(rate)
                    say(f"pair {pair + 1}, {name}: {figure} {rate} images/s")
            medians = {f: {n: statistics.median(v) for n, v in by.items()} for f, by in rates.items()}
            report = {
                "command": command_line("benchmarks.side_by_side"),
                **describe(),
                "pairs": pair + 1,
                "images": args.images,
                "equal_records": f"{equal}/{count}",
                "images_per_second": rates,
                "medians": medians,
                "after_to_before": {f: round(m["after"] / m["before"], 3) for f, m in medians.items()},
            }
            write_json(args.output, report)  # after each pair: a run that is stopped keeps its figures
    print(json.dumps(report["after_to_before"]))


def run(checkout: Path, *words: object) -> None:
    """Run Python in a checkout, with its packages."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *map(str, words)], cwd=checkout, env=environment, check=True, capture_output=True)


def measure(checkout: Path, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the images per second of the batch command, the server, and the pipeline beside the server."""
    output = folder / "figures.json"
    part = "service" if (checkout / "serve" / "core" / "batcher.py").exists() else "road"
    common = ("--images", args.images, "-o", output)
    run(checkout, "benchmarks/caption.py", "--parts", part, *common)
    figures = {"caption": json.loads(output.read_text())["parts"][part]["images_per_second"]}
    run(checkout, "-m", "benchmarks.serve", "--engine", args.engine, *common)
    rates = json.loads(output.read_text())["images_per_second"]
    return figures | {f"serve_{name}": rate for name, rate in rates.items()}


def compare_captions(checkouts: dict[str, Path], folder: Path, images: int) -> tuple[int, int]:
    """Return how many of `images` records are equal in caption, tokens and finish reason."""
    inputs = folder / "images"
    inputs.mkdir()
    for i in range(images):
        (inputs / f"{i:05}.png").write_bytes(scene(i))
    found = []
    for name, checkout in checkouts.items():
        output = folder / f"{name}.jsonl"
        run(checkout, "-m", "serve.vllm_caption", inputs, "--ckpt", CKPT, "--raw", "-o", output)
        records = map(json.loads, output.read_text().splitlines())
        found.append({r["id"]: (r["caption"], r["tokens"], r["finish_reason"]) for r in records})
    before, after = found
    return sum(after.get(name) == record for name, record in before.items()), images


if __name__ == "__main__":
    main()
