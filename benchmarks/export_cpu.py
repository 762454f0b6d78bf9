"""The exported encoder on a CPU against eager PyTorch: float32 and INT8 in ONNX Runtime, and OpenVINO where it is.

    python -m benchmarks.export_cpu                           # full size: 17 GB of memory, a quarter of an hour
    python -m benchmarks.export_cpu --preset tiny --out /tmp/smoke.json
    python -m benchmarks.export_cpu --work DIR --only graphs  # in pieces: graphs, speed, captions

The encoder of the preset has random weights. All are timed in turns in one run, beside the ceilings of float32 and
8-bit matrix products on this machine, each with its error against float32 PyTorch, which its precision must explain.
The memory of loading is the peak of a process that loads the graph and runs nothing, over the size of its files.
Whether captions survive a precision is asked of the bundled checkpoint, on scenes that no export has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from export import graphs, onnx, trace
from export.components import PEAK, PRECISIONS, Batch, tolerance
from export.manifest import Manifest
from export.quantize.int8 import ranges, to_int8
from export.quantize.precision import block_costs, cheapest_blocks
from export.runtimes.factory import open_runtime
from export.runtimes.onnxruntime import flushed, session_options
from export.verification.captions import Captions
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.verifier import compare
from vlv.checkpoints import random_weights
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import command_line
from vlv.model.config import PRESETS

BUNDLED = Path("assets/vlv-tiny")
PARTS = ("graphs", "speed", "captions")
TIMED = ("fp32", "int8", "int8-static")  # precisions that ONNX Runtime is fast in
WIDE = ("avx512_vnni", "avx_vnni", "amx_int8")  # instructions for 8-bit products
TARGETS = {False: 1.3, True: 2.5}  # speedup over eager PyTorch, without and with one of them
ROUNDING = {"torch": "fp32", "f32": "fp32"}  # of the last word; others are their own
CALIBRATION = 2  # images: random weights need no more
SCENES, SEED = 512, 7  # images whose captions are compared; exports verify on seed 0 and calibrate on seed 1


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ceilings(size: int = 4096) -> dict[str, float]:
    """Operations a second of the best of five large products: PyTorch's float32, ONNX Runtime's 8-bit."""
    import onnxruntime
    from onnx import TensorProto, helper

    a, b = torch.randn(size, size), torch.randn(size, size)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    shapes = [("a", TensorProto.UINT8), ("b", TensorProto.INT8)]
    inputs = [helper.make_tensor_value_info(name, kind, [size, size]) for name, kind in shapes]
    output = helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]), opset_imports=[helper.make_opsetid("", 20)]
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feed = {
        "a": random.integers(0, 255, (size, size), np.uint8),
        "b": random.integers(-64, 64, (size, size), np.int8),
    }
    calls = {"float32": lambda: a @ b, "int8": lambda: session.run(None, feed)}
    return {name: 2 * size**3 / min(seconds(call) for _ in range(5)) for name, call in calls.items()}


def write_graphs(preset: str, work: Path) -> None:
    """Write the encoder's graph in each of TIMED into folders of these names, in a process of its own."""
    code = "import sys; from benchmarks import export_cpu as b; b.trace_and_quantize(sys.argv[1], b.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, preset, str(work)], check=True)


def trace_and_quantize(preset: str, work: Path) -> None:
    """Do the work of `write_graphs` in this process."""
    for precision in TIMED:
        (work / precision).mkdir(parents=True, exist_ok=True)
    graph = graphs.EncoderGraph(random_weights.encoder(PRESETS[preset]))
    traced = trace.to_onnx(graph, work / "fp32" / "encoder.onnx", Batch(1, 1, 8), 20)
    shown = [{"pixels": graph.example(1, torch.Generator().manual_seed(i))[0]} for i in range(CALIBRATION)]
    excluded = cheapest_blocks(block_costs(graph))  # as every export leaves them
    del graph
    to_int8(traced, work / "fp32", work / "int8", excluded_blocks=excluded)
    measured = ranges(work / "fp32" / traced.files[0], shown)
    to_int8(traced, work / "fp32", work / "int8-static", measured, excluded)


def onnxruntime(folder: Path) -> Callable[[np.ndarray], object]:
    import onnxruntime as ort

    session = ort.InferenceSession(folder / "encoder.onnx", session_options(), providers=["CPUExecutionProvider"])

    def call(images: np.ndarray) -> np.ndarray:
        with flushed():
            return session.run(["prompts"], {"pixels": images})[0]

    return call


def openvino(folder: Path, precision: str) -> Callable[[np.ndarray], object] | None:
    """The float32 graph in OpenVINO, computing in f32 or bf16; None where it is missing."""
    try:
        import openvino as ov
    except ImportError:
        print("OpenVINO not timed: python -m pip install openvino", file=sys.stderr)
        return None
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = ov.Core().compile_model(folder / "encoder.onnx", "CPU", settings)
    return lambda images: compiled({"pixels": images})["prompts"]


