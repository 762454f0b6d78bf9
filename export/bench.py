"""Measure latency, throughput and memory of an exported encoder: python -m export.bench --artifacts DIR --ckpt DIR

Times every runtime that works here in turns, beside PyTorch eager, in CUDA graphs and compiled. Each figure comes with
its error against float32 PyTorch, and a runtime that is wrong is not timed. Memory is the peak of a process that does
nothing else. Writes JSON and a PNG plot, prints a table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export import arguments
from export.components import RUNTIMES, TORCH_PRECISIONS
from vlv.common.command import command_line, positive, run_command, say

TIMED = ("torch", "torch.graphs", "torch.compile", *RUNTIMES[1:])


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    p = arguments.parser("bench", __doc__)
    p.add_argument("--artifacts", type=Path, required=True, metavar="DIR", help="the folder that an export wrote")
    p.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint that it was made from")
    p.add_argument(
        "--runtimes",
        nargs="+",
        choices=TIMED,
        default=TIMED,
        metavar="NAME",
        help=f"default: all of {', '.join(TIMED)}",
    )
    p.add_argument(
        "--precision",
        choices=TORCH_PRECISIONS,
        help="precision of the PyTorch runtimes (default: bf16 on a GPU, else fp32)",
    )
    p.add_argument(
        "--batches", nargs="+", type=positive, default=[1, 8], metavar="N", help="batch sizes (default: 1 8)"
    )
    p.add_argument(
        "--repeats", type=positive, default=20, metavar="N", help="timed calls of each runtime (default: 20)"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("bench.json"),
        metavar="FILE",
        help="JSON; the plot is beside it (default: bench.json)",
    )
    p.add_argument("--memory-of", choices=TIMED, help=argparse.SUPPRESS)
    return p


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code."""
    from export.runtimes import benchmark
    from vlv.common.files import write_json

    runtimes = [args.memory_of] if args.memory_of else args.runtimes
    config = benchmark.BenchConfig(
        args.ckpt, args.artifacts, tuple(runtimes), tuple(args.batches), args.repeats, args.precision
    )
    checkpoint = arguments.open_checkpoint(args.ckpt)
    if args.memory_of:
        print(benchmark.peak_bytes(config, checkpoint))
        return 0
    result = {"command": command_line("export.bench"), **benchmark.measure(config, checkpoint)}
    write_json(args.out, result)
    benchmark.plot(result["runs"], args.out.with_suffix(".png"))
    print(benchmark.table(result["runs"]))
    for name, reason in result["missing"].items():
        say(f"{name} not timed: {reason}")
    return 1 if any(row["wrong"] for row in result["runs"]) else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(run, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
