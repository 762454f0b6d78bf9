"""Measure the configurations of the kernels on this GPU, for kernels/tuned.json."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.gpu.kernel_cases import Case
from benchmarks.gpu.kernel_measure import Budget, Clock, Report, check
from kernels.runtime import tuning
from kernels.runtime.launch import recording


def tune(todo: list[Case], clock: Clock, budget: Budget, report: Report) -> dict[str, dict[str, dict]]:
    """Return, by kernel and class of shapes, the configuration with the least time over the encoder's or UNet's calls.

    The other kernels of an operation run in the configuration that is their best so far. Only correct results count.
    """
    classes: dict[tuple[str, str], list[Case]] = {}
    for case in todo:
        for name, shape in _classes(case):
            group = classes.setdefault((name, shape), [])
            if case not in group:
                group.append(case)
    best: dict[str, dict[str, dict]] = {}
    for (kernel, shape), group in classes.items():
        times = []
        for candidate in tuning.candidates(kernel, shape):
            if not budget.allows(3 if clock.device == "cuda" else 0, f"{kernel} {shape} {candidate}"):
                break
            milliseconds = _measure(kernel, candidate, group, clock, report)
            if milliseconds is not None:
                times.append((milliseconds, candidate))
        if times:
            milliseconds, candidate = min(times, key=lambda one: one[0])
            best.setdefault(kernel, {})[shape] = {"config": candidate, "milliseconds": milliseconds}
            print(f"tuned {kernel} {shape}: {candidate}, {milliseconds:.3f} ms a pass", flush=True)
    return best


def _classes(case: Case) -> list[tuple[str, str]]:
    """Return the (kernel, class of shapes) that a case runs."""
    if case.tunes:
        return [case.tunes]
    with recording() as record:
        case.ours(*case.inputs)
    return [(start.kernel, start.shape) for start in record]


def _measure(kernel: str, candidate: dict[str, int], group: list[Case], clock: Clock, report: Report) -> float | None:
    """Return the milliseconds of a configuration in all calls of the group's cases; None if it is wrong or fails."""
    total = 0.0
    with tuning.forced(None, **{kernel.replace(".", "__"): candidate}):
        for case in group:
            figure = {"kernel": kernel, "case": case.name, "config": candidate}
            try:
                figure |= check(case)
                if figure["correct"]:
                    figure["milliseconds"] = clock(lambda case=case: case.ours(*case.inputs))
            except Exception as error:  # a configuration too large for this GPU, or one that does not compile
                figure |= {"correct": False, "error": f"{type(error).__name__}: {error}"[:300]}
            report.add("configurations", figure)
            if not figure["correct"]:
                print(f"{kernel} {candidate} on {case.name}: {figure.get('error', 'wrong')}", file=sys.stderr)
                return None
            total += case.calls * figure["milliseconds"]
    return total


def reference_lists(todo: list[Case], results: list[dict]) -> dict[str, dict[str, list[str]]]:
    """Return the classes of shapes, eager and compiled, for which PyTorch was faster than our kernel."""
    lists: dict[str, dict[str, list[str]]] = {"eager": {}, "compiled": {}}
    measured = {result["name"]: result["milliseconds"] for result in results if "milliseconds" in result}
    for case in todo:
        if not case.reference_class or case.name not in measured:
            continue
        times = measured[case.name]
        for mode, rival in (("eager", "eager"), ("compiled", "compile")):
            if times[rival] < times["ours eager"]:
                shapes = lists[mode].setdefault(case.operation, [])
                if case.reference_class not in shapes:
                    shapes.append(case.reference_class)
    return lists


def write_entry(values: dict) -> None:
    """Merge values into this GPU's entry of kernels/tuned.json; what was not measured this time stays."""
    table = json.loads(tuning.FILE.read_text())
    entry = table.setdefault(torch.cuda.get_device_name(), {"kernels": {}})
    for kernel, shapes in values.pop("kernels", {}).items():
        entry.setdefault("kernels", {}).setdefault(kernel, {}).update(shapes)
    entry.update(values)
    tuning.FILE.write_text(json.dumps(table, indent=1) + "\n")
    tuning.table.cache_clear()
