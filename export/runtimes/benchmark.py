"""Measure latency, throughput and memory of an encoder in every runtime that works here, beside eager PyTorch.

The runtimes are timed in turns, so that other load on the machine affects all alike. Each figure comes with its error
against float32 PyTorch, and a runtime that is wrong is not timed. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.components import PEAK, tolerance
from export.runtimes.base import EncoderRuntime, RuntimeUnavailable
from export.runtimes.factory import open_runtime
from export.runtimes.torch import TorchRuntime
from export.verification.verifier import compare
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common.command import one_line
from vlv.common.table import table as text_table

EAGER, GRAPHS, COMPILED = "torch", "torch.graphs", "torch.compile"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # torch's names
WARM_UP = 3  # calls: allocations, compilation, CUDA graphs
HEAD = ("runtime", "batch", "precision", "p50 ms", "p90 ms", "p99 ms", "images/s", "x eager", "GB", "rms error")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    ckpt: str
    artifacts: Path
    runtimes: tuple[str, ...]
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 20
    precision: str | None = None  # of PyTorch's rows


def measure(config: BenchConfig, checkpoint: Checkpoint) -> dict:
    """Return machine, artifacts, "missing" (why runtimes were not timed), and "runs" (a row per runtime and batch)."""
    runtimes, missing = _open_all(config, checkpoint)
    rows = [row for batch in config.batches for row in _measure_batch(runtimes, checkpoint, batch, config.repeats)]
    memory = {name: _memory(config, name) for name in runtimes}
    for row in rows:
        row["peak_bytes"] = memory[row["runtime"]]
    return {"machine": _machine(), "artifacts": str(config.artifacts), "missing": missing, "runs": rows}


def peak_bytes(config: BenchConfig, checkpoint: Checkpoint) -> int:
    """Load the first runtime's encoder, run the first batch, and return the peak memory of this process or GPU."""
    runtime = _open(config.runtimes[0], config, checkpoint)
    runtime.encode(_images(checkpoint, min(config.batches[0], runtime.max_batch or config.batches[0])))
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _open_all(config: BenchConfig, checkpoint: Checkpoint) -> tuple[dict[str, EncoderRuntime], dict[str, str]]:
    """Return the runtimes that work here by name, and the reasons why the others do not."""
    runtimes, missing = {}, {}
    for name in config.runtimes:
        try:
            runtimes[name] = _open(name, config, checkpoint)
        except CheckpointError:
            raise
        except (ValueError, RuntimeError, ImportError) as error:
            missing[name] = one_line(error, 200)
    return runtimes, missing


def _open(name: str, config: BenchConfig, checkpoint: Checkpoint) -> EncoderRuntime:
    if name == GRAPHS and not torch.cuda.is_available():
        raise RuntimeUnavailable("CUDA graphs need a GPU, and there is none")
    if name in (EAGER, GRAPHS, COMPILED):
        graphs = max(config.batches) if name == GRAPHS else 0
        runtime = TorchRuntime(checkpoint, compiled=name == COMPILED, precision=config.precision, graphs=graphs)
    else:
        runtime = open_runtime(name, config.artifacts, checkpoint)
    runtime.encode(_images(checkpoint, 1))  # fails here if an artifact is damaged or a compiler missing
    return runtime


def _images(checkpoint: Checkpoint, batch: int) -> Tensor:
    """Return random images, uint8 [batch, 3, S, S]."""
    size = checkpoint.config.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def _measure_batch(
    runtimes: Mapping[str, EncoderRuntime], checkpoint: Checkpoint, batch: int, repeats: int
) -> list[dict]:
    """Return one row per runtime that takes the batch."""
    images, reference = _images(checkpoint, batch), TorchRuntime(checkpoint, "cpu")
    expected, graph = reference.encode(images), reference.session("encoder").graph
    rows, correct = [], {}
    for name, runtime in runtimes.items():
        if runtime.max_batch and batch > runtime.max_batch:
            continue
        for _ in range(WARM_UP):
            error = compare(runtime.encode(images).cpu(), expected)
        precision = PRECISIONS.get(runtime.dtype, runtime.dtype)
        allowed = tolerance(precision, len(graph.blocks), graph.longest_sum)
        wrong = not (error["rms"] <= allowed and error["max"] <= PEAK * allowed)
        rows.append({"runtime": name, "batch": batch, "precision": precision, "error": error, "wrong": wrong})
        if not wrong:
            correct[name] = runtime
    times = _times(correct, images, repeats)
    for row in rows:
        if seconds := times.get(row["runtime"]):
            median = quantile(seconds, 0.5)
            row |= {f"p{q}_ms": 1000 * quantile(seconds, q / 100) for q in (50, 90, 99)}
            row["images_per_s"] = batch / median
            row["speedup"] = quantile(times[EAGER], 0.5) / median if EAGER in times else None
    return rows


def _times(runtimes: Mapping[str, EncoderRuntime], images: Tensor, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(repeats):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.encode(images)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def quantile(values: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


def _memory(config: BenchConfig, name: str) -> int:
    """Return the peak bytes of a process that loads one runtime's encoder and runs the largest batch."""
    command = [sys.executable, "-m", "export.bench", "--artifacts", str(config.artifacts), "--ckpt", config.ckpt]
    command += ["--memory-of", name, "--batches", str(max(config.batches))]
    command += ["--precision", config.precision] if config.precision else []
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def _machine() -> dict:
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def table(rows: list[dict]) -> str:
    """Return the rows as text."""
    lines = []
    for row in rows:
        timed = [f"{row[f'p{q}_ms']:.1f}" for q in (50, 90, 99)] if "p50_ms" in row else ["wrong", "-", "-"]
        rate = f"{row['images_per_s']:.1f}" if "images_per_s" in row else "-"
        speedup = f"{row['speedup']:.2f}" if row.get("speedup") else "-"
        numbers = (rate, speedup, f"{row['peak_bytes'] / 1e9:.2f}", f"{row['error']['rms']:.1e}")
        lines.append((row["runtime"], row["batch"], row["precision"], *timed, *numbers))
    return text_table(HEAD, lines)


def plot(rows: list[dict], file: Path) -> None:
    """Plot the median latency, with p90 as error bars, by batch and runtime; needs matplotlib."""
    import matplotlib  # optional

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["runtime"] for row in rows):
        timed = [row for row in rows if row["runtime"] == name and "p50_ms" in row]
        if timed:
            median = [row["p50_ms"] for row in timed]
            above = [[0] * len(timed), [row["p90_ms"] - row["p50_ms"] for row in timed]]
            axes.errorbar([row["batch"] for row in timed], median, yerr=above, marker="o", capsize=3, label=name)
    axes.set(xlabel="images per batch", ylabel="ms per batch (median, p90)", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
