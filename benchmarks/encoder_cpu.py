"""Our encoder against the published one on a CPU: same random weights, same run, correctness first.

    python -m benchmarks.encoder_cpu                      # full size: float32 and bfloat16, about 10 GB of memory
    python -m benchmarks.encoder_cpu --preset tiny --out /tmp/smoke.json

The published encoder is transformers' Florence-2, BART and CLIP, run eagerly (attention "eager", as the
published code sets it, and "sdpa", transformers' default). It gets the normalised pixels ready made,
ours prepares them itself. The ceiling is a large matrix product in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.published_encoder import PublishedEncoder
from kernels.upsample_normalize import upsample_normalize
from vlv.checkpoints import random_weights
from vlv.common.command import command_line
from vlv.model.config import PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_images(config: VLVConfig, batch: int) -> Tensor:
    size = config.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def prepared(encoder: VLVEncoder, pixels: Tensor) -> Tensor:
    """The published encoder's input [B, 3, T, T]."""
    x = upsample_normalize(pixels, encoder.resize.float(), encoder.mean.float(), encoder.std.float())
    return x.permute(0, 3, 1, 2).contiguous().to(encoder.dtype)


def flops(config: VLVConfig, batch: int) -> int:
    """Operations (two for a multiply-add) of our encoder, counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = VLVEncoder(config).eval()
        encoder(torch.empty(batch, 3, config.image_size, config.image_size, dtype=torch.uint8))
    return counter.get_total_flops()


def ceiling(dtype: torch.dtype, size: int = 4096) -> float:
    """Operations a second of the best of five large matrix products."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(5))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def error(result: Tensor, exact: Tensor) -> dict[str, float]:
    difference = result.float() - exact
    return {
        "max": (difference.abs().max() / exact.abs().max()).item(),
        "rms": (difference.square().mean().sqrt() / exact.square().mean().sqrt()).item(),
    }


def correctness(ours: VLVEncoder, theirs: PublishedEncoder, pixels: Tensor) -> dict:
    """Both against float32 of the same weights; refuses to time what is wrong."""
    if ours.dtype == torch.float32:
        found = {"ours_to_theirs": error(ours(pixels), theirs(prepared(ours, pixels)))}
        if not found["ours_to_theirs"]["max"] < 1e-5:
            raise SystemExit(f"the encoders disagree: {found}")
        return found
    exact = VLVEncoder(ours.config).eval()
    exact.load_state_dict(ours.state_dict())
    expected = exact(pixels)
    del exact
    found = {
        "ours_to_float32": error(ours(pixels), expected),
        "theirs_to_float32": error(theirs(prepared(ours, pixels)), expected),
    }
    if not found["ours_to_float32"]["rms"] < 2 * found["theirs_to_float32"]["rms"]:
        raise SystemExit(f"ours is less exact than the published one: {found}")
    return found


def peak_memory(which: str, preset: str, dtype: str, batch: int) -> int:
    """Peak resident bytes of one forward pass, in a process that holds only that encoder."""
    command = [sys.executable, "-m", "benchmarks.encoder_cpu", "--memory-of", which]
    command += ["--preset", preset, "--dtypes", dtype, "--batch", str(batch)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak_memory(which: str, config: VLVConfig, dtype: torch.dtype, batch: int) -> None:
    ours, pixels = random_weights.encoder(config, dtype), random_images(config, batch)
    call = lambda: ours(pixels)  # noqa: E731
    if which != "ours":
        theirs, x = PublishedEncoder(ours, which), prepared(ours, pixels)
        call = lambda: theirs(x)  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building it
    call()
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def compare(preset: str, dtype: str, batch: int, repeats: int) -> dict:
    config = PRESETS[preset]
    ours, pixels = random_weights.encoder(config, DTYPES[dtype]), random_images(config, batch)
    x = prepared(ours, pixels)
    eager, sdpa = PublishedEncoder(ours, "eager"), PublishedEncoder(ours, "sdpa")
    agreement = correctness(ours, eager, pixels)  # warms both up
    calls = {"ours": lambda: ours(pixels), "eager": lambda: eager(x), "sdpa": lambda: sdpa(x)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    best = ceiling(DTYPES[dtype])
    for _ in range(repeats):  # in turns, so that whatever else the machine does meets all alike
        for name, call in calls.items():
            times[name].append(seconds(call))
    best = max(best, ceiling(DTYPES[dtype]))
    median = {name: statistics.median(values) for name, values in times.items()}
    work = flops(config, batch)
    return {
        "preset": preset, "dtype": dtype, "batch": batch, "threads": torch.get_num_threads(), "error": agreement,
        "seconds": {name: {"median": median[name], "all": values} for name, values in times.items()},
        "ratio_to_eager": median["eager"] / median["ours"], "ratio_to_sdpa": median["sdpa"] / median["ours"],
        "operations": work, "operations_per_s": work / median["ours"], "matmul_ceiling_per_s": best,
        "of_ceiling": work / median["ours"] / best,
        "peak_rss": {which: peak_memory(which, preset, dtype, batch) for which in calls},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen2.5-3b")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/encoder_cpu.json"))
    parser.add_argument("--memory-of", choices=("ours", "eager", "sdpa"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with torch.inference_mode():
        if args.memory_of:
            print_peak_memory(args.memory_of, PRESETS[args.preset], DTYPES[args.dtypes[0]], args.batch)
            return
        command = command_line("benchmarks.encoder_cpu")
        result = {"command": command, "machine": machine.describe(), "runs": []}
        for dtype in args.dtypes:
            result["runs"].append(compare(args.preset, dtype, args.batch, args.repeats))
            print(json.dumps(result["runs"][-1]), file=sys.stderr)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
