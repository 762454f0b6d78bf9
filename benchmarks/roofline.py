"""Measure how far each operation of the encoder is below the roofline of this machine: python -m benchmarks.roofline

The published sizes, one image, float32, on a CPU (benchmarks.gpu.kernels measures on a GPU): the plain references of
the fused operations, which the encoder calls on a CPU, and the matrix products between them. The roofline is the speed
of a large matrix product, and the bandwidth of a copy times the operations per byte that has to be moved. Each
operation is compared with float64 before it is timed, in turns with the roofline itself. The best of several calls
counts, because other work on the machine only adds; the shares of the roofline are reported. Writes
benchmarks/roofline.json for benchmarks.report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import machine
from benchmarks.encoder_cpu import seconds
from benchmarks.gpu.kernel_cases import Case, cases

OURS = ("window_attention", "channel_attention", "dwconv_norm", "attention", "upsample_normalize")
SUMS = 64  # float32 roundings that the worst sum of these operations may add up, relative to the largest result


def products(toy: bool) -> list[Case]:
    """Return the matrix products of a DaViT block's MLP, one for each stage."""
    found = []
    for side, c in [(5, 32)] if toy else [(192, 256), (96, 512), (48, 1024), (24, 2048)]:
        x, weight, bias = torch.randn(1, side * side, c), torch.randn(4 * c, c) * c**-0.5, torch.randn(4 * c)
        moved = 4 * (x.numel() * 5 + weight.numel() + bias.numel())
        flops = 2 * x.numel() * 4 * c
        found.append(
            Case(f"linear {side * side}x{c} to {4 * c}", "linear", linear, linear, [x, weight, bias], 1, flops, moved)
        )
    return found


def roof(toy: bool) -> tuple[Callable[[], object], int, Callable[[], object], int]:
    """Return a large matrix product and its operations, a large copy and the bytes that it reads and writes."""
    side, size = (256, 1 << 20) if toy else (3072, 1 << 28)
    x, y = torch.randn(side, side), torch.randn(side, side)
    a = torch.zeros(size, dtype=torch.uint8)
    b = torch.zeros_like(a)
    return lambda: x @ y, 2 * side**3, lambda: b.copy_(a), 2 * size


def error(case: Case) -> float:
    """Return the largest difference from float64, relative to the largest value."""
    exact = _vector(case.reference(*(x.double() if x.is_floating_point() else x for x in case.inputs)))
    return ((_vector(case.reference(*case.inputs)).double() - exact).abs().max() / exact.abs().max()).item()


def _vector(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    results = result if isinstance(result, tuple) else (result,)
    return torch.cat([x.flatten() for x in results])


def measure(todo: list[Case], repeats: int, toy: bool) -> dict:
    """Return the roofline, and one entry for each operation. Raises ArithmeticError where one is wrong."""
    errors = {case.name: error(case) for case in todo}
    for name, value in errors.items():
        if not value <= SUMS * torch.finfo(torch.float32).eps:
            raise ArithmeticError(f"{name}: {value:.1e} from float64, and float32 explains {SUMS} roundings")
    product, flops, copy, moved = roof(toy)
    calls = {"product": product, "copy": copy}
    calls |= {case.name: lambda case=case: case.reference(*case.inputs) for case in todo}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):  # in turns, so that whatever else the machine does meets all alike
        for name, call in calls.items():
            best[name] = min(best[name], seconds(call))
    entries = [
        {
            "name": case.name, "operation": case.operation, "flops": case.flops, "bytes": case.moved,
            "seconds": best[case.name], "error": errors[case.name],
        }
        for case in todo
    ]  # fmt: skip
    return {"flops_per_s": flops / best["product"], "bytes_per_s": moved / best["copy"], "operations": entries}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("--repeats", type=int, default=7, help="timed calls of each (7)")
    p.add_argument("--toy", action="store_true", help="small sizes, to see that it runs")
    p.add_argument("-o", "--out", type=Path, default=Path("benchmarks/roofline.json"), metavar="JSON")
    args = p.parse_args(argv)
    about = machine.describe()
    with torch.inference_mode():
        fused = [
            case
            for case in cases("cpu", torch.float32, 1, args.toy)
            if case.operation in OURS and "residual" not in case.name
        ]
        # the attention over 4096 positions is the UNet's
        todo = [case for case in fused if "4096" not in case.name] + products(args.toy)
        found = measure(todo, args.repeats, args.toy)
    report = {"command": "python -m benchmarks.roofline", "machine": about, "dtype": "float32", **found}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for entry in found["operations"]:
        share = entry["flops"] / entry["seconds"] / found["flops_per_s"]
        print(f"{entry['name']}: {share:.2g} of the product's speed, error {entry['error']:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
