"""Let images gather before vLLM's scheduler admits them, so that the encoder in the engine runs in full batches.

vLLM admits a request as soon as another one ends, and runs the encoder for it in that step: for one or two images at a
time, which costs the GPU almost as much as eight (50 and 43 ms on an H200, benchmarks/gpu/h200.json).
"""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

BATCH = 32  # images that the encoder takes at once
PATIENCE = 16  # steps that an image waits for others at most


class BatchScheduler(Scheduler):
    """Admit waiting requests BATCH at a time; fewer once PATIENCE steps have passed, or if nothing else runs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # requests that may run; vLLM up to 0.31 has one number for this and for the slots of the model
        self._name = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"
        self._slots = getattr(self, self._name)
        self._steps = 0  # since there are requests that could be admitted

    def schedule(self, *args, **kwargs):
        """Schedule one step as vLLM does, with or without the requests that wait."""
        ready = min(len(self.waiting), self._slots - len(self.running))
        self._steps = self._steps + 1 if ready > 0 else 0
        hold = bool(self.running) and ready < min(BATCH, self._slots) and self._steps < PATIENCE
        setattr(self, self._name, len(self.running) if hold else self._slots)
        if not hold:
            self._steps = 0
        return super().schedule(*args, **kwargs)


class AsyncBatchScheduler(BatchScheduler, AsyncScheduler):
    """The same where vLLM schedules a step while the one before is computed."""
