"""The steps of benchmarks.gpu.kernels in the order of their worth, within a budget of seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu.kernel_cases import Case, cases
from benchmarks.gpu.kernel_measure import Budget, Clock, Report, ceilings, check, compare, line
from benchmarks.gpu.kernel_models import EncoderBench, unet
from benchmarks.gpu.kernel_tuning import reference_lists, tune, write_entry

FIRST = ("window_attention", "dwconv_norm", "linear")  # the operations whose designs are measured first
# seconds that a step needs, about; measured steps of one call each need none
COMPILE, COMPILE_OPERATION, UNET = 90.0, 8.0, 60.0


@dataclass
class Contest:
    """One run of benchmarks.gpu.kernels."""

    device: str
    batch: int
    repeats: int
    budget: float
    tune: bool
    only: str
    out: Path | None

    def run(self) -> bool:
        """Run all steps that the budget allows; return False if a result is wrong."""
        self.toy = self.device == "cpu"
        self.time = Budget(self.budget)
        self.dtype = torch.float32 if self.toy else torch.bfloat16
        self.clock = Clock(self.device, self.repeats)
        self.limits = ceilings(self.clock, self.dtype)
        self.report = Report(
            self.out,
            {
                "machine": machine.describe(),
                "device": "dry run" if self.toy else torch.cuda.get_device_name(),
                "command": " ".join(["python -m benchmarks.gpu.kernels", *sys.argv[1:]]),
                "dtype": str(self.dtype),
                "batch": self.batch,
                "ceilings": self.limits,
                "results": [],
            },
        )
        with torch.inference_mode():
            self.cases = [c for c in cases(self.device, self.dtype, self.batch, self.toy) if self.only in c.name]
            steps = [self._check_operations]
            encoder = EncoderBench(self) if self.only in "encoder" else None
            if encoder:
                steps += [encoder.check, encoder.eager]
            if self.tune:
                steps.append(lambda: self._tune(lambda case: case.operation in FIRST))
            if encoder:
                steps += [encoder.tuned] if self.tune else []
                steps += [
                    encoder.graphs,
                    encoder.fp8,
                    encoder.batches,
                    encoder.profile,
                    encoder.theirs,
                    encoder.compiled,
                ]
            if self.tune:
                steps.append(lambda: self._tune(lambda case: case.operation not in FIRST))
            steps += [self._unet, self._compare_operations]
            if encoder:
                steps.append(encoder.result)
            outcomes = [step() for step in steps]  # a step returns False where a result is wrong
        return False not in outcomes

    def _check_operations(self) -> bool:
        """Compare every operation with float32, before anything is timed."""
        correct = True
        for case in self.cases:
            if not self.time.allows(1, f"the check of {case.name}"):
                return correct
            result = self.report.add("checks", {"name": case.name, **check(case)})
            correct &= result["correct"]
            if not result["correct"]:
                print(line(result, figures=False), flush=True)
        return correct

    def _tune(self, chosen: Callable[[Case], bool]) -> None:
        """Measure the configurations of the chosen cases; the best of each class of shapes goes into tuned.json."""
        best = tune([case for case in self.cases if chosen(case)], self.clock, self.time, self.report)
        if not self.toy and best:
            write_entry({"label": "measured", "kernels": best})

    def _compare_operations(self) -> bool:
        """Time every operation against eager and compiled PyTorch; list in tuned.json where PyTorch is faster."""
        correct = True
        for case in self.cases:
            if not self.time.allows(0 if self.toy else COMPILE_OPERATION, f"{case.name} against its rivals"):
                break
            result = self.report.add("results", compare(case, self.clock, self.limits))
            correct &= result["correct"]
            print(line(result, figures=not self.toy), flush=True)
        if self.tune and not self.toy:
            write_entry({"reference": reference_lists(self.cases, self.report.content["results"])})
        return correct

    def _unet(self) -> bool:
        if self.only not in "unet" or not self.time.allows(0 if self.toy else UNET, "a UNet step"):
            return True
        result = unet(self.clock, self.limits, self.dtype, 1 if self.toy else 4, self.toy)
        if not result:
            return True
        print(line(self.report.add("results", result), figures=not self.toy), flush=True)
        return result["correct"]
