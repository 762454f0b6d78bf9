"""The exported encoder on a CPU against eager PyTorch: float32 and INT8 in ONNX Runtime, and OpenVINO where it is.

    python -m benchmarks.export_cpu                                     # full size: 15 GB of memory, half an hour
    python -m benchmarks.export_cpu --ckpt assets/vlv-tiny --out /tmp/smoke.json

Without --ckpt a checkpoint of the preset's size with random weights is made. All are timed in turns in one run, beside
the ceilings of float32 and 8-bit matrix products on this machine. Errors are those against float32 PyTorch, from the
manifest; captions are compared where the checkpoint is a trained one. The memory of loading is the peak of a process
that loads the graph and runs nothing, over the size of its files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from export import onnx
from export.engine import open_engine
from export.manifest import Manifest
from vlv import random_weights
from vlv.checkpoint import Checkpoint
from vlv.config import PRESETS

PRECISIONS = ("fp32", "int8", "bf16")


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


def export(checkpoint: Checkpoint, folder: Path, precision: str, batch: int) -> dict:
    """Export the encoder; its verification figures. Drift is measured here, so it is allowed."""
    command = ["--ckpt", str(checkpoint.folder), "--out", str(folder), "--components", "encoder"]
    command += ["--precision", precision, "--max-batch", str(batch), "--probes", "4", "--allow-drift"]
    if onnx.main([*command, *(["--no-captions"] if "reconstruct" not in checkpoint.can else [])]):
        return {"refused": True}
    figures = Manifest.open(folder).artifacts["encoder"].verification
    return {"outputs": figures["outputs"], "captions": figures["captions"], "problems": figures["problems"]}


def openvino(folder: Path) -> Callable[[np.ndarray], object] | None:
    """The float32 graph in OpenVINO, which chooses bfloat16 itself where the CPU has it; None where it is missing."""
    try:
        import openvino as ov
    except ImportError:
        print("OpenVINO not timed: python -m pip install openvino", file=sys.stderr)
        return None
    compiled = ov.Core().compile_model(folder / "encoder.onnx", "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda pictures: compiled({"pixels": pictures})["prompts"]


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


def measure(checkpoint: Checkpoint, work: Path, batch: int, repeats: int) -> dict:
    """Everything, in one run."""
    size = checkpoint.config.image_size
    pictures = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = {precision: export(checkpoint, work / precision, precision, batch) for precision in PRECISIONS}
    made = [precision for precision in PRECISIONS if "refused" not in found[precision]]
    eager = open_engine("torch", None, checkpoint)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: eager.encode(pictures)}
    for precision in made:
        engine = open_engine("onnx", work / precision, checkpoint)
        calls[f"onnx {precision}"] = lambda engine=engine: engine.encode(pictures)
    if run := openvino(work / "fp32"):
        calls["openvino"] = lambda: run(pictures.numpy())
        expected = eager.encode(pictures)
        error = torch.from_numpy(np.array(run(pictures.numpy()))) - expected
        found["openvino"] = {"rms": (error.square().mean() / expected.square().mean()).sqrt().item()}
    best, times = ceilings(), {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):  # in turns, so that whatever else the machine does meets all alike
        for name, call in calls.items():
            times[name].append(seconds(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch": batch, "threads": torch.get_num_threads(), "ceiling_gflops": {k: v / 1e9 for k, v in best.items()},
        "seconds": {name: {"median": median[name], "all": values} for name, values in times.items()},
        "speedup": {name: median["torch"] / value for name, value in median.items()}, "verification": found,
        "loading_peak_over_file": {precision: loading_peak(work / precision) for precision in made},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_cpu", description=__doc__)
    parser.add_argument("--ckpt", type=Path, metavar="DIR", help="default: random weights of --preset")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen2.5-0.5b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/export_cpu.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = args.ckpt or random_weights.write(args.preset, Path(work) / "checkpoint").folder
        result = measure(Checkpoint.open(folder), Path(work), args.batch, args.repeats)
    result = {"machine": machine.describe(), "preset": None if args.ckpt else args.preset, **result}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("ceiling_gflops", "speedup", "loading_peak_over_file")}, indent=2))


if __name__ == "__main__":
    main()
