"""Measures the configurations of every kernel on this GPU into kernels/tuned.json, for benchmarks.gpu.kernels."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.gpu.kernels import Clock, check
from kernels.runtime import tuning
from kernels.runtime.launch import recording


def tune(cases: list, clock: Clock) -> None:
    """For each kernel of each case the fastest candidate, the others at their best so far; only correct ones count."""
    best: dict[str, dict[str, dict]] = {}
    for case in cases:
        with recording() as record:  # which kernels, and what their configurations go by
            case.ours(*case.inputs)
        for start in record:
            if start.shape in best.setdefault(start.kernel, {}):
                continue
            times = []
            for candidate in tuning.CANDIDATES[start.kernel]:
                with tuning.forced(None, **{start.kernel.replace(".", "__"): candidate}):
                    try:
                        if check(case)["correct"]:
                            times.append((clock(lambda case=case: case.ours(*case.inputs)), candidate))
                    except Exception as error:  # a configuration that this GPU has no room for
                        print(f"{start.kernel} {candidate}: {error}", file=sys.stderr)
            if times:
                milliseconds, candidate = min(times, key=lambda one: one[0])
                best[start.kernel][start.shape] = {"config": candidate, "milliseconds": milliseconds}
                print(f"tuned {start.kernel} {start.shape}: {candidate}, {milliseconds:.3f} ms", flush=True)
    if clock.device == "cuda":
        _write({"label": "measured", "kernels": best})


def note_faster_references(results: list[dict]) -> None:
    """Under "reference" in this GPU's entry: the operations whose plain PyTorch was faster, summed over their cases."""
    if not torch.cuda.is_available():
        return
    slower = [one for one in results if one["name"].startswith("attention") and one.get("speedup", 0) < 1]
    every = [one for one in results if one["name"].startswith("attention")]
    _write({"reference": ["attention"] if 2 * len(slower) > len(every) else []})


def _write(values: dict) -> None:
    table = json.loads(tuning.FILE.read_text())
    name = torch.cuda.get_device_name()
    table[name] = {**table.get(name, {}), **values}
    tuning.FILE.write_text(json.dumps(table, indent=1) + "\n")
    tuning.table.cache_clear()
