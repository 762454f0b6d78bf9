"""What --fast-jpeg changes: python -m benchmarks.fast_jpeg PHOTOS

Pixels: photographs, written as JPEG files, and scenes enlarged without smoothing; the crop with 1/2, 1/4 and 1/8 of the
size decoded, in the worst case, where just `factor` decoded pixels remain for one of the crop, beside the exact crop.
Captions: greedy ones of the bundled checkpoint for large JPEG files of scenes, of sides at random.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vlv.data.image
from benchmarks import machine
from benchmarks.gpu.serve import scene_jpeg
from export.runtimes.torch import TorchRuntime
from export.verification.captions import Captions
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import command_line
from vlv.common.files import write_json
from vlv.data.image import decode, load_crops

ROOT = Path(__file__).resolve().parents[1]
FACTORS = (1.0, 4 / 3, 1.5, 2.0)
SCALES = (2, 4, 8)
SCENES = 256
SIDES = 512, 1024  # of the scenes that are captioned
BATCH = 64  # images encoded together


def crops(content: bytes, size: int, factor: float | None) -> np.ndarray:
    """Return the centre square uint8 [3, size, size], exact or with this value of FAST_JPEG."""
    vlv.data.image.FAST_JPEG = factor
    return load_crops(content, size, fast_jpeg=factor is not None).pixels[0]


def pixels(contents: list[bytes]) -> Iterator[dict]:
    """Yield a row per factor and scale: the difference from the exact crop, of values up to 255."""
    for factor in FACTORS:
        for scale in SCALES:
            differences = []
            for content in contents:
                size = int(min(Image.open(io.BytesIO(content)).size) / scale / factor)
                exact, fast = (crops(content, size, chosen).astype(np.float64) for chosen in (None, factor))
                differences.append(fast - exact)
            rms = [float(np.sqrt(np.square(d).mean())) for d in differences]
            row = {"factor": round(factor, 3), "decoded": f"1/{scale}", "rms": round(float(np.mean(rms)), 3)}
            largest = max(float(np.abs(d).max()) for d in differences)
            p999 = float(np.mean([np.quantile(np.abs(d), 0.999) for d in differences]))
            yield row | {"rms_of_worst": round(max(rms), 3), "p99.9": round(p999, 2), "max": largest}


def captions(checkpoint: Checkpoint) -> Iterator[dict]:
    """Yield a row per factor: the tokens of the exact crops' greedy captions that stay."""
    sides = np.random.default_rng(0).integers(*SIDES, SCENES).tolist()
    contents = [scene_jpeg(i, side, side, Image.Resampling.NEAREST) for i, side in enumerate(sides)]
    size = checkpoint.config.image_size
    reference = TorchRuntime(checkpoint, "cpu")

    def images(factor: float | None) -> torch.Tensor:
        return torch.from_numpy(np.stack([crops(content, size, factor) for content in contents]))

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([reference.encode(part) for part in images.split(BATCH)])

    exact = Captions(checkpoint, reference, images(None))
    for factor in FACTORS:
        found = exact.agreement(lambda _, factor=factor: encode(images(factor)), 1.0)
        row = {"factor": round(factor, 3), "images": found.images, "tokens": found.tokens}
        yield row | {"agreement": round(found.agreement, 4), "standard_error": round(found.error, 4)}


def jpeg(image: Image.Image) -> bytes:
    """Return the content of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("photos", metavar="PHOTOS", help="folder of photographs")
    p.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "fast_jpeg.json", metavar="JSON")
    args = p.parse_args()
    files = sorted(file for file in glob.glob(f"{args.photos}/*") if vlv.data.image.EXTENSIONS & {Path(file).suffix})
    report = {"command": command_line("benchmarks.fast_jpeg"), "machine": machine.describe()}
    report["pixels"] = {
        f"{len(files)} photographs": list(pixels([jpeg(decode(file)) for file in files])),
        "16 scenes": list(pixels([scene_jpeg(i, 1024, 1024, Image.Resampling.NEAREST) for i in range(16)])),
    }
    write_json(args.output, report)
    report["captions"] = list(captions(Checkpoint.open(ROOT / "assets" / "vlv-tiny")))
    write_json(args.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
