"""What keeps one bad batch from ruining a run: steps that are not finite, or that stand out, are left out."""

from __future__ import annotations

import math
from statistics import median

WINDOW = 128  # recent gradient norms
PATIENCE = 10  # steps left out in a row


class AnomalyDetector:
    """Judges each step by its loss and gradient norm, which all processes see alike. Its state is plain JSON."""

    def __init__(self, spike: float, norms: list[float] = (), skipped: int = 0, in_a_row: int = 0):
        self.spike, self.norms, self.skipped, self.in_a_row = spike, list(norms), skipped, in_a_row

    def reason_to_skip(self, step: int, loss: float, norm: float) -> str | None:
        """Why the step must not change the weights; None if it may. Raises FloatingPointError after PATIENCE."""
        usual = median(self.norms) if len(self.norms) >= WINDOW // 4 else None
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient's norm is {norm}"
        elif self.spike and usual is not None and norm > self.spike * usual:
            reason = f"the gradient's norm {norm:.3g} is over {self.spike:g} times the recent median {usual:.3g}"
        if reason is None:
            self.norms = [*self.norms[1 - WINDOW :], norm]
            self.in_a_row = 0
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were left out, the last at step {step} because {reason}: "
                "look at the data there, or go on from the last save with a lower --lr"
            )
        return reason

    def state(self) -> dict:
        return {"norms": self.norms, "skipped": self.skipped, "in_a_row": self.in_a_row}