def loading_peak(folder: Path) -> float:
    """Peak resident bytes of loading, less those of the imports, over the size of the files."""
    code = (
        "import sys, onnxruntime as o; from pathlib import Path\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))\n"
        "before = peak(); options = o.SessionOptions(); options.log_severity_level = 3\n"
        "session = o.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(folder / "encoder.onnx")]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return peak / sum(f.stat().st_size for f in folder.glob("encoder.onnx*"))


def speed(preset: str, work: Path, batch: int, repeats: int, vino: str | None) -> dict:
    """Times, errors and memory, in one run."""
    peaks = {precision: loading_peak(work / precision) for precision in TIMED}
    graph = graphs.EncoderGraph(random_weights.encoder(PRESETS[preset]))
    size = PRESETS[preset].image_size
    images = graph.example(batch, torch.Generator().manual_seed(0))[0]

    @torch.inference_mode()
    def eager(_: np.ndarray) -> Tensor:
        return graph(images)[1]

    calls: dict[str, Callable[[np.ndarray], object]] = {"torch": eager}
    calls |= {f"onnx {precision}": onnxruntime(work / precision) for precision in TIMED}
    if vino and (run := openvino(work / "fp32", vino)):
        calls[f"openvino {vino}"] = run
    fed, errors = images.numpy(), {}
    expected = eager(fed)
    for name, call in calls.items():  # the warm-up as well
        found = torch.as_tensor(call(fed))
        allowed = tolerance(ROUNDING.get(word := name.split()[-1], word), len(graph.blocks), graph.longest_sum)
        errors[name] = compare(found, expected) | {"allowed_rms": allowed, "allowed_max": PEAK * allowed}
        if not (errors[name]["rms"] <= allowed and errors[name]["max"] <= PEAK * allowed):
            raise RuntimeError(f"{name} is wrong, so it is not timed: {errors[name]}")
    best, times = ceilings(), {name: [] for name in calls}
    for _ in range(repeats):  # in turns, so that whatever else the machine does meets all alike
        for name, call in calls.items():
            times[name].append(seconds(lambda call=call: call(fed)))
    median = {name: statistics.median(values) for name, values in times.items()}
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return {
        "preset": preset, "image_size": size, "batch": batch, "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in graph.parameters()),
        "instructions": [flag for flag in ("avx2", "avx512f", *WIDE, "avx512_bf16", "amx_bf16") if flag in flags],
        "ceiling_gflops": {k: v / 1e9 for k, v in best.items()},
        "seconds": {name: {"median": median[name], "all": values} for name, values in times.items()},
        "speedup": {name: median["torch"] / value for name, value in median.items()},
        "wanted_speedup": TARGETS[bool(flags & set(WIDE))], "errors": errors,
        "file_bytes": {p: sum(f.stat().st_size for f in (work / p).glob("encoder.onnx*")) for p in TIMED},
        "loading_peak_over_file": peaks,
    }  # fmt: skip


def captions(work: Path) -> dict:
    """Return the share of greedy tokens that each precision keeps, for unseen scenes and, apart, for noise."""
    checkpoint = Checkpoint.open(BUNDLED)
    inputs = VerificationInputs(checkpoint, SCENES + NOISE, seed=SEED)
    noise = np.random.default_rng(SEED).integers(0, 256, (16, *inputs.images.shape[1:]), np.uint8)
    sets = {"scenes": inputs.images[:-NOISE], "noise": torch.from_numpy(noise)}
    reference = {name: Captions(checkpoint, inputs.reference, images) for name, images in sets.items()}
    result = {}
    for precision in PRECISIONS[1:]:
        folder = work / f"bundled-{precision}"
        command = ["--ckpt", str(BUNDLED), "--out", str(folder), "--components", "encoder", "--max-batch", "16"]
        if onnx.main([*command, "--precision", precision, "--probes", "96", "--allow-drift"]):
            raise RuntimeError(f"{precision} gives nothing to compare; the reason is above")
        artifact = Manifest.open(folder).artifacts["encoder"]
        figures = artifact.verification
        entry = {
            "fp32_blocks": artifact.fp32_blocks,
            "excluded_blocks": artifact.excluded_blocks,
            "embeddings": figures["outputs"]["prompts"],
            "refused_without_allow_drift": figures["problems"],
        }
        runtime = open_runtime("onnx", folder, checkpoint)
        for name in sets:  # all of its images, whatever the result
            entry[name] = asdict(reference[name].agreement(lambda images, r=runtime: _encode(r, images), 1.0))
        result[precision] = entry
    return result


def _encode(runtime, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([runtime.encode(part) for part in images.split(16)])


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_cpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen2.5-0.5b", help="sizes (qwen2.5-0.5b)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--openvino", choices=("f32", "bf16"), metavar="PRECISION", help="time OpenVINO too: f32, bf16")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the graphs are kept (a temporary folder)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/export_cpu.json"), metavar="FILE")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    with contextlib.nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as work:
        if "graphs" in args.only:
            write_graphs(args.preset, Path(work))
        if "speed" in args.only:
            found = speed(args.preset, Path(work), args.batch, args.repeats, args.openvino)
            result["speed"] = {"machine": machine.describe(), **found}
        if "captions" in args.only:
            result["captions"] = {"machine": machine.describe(), **captions(Path(work))}
    for part in set(args.only) & result.keys():
        result[part]["command"] = command_line("benchmarks.export_cpu")
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
