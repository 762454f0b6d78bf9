"""vLLM's model inside its engine process, for CPUs with few cores.

Between two processes vLLM's engine waits for its worker in a busy loop, which costs a core: of two, half the machine.
"""

from __future__ import annotations

import os

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class SharedCoresExecutor(UniProcExecutor):
    """One process that computes with half of the cores; our decoding and encoding have the others."""

    def _init_executor(self) -> None:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores - cores // 2)
        super()._init_executor()
