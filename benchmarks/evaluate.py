"""Every figure of vlv.evaluate that the synthetic world gives without a judge, one command after the other.

    python -m benchmarks.evaluate --ckpt assets/vlv-tiny --run runs/evaluate

Writes benchmarks/evaluate_images.json (reconstructions against the originals and against controls, over a guidance
sweep), evaluate_layout.json, evaluate_references.json, and the report RUN/report.html. The feature net is trained here
(vlv.evaluate.scene_net): Inception does not know these emoji, so its distances compare with each other only. The same
command continues a run that was stopped. docs/evaluation.md says what the figures mean.
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
    """Run a module; exit with its code if it fails."""
    text = list(map(str, words))
    print("python -m " + " ".join(text), file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", *text], stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)


def write_references(file: Path, count: int) -> None:
    """Write true captions of the held-out scenes, in the words of vlv.data.scenes."""
    rng = np.random.default_rng(5)
    with file.open("w") as lines:
        for i in range(count):
            texts = [scenes.caption(scenes.sample(scenes.HELD_OUT + i), rng) for _ in range(REFERENCES)]
            lines.write(json.dumps({"id": f"scene-{i:05}", "captions": texts}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", default="assets/vlv-tiny", help="checkpoint folder (assets/vlv-tiny)")
    parser.add_argument("--run", type=Path, default=Path("runs/evaluate"), help="folder of intermediate files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results (benchmarks)")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes (1000)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (50)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 1.0, 4.0], help="controls at the first")
    args = parser.parse_args()

    out, images_folder, net = args.out, args.run / f"scenes-{args.count}", args.run / "net"
    run = args.run / Checkpoint.open(args.ckpt).hash  # each checkpoint has its own reconstructions and captions
    run.mkdir(parents=True, exist_ok=True)
    captions, references = run / "captions.jsonl", run / "references.jsonl"
    images, layout, scores = (out / f"evaluate_{n}.json" for n in ("images", "layout", "references"))
    if not (net / "preprocessor_config.json").exists():
        step("vlv.evaluate.scene_net", net)
    step("vlv.scenes", images_folder, "--count", args.count)
    sweep = ["--steps", args.steps, "--batch", 50, "--guidance", *args.guidance, "--shuffled", "--work", run / "drawn"]
    step("vlv.evaluate", "images", images_folder, "--ckpt", args.ckpt, "--net", f"scenes={net}", *sweep, "-o", images)
    step("vlv.evaluate", "layout", "--ckpt", args.ckpt, "--count", args.count, "-o", layout)
    step("serve.vllm_caption", images_folder, "--ckpt", args.ckpt, "--engine", "transformers", "-o", captions)
    write_references(references, args.count)
    step("vlv.evaluate", "references", "--captions", f"ours={captions}", "--references", references, "-o", scores)
    known = [f for f in (out / "scenes.json", out / "bottleneck.json") if f.exists() and "kind" in f.read_text()]
    step("vlv.evaluate", "report", images, layout, scores, *known, "-o", run / "report.html")
    print(run / "report.html")


if __name__ == "__main__":
    main()
