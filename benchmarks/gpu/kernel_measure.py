"""Check, time and record: what every step of benchmarks.gpu.kernels shares."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.kernel_cases import Case

OURS, THEIRS = ("ours eager", "ours compiled"), ("eager", "compile")


@dataclass
class Budget:
    """The seconds that a run may take; a step that needs more than what is left is skipped."""

    seconds: float = float("inf")
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def allows(self, needs: float, what: str) -> bool:
        """Return True if `needs` seconds are left; else say on stderr what is skipped."""
        if self.left() >= needs:
            return True
        print(f"skipped {what}: it needs {needs:g} s, {self.left():.0f} s are left", file=sys.stderr)
        return False


@dataclass
class Report:
    """The figures of a run, written after each of them."""

    file: Path | None
    content: dict

    def add(self, part: str, figure: dict) -> dict:
        """Append a figure to a list of the report and write the file."""
        self.content.setdefault(part, []).append(figure)
        return self.write(figure)

    def write(self, figure: dict | None = None) -> dict:
        """Write the file atomically; return the figure."""
        if self.file:
            temporary = self.file.with_suffix(".part")
            temporary.write_text(json.dumps(self.content, indent=1) + "\n")
            temporary.replace(self.file)
        return figure or {}


class Clock:
    """Measure the median milliseconds of a call, with nothing of it left in the cache by the call before."""

    def __init__(self, device: str, repeats: int):
        self.device = device
        self.repeats = repeats
        self.flush = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":  # a dry run: one call, whose time is no figure
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
    """Return the bytes/s of a copy (read and written) and the operations/s of a matrix product on this device."""
    n = 2**30 if clock.device == "cuda" else 2**10
    a = torch.empty(n, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    size = 8192 if clock.device == "cuda" else 16
    x = torch.randn(size, size, device=clock.device).to(dtype)
    return {
        "bytes_per_s": 2 * n / clock(lambda: b.copy_(a)) * 1e3,
        "flops_per_s": 2 * size**3 / clock(lambda: x @ x) * 1e3,
    }


def judge(found: Tensor, plain: Tensor, exact: Tensor, tolerance: float = 0.0) -> dict[str, float | bool]:
    """Return the RMS errors relative to the exact result, and if ours is at most twice that of plain operations.

    Within `tolerance`, ours is correct too: 8-bit floats are further off by their nature.
    """
    scale = exact.float().square().mean().sqrt().item() or 1.0
    ours, theirs = ((x.float() - exact.float()).square().mean().sqrt().item() / scale for x in (found, plain))
    # where plain float32 is the exact result itself, ours may differ by the order of its sums
    return {"rms": ours, "rms_of_plain": theirs, "correct": ours <= max(2 * theirs + 2**-20, tolerance)}


def check(case: Case, images: int = 2) -> dict[str, float | bool]:
    """Compare the first images of a full batch with the float32 reference of those alone."""
    few = [x[:images] if i < case.batched else x for i, x in enumerate(case.inputs)]
    exact = _joined(case.reference(*(x.float() if x.is_floating_point() else x for x in few)), images)
    found, plain = _joined(case.ours(*case.inputs), images), _joined(case.reference(*few), images)
    return judge(found, plain, exact, case.tolerance)


def _joined(result: Tensor | tuple[Tensor, ...], images: int) -> Tensor:
    """Return the first images of every result as one vector."""
    results = result if isinstance(result, tuple) else (result,)
    return torch.cat([x[:images].float().flatten() for x in results])


def eager_and_compiled(
    clock: Clock, names: tuple[str, str], call: Callable, run: Callable[[Callable], object]
) -> dict[str, float]:
    """Return the milliseconds of `run` on the call as it is, and compiled; a dry run compiles nothing."""
    eager = clock(lambda: run(call))
    if clock.device == "cpu":
        return dict.fromkeys(names, eager)
    torch._dynamo.reset()
    fast = torch.compile(call, mode="max-autotune-no-cudagraphs")
    return dict(zip(names, (eager, clock(lambda: run(fast))), strict=True))


def summary(result: dict, times: dict[str, float], floor: float, target: float) -> dict:
    """Return the best of ours against the best rival, and the share of the `floor`, the least possible milliseconds."""
    ours = min(value for name, value in times.items() if name.startswith("ours"))
    best = min(value for name, value in times.items() if not name.startswith("ours"))
    return result | {
        "milliseconds": {"ours": ours, **times},
        "speedup": best / ours,
        "speedup_target": target,
        "of_ceiling": floor / ours,
    }


def compare(case: Case, clock: Clock, limits: dict[str, float]) -> dict:
    """Check the case; if correct, return times, ceiling and targets."""
    result: dict = {"name": case.name, **check(case)}
    if not result["correct"]:
        return result
    floor = max(case.moved / limits["bytes_per_s"], case.flops / limits["flops_per_s"]) * 1e3
    times = eager_and_compiled(clock, OURS, case.ours, lambda call: call(*case.inputs))
    times |= eager_and_compiled(clock, THEIRS, case.reference, lambda call: call(*case.inputs))
    result = summary(result, times, floor, case.speedup)
    of_copy = case.moved / result["milliseconds"]["ours"] * 1e3 / limits["bytes_per_s"]
    return result | {"of_copy": of_copy, "bandwidth_target": case.bandwidth}


def line(result: dict, figures: bool) -> str:
    """Return a result as one line of text; without figures in a dry run."""
    errors = f"error {result['rms']:.1e} (plain {result['rms_of_plain']:.1e})"
    if not result["correct"]:
        return f"{result['name']}: WRONG, {errors}"
    if not figures or "speedup" not in result:
        return f"{result['name']}: runs; {errors}"
    wanted = f", {result['ceiling_target']:.0%} of the ceiling" if result.get("ceiling_target") else ""
    wanted += f" and {result['bandwidth_target']:.0%} of copying" if result.get("bandwidth_target") else ""
    copy = f", {result['of_copy']:.0%} of copying" if "of_copy" in result else ""
    return (
        f"{result['name']}: {result['milliseconds']['ours']:.3f} ms, {result['speedup']:.2f}x the best rival{copy}, "
        f"{result['of_ceiling']:.0%} of the ceiling; target {result['speedup_target']}x{wanted}; {errors}"
    )
