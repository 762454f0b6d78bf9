"""Serving at full size on a GPU, in one call: python -m benchmarks.gpu.serve --preset qwen2.5-3b

Makes a checkpoint of the published size with random weights, holds the batch pipeline and the server (through vLLM)
against each other as benchmarks.serve does, and both against the published procedure: transformers, batches of 2,
4 beams, float32. Captions have 220 tokens, the published mean. Writes benchmarks/gpu/serve.json; exit code 1 where a
target is missed, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import uvloop

from benchmarks import machine, serve
from benchmarks.serve_fuzz import scene
from vlv.checkpoints import random_weights

TOKENS = 220
TARGETS = {"pipeline_images_per_second": 60, "server_to_pipeline": 0.9, "over_published": 100}  # on one H200


def main() -> int:
    """Make, measure, compare, write."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", choices=sorted(random_weights.LLMS), default="qwen2.5-3b")
    p.add_argument("--images", type=int, default=1024, help="for pipeline and server (1024)")
    p.add_argument("--published", type=int, default=8, metavar="N", help="images for the published procedure (8)")
    p.add_argument("-o", "--output", default="benchmarks/gpu/serve.json", metavar="JSON")
    args = p.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here: this runs serving at full size on a GPU", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write(args.preset, Path(folder), force=True)
        before = published(Path(folder), args.published)
        options = argparse.Namespace(ckpt=folder, engine="vllm", images=args.images, max_tokens=TOKENS)
        figures = uvloop.run(serve.measure(options))
    pace = figures["images_per_second"]["pipeline"]
    figures |= {"pipeline_images_per_second": pace, "published_images_per_second": before}
    figures["over_published"] = pace / before
    missed = [name for name, least in TARGETS.items() if figures[name] < least]
    about = {"gpu": torch.cuda.get_device_name(), "preset": args.preset, "targets": TARGETS, "missed": missed}
    report = {**machine.describe(), **about, **figures}
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return bool(missed)


def published(folder: Path, images: int) -> float:
    """Images a second by the published procedure; the first batch is the warm-up."""
    import numpy as np

    from vlv.checkpoints.folder import Checkpoint
    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    captioner = Captioner.load(Checkpoint.open(folder)).to("cuda")
    size, start = captioner.encoder.config.image_size, 0.0
    for first in range(0, images + 2, 2):
        if first == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        crops = torch.from_numpy(np.stack([load_crop(scene(i), size) for i in (first, first + 1)])).cuda()
        captioner.generate(crops, max_new_tokens=TOKENS, num_beams=4)
    torch.cuda.synchronize()
    rate = images / (time.perf_counter() - start)
    del captioner
    torch.cuda.empty_cache()
    return rate


if __name__ == "__main__":
    sys.exit(main())
