"""Everything of the export that needs a GPU, in one call: python -m benchmarks.gpu.trt --ckpt assets/vlv-tiny

Exports in half precision, builds engines for this GPU (TensorRT, and TensorRT-RTX where it knows the GPU), holds every
component against float32 PyTorch, reconstructs with 50 steps, refits an engine, and times encoding beside eager
PyTorch, torch.compile and ONNX Runtime. A runtime whose library is missing is named with its install command. Writes
benchmarks/gpu/trt.json; exit code 1 if anything fails, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine
from export import bench, onnx, trt, verify
from export.engine import TorchEngine, open_engine
from export.manifest import ArtifactError
from export.probes import Probes
from export.tensorrt_library import LIBRARIES, device_target
from vlv.checkpoint import Checkpoint

PSNR = 30.0  # dB that a half-precision reconstruction must reach; float32 reaches 40


def reconstruction(word: str, out: Path, checkpoint: Checkpoint) -> dict:
    """PSNR of 50 steps against float32 PyTorch on this GPU's host, at equal seeds."""
    pictures = Probes(checkpoint, 4).pictures[:2]
    reference = TorchEngine(checkpoint, "cpu")
    context = reference.context(pictures)
    expected = reference.reconstruct(context, seed=1).float()
    found = open_engine(word, out, checkpoint).reconstruct(context, seed=1).float().cpu()
    psnr = 10 * torch.tensor(255**2 / max((found - expected).square().mean().item(), 1e-9)).log10().item()
    return {"psnr": psnr, "passed": psnr > PSNR}


def steps(args: argparse.Namespace, out: Path, target: str) -> dict[str, Callable[[], object]]:
    """What is done, by name and in order."""
    checkpoint = Checkpoint.open(args.ckpt)
    common = ["--ckpt", args.ckpt, "--out", str(out), "--max-batch", str(args.batch), "--max-pictures", "2"]
    precise = [*common, "--precision", args.precision]
    done: dict[str, Callable[[], object]] = {"export": lambda: onnx.main(precise)}
    words = ["onnx-cuda", "onnx-trt"]
    for runtime, library in LIBRARIES.items():
        try:
            library.load()
        except ArtifactError as missing:
            print(missing, file=sys.stderr)
            continue
        words.append(runtime)
        build = [*precise, "--target", target, "--runtime", runtime]
        done[f"{runtime} build"] = lambda build=build: trt.main([*build, "--refittable"])
        done[f"{runtime} refit"] = lambda build=build: trt.main(
            [*build, "--components", "encoder", "--refit", "--force"]
        )
    for word in words:
        check = ["--artifacts", str(out), "--ckpt", args.ckpt, "--runtime", word]
        done[f"{word} verify"] = lambda check=check: verify.main(check)
        done[f"{word} reconstruct"] = lambda word=word: reconstruction(word, out, checkpoint)
    timing = ["--artifacts", str(out), "--ckpt", args.ckpt, "--batches", "1", str(args.batch)]
    done["bench"] = lambda: bench.main([*timing, "--out", str(args.out.with_name("trt-bench.json"))])
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.trt", description=__doc__)
    parser.add_argument("--ckpt", default="assets/vlv-tiny", metavar="DIR")
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "bf16", "mixed"))
    parser.add_argument("--batch", type=int, default=8, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu/trt.json"), metavar="FILE")
    args = parser.parse_args()
    target = device_target()
    if not target:
        print("error: this needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 1
    result = {"machine": machine.describe(), "gpu": torch.cuda.get_device_name(0), "target": target, "steps": {}}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, call in steps(args, Path(folder) / "artifacts", target).items():
            print(f"== {name}", file=sys.stderr)
            try:
                found = call()
            except (ValueError, RuntimeError) as error:  # one runtime's failure does not hide the others' figures
                found = {"passed": False, "error": " ".join(str(error).split())[:300]}
            found = found if isinstance(found, dict) else {"passed": found == 0}
            result["steps"][name] = found
            failed |= not found["passed"]
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["steps"], indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
