"""TensorRT-RTX engines of the full-size components, built without a GPU: time, peak memory and size of each.

    python -m benchmarks.export_rtx                                       # all, one after the other: 12 GB of memory
    python -m benchmarks.export_rtx --components unet --precision fp16    # one of them, entered beside others

The encoder is the preset's; UNet and VAE are those of Stable Diffusion 2.1-base. All have random weights, which decide
nothing about a build. Each engine is built by a process of its own, whose peak memory is recorded. Exits with 1 if
a build fails; the reason is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import machine
from export import graphs, trace
from export.builders.tensorrt import build
from export.components import Batch, Port, opset
from export.quantize import qdq
from export.quantize.precision import DTYPES, block_costs, cheapest_blocks
from export.runtimes.tensorrt_library import LIBRARIES
from vlv.checkpoints import random_weights
from vlv.common.command import command_line
from vlv.model.config import PRESETS
from vlv.train.initialize import SD21_UNET, SD21_VAE

# of every activation in 8 bits: like weights, ranges decide nothing about a build
RANGE = SimpleNamespace(range_value=(-8.0, 8.0))
SIZE, TOKENS = 64, 77  # latents of 512 pixels; the context's length


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with random weights, none of which is initialised twice."""
    with torch.device("meta"):
        module = make()
    tensor_specs = module.state_dict()
    draw = random_weights.maker(tensor_specs)
    module.load_state_dict({name: draw(name) for name in tensor_specs}, assign=True)
    return module.eval().requires_grad_(False)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return filled(lambda: UNet2DConditionModel(**SD21_UNET))


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return filled(lambda: AutoencoderKL(**SD21_VAE))


COMPONENTS: dict[str, Callable[[str], graphs.Graph]] = {
    "encoder": lambda preset: graphs.EncoderGraph(random_weights.encoder(PRESETS[preset])),
    "context_kv": lambda _: graphs.ContextKV(unet(), TOKENS),
    "unet": lambda _: graphs.UNetStep(unet(), TOKENS),
    "vae_decoder": lambda _: graphs.VaeDecoder(vae(), SIZE),
    "vae_encoder": lambda _: graphs.VaeEncoder(vae(), 8 * SIZE),
}
PROFILES = {"encoder": Batch(1, 8, 32), "context_kv": Batch(1, 2, 4), "unet": Batch(1, 2, 4)}  # the unet's: guided
VAE_PROFILE = Batch(1, 1, 2)


def traced(name: str, preset: str, precision: str, folder: Path) -> dict:
    """Write the component's graph into `folder`; what a build of it needs to know."""
    start = time.monotonic()
    graph = COMPONENTS[name](preset).eval()
    excluded = cheapest_blocks(block_costs(graph)) if precision in qdq.FORMATS else ()
    if precision in DTYPES:
        graph.cast(DTYPES[precision])
    plain = folder / "plain" if precision in qdq.FORMATS else folder
    plain.mkdir(exist_ok=True)
    written = trace.to_onnx(graph, plain / f"{name}.onnx", PROFILES.get(name, VAE_PROFILE), opset(precision))
    if precision in qdq.FORMATS:
        written = qdq.quantized(written, plain, folder, defaultdict(lambda: RANGE), excluded, precision)
    return {
        "inputs": [vars(port) for port in graph.inputs],
        "trace_seconds": round(time.monotonic() - start, 1),
        "graph_mb": round(sum((folder / file).stat().st_size for file in written.files) / 1e6, 1),
    }


def built(name: str, folder: Path, inputs: list[dict], target: str) -> None:
    """Build, in this process, and print the figures."""
    ports = tuple(Port(**{**port, "shape": tuple(port["shape"])}) for port in inputs)
    start = time.monotonic()
    engine, _ = build(LIBRARIES["rtx"], str(folder / f"{name}.onnx"), ports, PROFILES.get(name, VAE_PROFILE), target)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({
        "build_seconds": round(time.monotonic() - start, 1),
        "peak_gb": round(int(peak.split()[1]) * 1024 / 1e9, 2),
        "engine_mb": round(len(engine) / 1e6, 1),
    }))  # fmt: skip


def measure(name: str, args: argparse.Namespace) -> dict:
    """Trace and build one component; tracing too has a process of its own, so that its memory is free again."""
    profile = vars(PROFILES.get(name, VAE_PROFILE))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.export_rtx", "--components", name, "--precision", args.precision]
        command += ["--preset", args.preset, "--target", args.target, "--folder", folder]
        entry: dict = {"profile": profile}
        for step in ("trace", "build"):
            run = subprocess.run([*command, "--step", step], capture_output=True, text=True)
            if run.returncode:
                reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
                return entry | {"failed": f"{step}: exit code {run.returncode}: {reason[:300]}"}
            entry |= json.loads(run.stdout.strip().splitlines()[-1])
    return {key: value for key, value in entry.items() if key != "inputs"}


def step(args: argparse.Namespace) -> None:
    """One half of `measure`, in a process of its own."""
    name, note = args.components[0], args.folder / "inputs.json"
    if args.step == "trace":
        entry = traced(name, args.preset, args.precision, args.folder)
        note.write_text(json.dumps(entry["inputs"]))
        print(json.dumps(entry))
    else:
        built(name, args.folder, json.loads(note.read_text()), args.target)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_rtx", description=__doc__, formatter_class=raw)
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=list(COMPONENTS), metavar="NAME")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", *qdq.FORMATS),
        default="fp16",
        metavar="P",
        help=f"fp32, fp16, bf16, {', '.join(qdq.FORMATS)} (fp16)",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen2.5-3b", help="of the encoder (qwen2.5-3b)")
    parser.add_argument("--target", default="sm89", metavar="SM", help="compute capability to build for (sm89)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/export_rtx.json"), metavar="FILE")
    parser.add_argument("--step", choices=("trace", "build"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args)
        return 0
    version = LIBRARIES["rtx"].load().__version__
    result = json.loads(args.out.read_text()) if args.out.exists() else {"engines": {}}
    run = {"command": command_line("benchmarks.export_rtx"), "machine": machine.describe()}
    run |= {"builder": f"TensorRT-RTX {version}", "preset": args.preset}
    failed = False
    for name in args.components:
        entry = run | measure(name, args)
        failed |= "failed" in entry
        result["engines"][f"{name} {args.precision} {args.target}"] = entry
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        print(name, json.dumps(entry))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
