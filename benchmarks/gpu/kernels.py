"""Everything about the fused kernels that needs a GPU, in one call.

    python -m benchmarks.gpu.kernels                  # checks, then times; writes benchmarks/gpu/kernels.json
    python -m benchmarks.gpu.kernels --tune           # first measures every configuration into kernels/tuned.json
    python -m benchmarks.gpu.kernels --dry-run        # the same code at toy sizes in Triton's interpreter, on a CPU

Every operation, the whole encoder and a UNet step are first held against PyTorch's float32 on the same inputs: the
RMS error may be at most twice that of the plain operations in the same dtype. What is wrong is not timed. Rivals:
eager PyTorch (its attention is SDPA with its best backend), torch.compile(mode="max-autotune"), and xformers where
it is installed. Each figure stands beside its target and its ceiling: the bytes or operations that it cannot do
without, at the bandwidth of a copy and the speed of a large matrix product on this very GPU. Exit code 1 where there
is no GPU, or where a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

OUT = Path("benchmarks/gpu/kernels.json")


def judge(found: Tensor, plain: Tensor, exact: Tensor) -> dict[str, float | bool]:
    """RMS errors relative to the exact result, and whether ours is in order."""
    scale = exact.float().square().mean().sqrt().item() or 1.0
    ours, theirs = ((x.float() - exact.float()).square().mean().sqrt().item() / scale for x in (found, plain))
    # where plain float32 is the exact result itself, ours may differ by the order of its sums
    return {"rms": ours, "rms_of_plain": theirs, "correct": ours <= 2 * theirs + 2**-20}


def check(case, pictures: int = 2) -> dict[str, float | bool]:
    """The first pictures of a full batch, against the float32 reference of those alone."""
    few = [x[:pictures] if i < case.batched else x for i, x in enumerate(case.inputs)]
    exact = joined(case.reference(*(x.float() if x.is_floating_point() else x for x in few)), pictures)
    return judge(joined(case.ours(*case.inputs), pictures), joined(case.reference(*few), pictures), exact)


def joined(result: Tensor | tuple[Tensor, ...], pictures: int) -> Tensor:
    """The first pictures of every result, as one vector."""
    results = result if isinstance(result, tuple) else (result,)
    return torch.cat([x[:pictures].float().flatten() for x in results])


class Clock:
    """Median milliseconds of a call, with nothing of it left in the cache by the call before."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.flush = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":  # a dry run: one call, of whose time nothing follows
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        for _ in range(3):
            call()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in marks:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) for start, end in marks)
        return times[len(times) // 2]


def ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a matrix product, on this device."""
    n = 2**30 if clock.device == "cuda" else 2**10
    a = torch.empty(n, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    size = 8192 if clock.device == "cuda" else 16
    x = torch.randn(size, size, device=clock.device).to(dtype)
    return {
        "bytes_per_s": 2 * n / clock(lambda: b.copy_(a)) * 1e3,
        "flops_per_s": 2 * size**3 / clock(lambda: x @ x) * 1e3,
    }


def eager_and_compiled(
    clock: Clock, names: tuple[str, str], call: Callable, run: Callable[[Callable], object]
) -> dict[str, float]:
    """Milliseconds of `run` on the call as it is, and compiled; in a dry run nothing is compiled, nor run again."""
    eager = clock(lambda: run(call))
    if clock.device == "cpu":
        return dict.fromkeys(names, eager)
    torch._dynamo.reset()
    fast = torch.compile(call, mode="max-autotune")
    return dict(zip(names, (eager, clock(lambda: run(fast))), strict=True))


OURS, THEIRS = ("ours eager", "ours compiled"), ("eager", "compile")


def compare(case, clock: Clock, limits: dict[str, float]) -> dict:
    """Correctness; then times, the ceiling and the targets, if correct."""
    result: dict = {"name": case.name, **check(case)}
    if not result["correct"]:
        return result
    least = max(case.moved / limits["bytes_per_s"], case.flops / limits["flops_per_s"]) * 1e3
    times = eager_and_compiled(clock, OURS, case.ours, lambda call: call(*case.inputs))
    times |= eager_and_compiled(clock, THEIRS, case.reference, lambda call: call(*case.inputs))
    if case.operation == "attention" and clock.device == "cuda" and find_spec("xformers") and "causal" not in case.name:
        from xformers.ops import memory_efficient_attention

        q, k, v = (x.transpose(1, 2) for x in case.inputs)
        times["xformers"] = clock(lambda: memory_efficient_attention(q, k, v))
    result = summary(result, times, least, case.speedup)
    of_copy = case.moved / result["milliseconds"]["ours"] * 1e3 / limits["bytes_per_s"]
    return result | {"of_copy": of_copy, "bandwidth_target": case.bandwidth}


def summary(result: dict, times: dict[str, float], least: float, target: float) -> dict:
    """The best of ours against the best rival, and the least time that the work could take."""
    ours = min(value for name, value in times.items() if name.startswith("ours"))
    best = min(value for name, value in times.items() if not name.startswith("ours"))
    return result | {
        "milliseconds": {"ours": ours, **times}, "speedup": best / ours, "speedup_target": target,
        "of_ceiling": least / ours,
    }  # fmt: skip


def line(result: dict, figures: bool) -> str:
    errors = f"error {result['rms']:.1e} (plain {result['rms_of_plain']:.1e})"
    if "speedup" not in result:
        return f"{result['name']}: WRONG, {errors}"
    if not figures:
        return f"{result['name']}: runs; {errors}"
    wanted = f", {result['ceiling_target']:.0%} of the ceiling" if result.get("ceiling_target") else ""
    wanted += f" and {result['bandwidth_target']:.0%} of copying" if result.get("bandwidth_target") else ""
    copy = f", {result['of_copy']:.0%} of copying" if "of_copy" in result else ""
    return (
        f"{result['name']}: {result['milliseconds']['ours']:.3f} ms, {result['speedup']:.2f}x the best rival{copy}, "
        f"{result['of_ceiling']:.0%} of the ceiling; target {result['speedup_target']}x{wanted}; {errors}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.kernels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="toy sizes in the interpreter, on the CPU; no figures")
    parser.add_argument("--tune", action="store_true", help="measure configurations for this GPU first")
    parser.add_argument("--batch", type=int, default=32, help="pictures (32)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each (30)")
    parser.add_argument("--only", default="", help="only what has this word in its name")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures ({OUT})")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device here; --dry-run checks this script on a CPU", file=sys.stderr)
        return 1
    if args.dry_run:
        os.environ["VLV_KERNELS"] = "interpret"  # before the kernels are imported
    from benchmarks import machine
    from benchmarks.gpu import kernel_cases, kernel_models, kernel_tuning

    device, batch = ("cpu", 2) if args.dry_run else ("cuda", args.batch)
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    clock = Clock(device, args.repeats)
    limits = ceilings(clock, dtype)
    report = {
        "machine": machine.describe(), "device": "dry run" if args.dry_run else torch.cuda.get_device_name(),
        "dtype": str(dtype), "batch": batch, "ceilings": limits, "results": [],
    }  # fmt: skip
    todo: list[Callable[[], dict]] = []
    with torch.inference_mode():
        cases = kernel_cases.cases(device, dtype, batch, toy=args.dry_run)
        cases = [case for case in cases if args.only in case.name]
        if args.tune:
            kernel_tuning.tune(cases, clock)
        todo += [lambda case=case: compare(case, clock, limits) for case in cases]
        todo += kernel_models.models(clock, limits, dtype, batch, toy=args.dry_run, only=args.only)
        for step in todo:
            report["results"].append(step())
            print(line(report["results"][-1], figures=not args.dry_run), flush=True)
            if not args.dry_run or args.out != OUT:
                args.out.write_text(json.dumps(report, indent=1) + "\n")
        if args.tune:
            kernel_tuning.note_faster_references(report["results"])
    return 0 if all(result["correct"] for result in report["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
