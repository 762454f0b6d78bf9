"""vLLM's model inside its engine process, for CPUs with few cores.

Between two processes vLLM's engine waits for its worker in a busy loop, which costs a core: of two, half the machine.
"""

from __future__ import annotations

import ctypes
import os

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

TRIM = 128  # steps after which the heap's free pages go back: activations of ever other sizes leave holes in it


class SharedCoresExecutor(UniProcExecutor):
    """One process that computes with half of the cores; our decoding and encoding have the others."""

    def _init_executor(self) -> None:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores - cores // 2)
        super()._init_executor()
        self._steps, self._libc = 0, ctypes.CDLL(None)

    def execute_model(self, *args, **kwargs):
        self._steps += 1
        if self._steps % TRIM == 0:
            self._libc.malloc_trim(0)
        return super().execute_model(*args, **kwargs)
