"""vLLM's model inside its engine process, for CPUs with few cores.

Between two processes vLLM's engine waits for its worker in a busy loop, which costs a core: of two, half the machine.
"""

from __future__ import annotations

import os
import tempfile

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class SharedCoresExecutor(UniProcExecutor):
    """One process, or a thread of ours, that computes with half of the cores; decoding and encoding have the others."""

    def _init_executor(self) -> None:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores - cores // 2)
        before = tempfile.tempdir
        # for the file by which its processes meet; removed with the engine
        tempfile.tempdir = os.environ["VLLM_RPC_BASE_PATH"]
        try:
            super()._init_executor()
        finally:
            tempfile.tempdir = before
