"""Everything of the export that needs a GPU, in one call: python -m benchmarks.gpu.trt --ckpt assets/vlv-tiny

Exports in half precision, builds engines for this GPU (TensorRT, and TensorRT-RTX where it knows the GPU), holds every
component against float32 PyTorch, reconstructs with 50 steps, refits an engine, times encoding beside eager PyTorch,
torch.compile and ONNX Runtime, and TensorRT's engines with our plugins, and in FP8 where the GPU has it, beside those
without. A runtime whose library is missing is named with its install command. Writes benchmarks/gpu/trt.json; exit code
1 if anything fails, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine
from export import bench, onnx, trt, verify
from export.components import OLDEST_FP8, PEAK, tolerance
from export.manifest import ArtifactError
from export.runtimes.base import Session
from export.runtimes.factory import open_runtime
from export.runtimes.tensorrt_library import LIBRARIES, device_target
from export.runtimes.torch import TorchRuntime
from export.verification.inputs import VerificationInputs
from export.verification.verifier import compare
from vlv.checkpoints.folder import Checkpoint

FUSED = ("encoder", "unet", "vae_decoder")  # components whose time the plugins are to shorten
EIGHT = ("encoder", "unet")  # those that consist of linear layers
PSNR = 30.0  # dB that a half-precision reconstruction must reach; float32 reaches 40


def reconstruction(word: str, out: Path, checkpoint: Checkpoint) -> dict:
    """PSNR of 50 steps against float32 PyTorch on this GPU's host, at equal seeds."""
    images = VerificationInputs(checkpoint, 4).images[:2]
    reference = TorchRuntime(checkpoint, "cpu")
    context = reference.context(images)
    expected = reference.reconstruct(context, seed=1).float()
    found = open_runtime(word, out, checkpoint).reconstruct(context, seed=1).float().cpu()
    psnr = 10 * torch.tensor(255**2 / max((found - expected).square().mean().item(), 1e-9)).log10().item()
    return {"psnr": psnr, "passed": psnr > PSNR}


def build_plain(build: list[str], out: Path, plain: Path) -> int:
    """The engines without plugins, in a folder of their own beside the same graphs."""
    shutil.copytree(out, plain)
    return trt.main([*_into(plain, build), "--components", *FUSED, "--plugins", "off"])


def _into(folder: Path, command: list[str]) -> list[str]:
    """The command with another --out."""
    place = command.index("--out") + 1
    return [*command[:place], str(folder), *command[place + 1 :]]


def against_plain(
    word: str, ours: Path, plain: Path, checkpoint: Checkpoint, components: Sequence[str] = FUSED, repeats: int = 20
) -> dict:
    """Per component the median time of our engine and of the plain one, in turns at the largest batch, and their ratio.

    Outputs that differ by more than the precision explains for each of the two fail, and no time is told.
    """
    runtimes = [open_runtime(word, folder, checkpoint) for folder in (ours, plain)]
    verification, result = VerificationInputs(checkpoint, 4), {"passed": True}
    for component in components:
        sessions = [runtime.session(component) for runtime in runtimes]
        artifact, inputs = runtimes[0].manifest.find(component), verification.inputs(component)[0]
        for port in (port for port in artifact.inputs if port.batched):
            inputs[port.name] = inputs[port.name][[i % len(inputs[port.name]) for i in range(artifact.profile.max)]]
        inputs = {name: value.to(sessions[0].device) for name, value in inputs.items()}
        longest_sum = verification.reference.session(component).graph.longest_sum
        allowed = 2 * tolerance(artifact.precision, len(artifact.blocks), longest_sum)
        found, expected = (session(**inputs) for session in sessions)
        errors = {name: compare(found[name], value) for name, value in expected.items()}
        right = all(e["rms"] <= allowed and e["max"] <= PEAK * allowed for e in errors.values())
        result["passed"] &= right
        result[component] = {"batch": artifact.profile.max, "errors": errors, "allowed_rms": allowed}
        if right:
            seconds = [statistics.median(times) for times in _in_turns(sessions, inputs, repeats)]
            result[component] |= {"ours_s": seconds[0], "plain_s": seconds[1], "speedup": seconds[1] / seconds[0]}
    return result


def _in_turns(sessions: Sequence[Session], inputs: dict[str, torch.Tensor], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats):
        for kept, session in zip(times, sessions, strict=True):
            start = time.perf_counter()
            session(**inputs)
            if session.device.type == "cuda":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return times


def fp8_steps(build: list[str], eight: Path, plain: Path, checkpoint: Checkpoint) -> dict[str, Callable[[], object]]:
    """Engines in a folder of their own, beside those of the plain half-precision graphs."""
    command = [*_into(eight, build), "--precision", "fp8", "--components", *EIGHT]
    check = ["--artifacts", str(eight), "--ckpt", str(checkpoint.folder), "--runtime", "trt"]
    return {
        "trt fp8 build": lambda: trt.main(command),
        "trt fp8 verify": lambda: verify.main(check),
        "trt fp8": lambda: against_plain("trt", eight, plain, checkpoint, EIGHT),
    }


def steps(args: argparse.Namespace, out: Path, target: str) -> dict[str, Callable[[], object]]:
    """What is done, by name and in order."""
    checkpoint = Checkpoint.open(args.ckpt)
    common = ["--ckpt", args.ckpt, "--out", str(out), "--max-batch", str(args.batch), "--max-images", "2"]
    precise = [*common, "--precision", args.precision]
    done: dict[str, Callable[[], object]] = {"export": lambda: onnx.main(precise)}
    words, plain = ["onnx-cuda", "onnx-trt"], out.with_name("plain")
    for runtime, library in LIBRARIES.items():
        try:
            library.load()
        except ArtifactError as missing:
            print(missing, file=sys.stderr)
            continue
        words.append(runtime)
        build = [*precise, "--target", target, "--runtime", runtime, "--refittable"]
        if runtime == "trt":
            check = ["--artifacts", str(plain), "--ckpt", args.ckpt, "--runtime", runtime]
            done["trt build without plugins"] = lambda build=build: build_plain(build, out, plain)
            done["trt verify without plugins"] = lambda check=check: verify.main(check)
            if int(target[2:]) >= OLDEST_FP8:
                done |= fp8_steps(build, out.with_name("fp8"), plain, checkpoint)
            build = [*build, "--plugins", "on"]
        done[f"{runtime} build"] = lambda build=build: trt.main(build)
        done[f"{runtime} refit"] = lambda build=build: trt.main(
            [*build, "--components", "encoder", "--refit", "--force"]
        )
    for word in words:
        check = ["--artifacts", str(out), "--ckpt", args.ckpt, "--runtime", word]
        done[f"{word} verify"] = lambda check=check: verify.main(check)
        done[f"{word} reconstruct"] = lambda word=word: reconstruction(word, out, checkpoint)
    if "trt" in words:
        done["trt plugins"] = lambda: against_plain("trt", out, plain, checkpoint)
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
