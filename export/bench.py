"""Latency, throughput and memory of an exported encoder: python -m export.bench --artifacts DIR --ckpt DIR

Every runtime that works here, against eager PyTorch and torch.compile, in one run: in turns, so that whatever else the
machine does meets all alike. Each figure has its error against float32 PyTorch beside it, and a runtime that is wrong
is not timed. Memory is the peak of a process that does nothing else. Writes JSON and a PNG plot, prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from export import cli
from vlv.common.command import command_line

EAGER, COMPILED = "torch", "torch.compile"
RUNTIMES = (EAGER, COMPILED, "onnx", "onnx-cuda", "onnx-trt", "trt", "rtx")


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    p = cli.parser("bench", __doc__)
    p.add_argument("--artifacts", type=Path, required=True, metavar="DIR", help="what an export wrote")
    p.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint that it was made from")
    p.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES, metavar="NAME", help=", ".join(RUNTIMES)
    )
    p.add_argument("--batches", nargs="+", type=cli.positive, default=[1, 8], metavar="N", help="batch sizes (1 8)")
    p.add_argument("--repeats", type=cli.positive, default=20, metavar="N", help="timed calls each (20)")
    p.add_argument("--out", type=Path, default=Path("bench.json"), metavar="FILE", help="JSON; the plot is beside it")
    p.add_argument("--memory-of", choices=RUNTIMES, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser().parse_args(argv), _bench)


def _bench(args: argparse.Namespace) -> int:
    if args.memory_of:
        print(_peak_bytes(args))
        return 0
    checkpoint = cli.checkpoint(args.ckpt)
    engines, missing = _engines(args, checkpoint)
    rows = []
    for batch in args.batches:
        rows += _measure(engines, checkpoint, batch, args.repeats)
    memory = {name: _memory(args, name) for name in engines}
    for row in rows:
        row["peak_bytes"] = memory[row["runtime"]]
    command = command_line("export.bench")
    about = {"command": command, "machine": _machine(), "artifacts": str(args.artifacts)}
    result = {**about, "missing": missing, "runs": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    _plot(rows, args.out.with_suffix(".png"))
    print(table(rows))
    for name, reason in missing.items():
        cli.say(f"{name} not timed: {reason}")
    return 1 if any(row["wrong"] for row in rows) else 0


def _engines(args: argparse.Namespace, checkpoint) -> tuple[dict, dict[str, str]]:
    """The engines that work here by name, and why the others do not."""
    from vlv.checkpoints.folder import CheckpointError

    engines, missing = {}, {}
    for name in args.runtimes:
        try:
            engines[name] = _open(name, args.artifacts, checkpoint)
        except CheckpointError:
            raise
        except (ValueError, RuntimeError, ImportError) as error:
            missing[name] = " ".join(str(error).split())[:200]
    return engines, missing


def _open(name: str, artifacts: Path, checkpoint):
    from export.runtimes.base import TorchRuntime, open_runtime

    engine = TorchRuntime(checkpoint, compiled=True) if name == COMPILED else open_runtime(name, artifacts, checkpoint)
    engine.encode(_pictures(checkpoint, 1))  # a damaged artifact, or a machine without a compiler, says so here
    return engine


def _pictures(checkpoint, batch: int):
    import torch

    size = checkpoint.config.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def _measure(engines: dict, checkpoint, batch: int, repeats: int) -> list[dict]:
    """One row a runtime that takes the batch."""
    from export.components import PEAK, tolerance
    from export.runtimes.base import TorchRuntime
    from export.verification.verifier import compare

    pictures, reference = _pictures(checkpoint, batch), TorchRuntime(checkpoint, "cpu")
    expected, graph = reference.encode(pictures), reference.session("encoder").graph
    rows, able = [], {}
    for name, engine in engines.items():
        if engine.max_batch and batch > engine.max_batch:
            continue
        for _ in range(3):  # warm-up: allocations, compilation, CUDA graphs
            error = compare(engine.encode(pictures).cpu(), expected)
        precision = {"float32": "fp32", "bfloat16": "bf16"}.get(engine.dtype, engine.dtype)
        allowed = tolerance(precision, len(graph.blocks), graph.longest)
        wrong = not (error["rms"] <= allowed and error["max"] <= PEAK * allowed)
        rows.append({"runtime": name, "batch": batch, "precision": precision, "error": error, "wrong": wrong})
        if not wrong:
            able[name] = engine
    times = _times(able, pictures, repeats)
    for row in rows:
        if seconds := times.get(row["runtime"]):
            row |= {f"p{q}_ms": 1000 * _quantile(seconds, q / 100) for q in (50, 90, 99)}
            row["images_per_s"] = batch / _quantile(seconds, 0.5)
            row["speedup"] = _quantile(times[EAGER], 0.5) / _quantile(seconds, 0.5) if EAGER in times else None
    return rows


def _times(engines: dict, pictures, repeats: int) -> dict[str, list[float]]:
    import time

    import torch

    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.encode(pictures)
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def _quantile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def _memory(args: argparse.Namespace, name: str) -> int:
    """Peak bytes of a process that loads one runtime's encoder and runs the largest batch."""
    command = [sys.executable, "-m", "export.bench", "--artifacts", str(args.artifacts), "--ckpt", args.ckpt]
    command += ["--memory-of", name, "--batches", str(max(args.batches))]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def _peak_bytes(args: argparse.Namespace) -> int:
    import torch

    checkpoint = cli.checkpoint(args.ckpt)
    engine = _open(args.memory_of, args.artifacts, checkpoint)
    engine.encode(_pictures(checkpoint, min(args.batches[0], engine.max_batch or args.batches[0])))
    if engine.device.type == "cuda":
        return torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _machine() -> dict:
    import os
    import platform

    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": cpu[0] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu,
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2), "torch": torch.__version__,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [("runtime", "batch", "precision", "p50 ms", "p90 ms", "p99 ms", "images/s", "x eager", "GB", "rms error")]
    for row in rows:
        timed = [f"{row[f'p{q}_ms']:.1f}" for q in (50, 90, 99)] if "p50_ms" in row else ["wrong", "-", "-"]
        rate = f"{row['images_per_s']:.1f}" if "images_per_s" in row else "-"
        speedup = f"{row['speedup']:.2f}" if row.get("speedup") else "-"
        numbers = (rate, speedup, f"{row['peak_bytes'] / 1e9:.2f}", f"{row['error']['rms']:.1e}")
        lines.append((row["runtime"], str(row["batch"]), row["precision"], *timed, *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _plot(rows: list[dict], file: Path) -> None:
    """Median latency, with p90 as a whisker, by batch and runtime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["runtime"] for row in rows):
        timed = [row for row in rows if row["runtime"] == name and "p50_ms" in row]
        if timed:
            middle = [row["p50_ms"] for row in timed]
            whisker = [[0] * len(timed), [row["p90_ms"] - row["p50_ms"] for row in timed]]
            axes.errorbar([row["batch"] for row in timed], middle, yerr=whisker, marker="o", capsize=3, label=name)
    axes.set(xlabel="images a batch", ylabel="ms a batch (median, p90)", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
