"""Every figure of vlv.evaluate that the synthetic world gives without a judge, one command after the other.

    python -m benchmarks.evaluate --ckpt assets/vlv-tiny --run runs/evaluate

Writes benchmarks/evaluate_images.json (reconstructions against the originals and against controls, over a guidance
sweep), evaluate_layout.json, evaluate_references.json, and the report RUN/report.html. The feature net is trained here
(vlv.evaluate.scene_net): no Inception knows these emoji, so its distances compare with each other only. Stopped at any
moment, the same command goes on. docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from vlv.checkpoints.folder import Checkpoint
from vlv.data import scenes

REFERENCES = 5  # true captions a scene, as COCO has


def step(*words: object) -> None:
    """Run a module of ours; end as it ends where it fails."""
    text = list(map(str, words))
    print("python -m " + " ".join(text), file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", *text], stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)


def write_references(file: Path, count: int) -> None:
    """True captions of the held-out scenes, as vlv.data.scenes words them."""
    rng = np.random.default_rng(5)
    with file.open("w") as lines:
        for i in range(count):
            texts = [scenes.caption(scenes.sample(scenes.HELD_OUT + i), rng) for _ in range(REFERENCES)]
            lines.write(json.dumps({"id": f"scene-{i:05}", "captions": texts}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", default="assets/vlv-tiny", help="checkpoint folder (assets/vlv-tiny)")
    parser.add_argument("--run", type=Path, default=Path("runs/evaluate"), help="folder of everything in between")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results (benchmarks)")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes (1000)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (50)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 1.0, 4.0], help="controls at the first")
    args = parser.parse_args()

    out, pictures, net = args.out, args.run / f"scenes-{args.count}", args.run / "net"
    run = args.run / Checkpoint.open(args.ckpt).hash  # another checkpoint's drawings and captions are its own
    run.mkdir(parents=True, exist_ok=True)
    captions, references = run / "captions.jsonl", run / "references.jsonl"
    images, layout, scores = (out / f"evaluate_{n}.json" for n in ("images", "layout", "references"))
    if not (net / "preprocessor_config.json").exists():
        step("vlv.evaluate.scene_net", net)
    step("vlv.scenes", pictures, "--count", args.count)
    draw = ["--steps", args.steps, "--batch", 50, "--guidance", *args.guidance, "--shuffled", "--work", run / "drawn"]
    step("vlv.evaluate", "images", pictures, "--ckpt", args.ckpt, "--net", f"scenes={net}", *draw, "-o", images)
    step("vlv.evaluate", "layout", "--ckpt", args.ckpt, "--count", args.count, "-o", layout)
    step("serve.vllm_caption", pictures, "--ckpt", args.ckpt, "--engine", "transformers", "-o", captions)
    write_references(references, args.count)
    step("vlv.evaluate", "references", "--captions", f"ours={captions}", "--references", references, "-o", scores)
    known = [f for f in (out / "scenes.json", out / "bottleneck.json") if f.exists() and "kind" in f.read_text()]
    step("vlv.evaluate", "report", images, layout, scores, *known, "-o", run / "report.html")
    print(run / "report.html")


if __name__ == "__main__":
    main()
