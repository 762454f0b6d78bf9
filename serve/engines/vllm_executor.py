"""vLLM's model inside its engine process, for CPUs with few cores.

Between two processes vLLM's engine waits for its worker in a busy loop, which costs a core: of two, half the machine.
"""

from __future__ import annotations

import os
import tempfile

import torch
from vllm import envs
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class SharedCoresExecutor(UniProcExecutor):
    """One process that computes with half of the cores; our decoding and encoding have the others."""

    def _init_executor(self) -> None:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cores - cores // 2)
        tempfile.tempdir = envs.VLLM_RPC_BASE_PATH  # for the file by which its processes meet; removed with the engine
        super()._init_executor()
