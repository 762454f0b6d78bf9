"""Kernels in TensorRT's form: only pointers left, scratch parameters gone, and PTX that still assembles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernels.channel_attention import channel_attention_op
from kernels.geglu import geglu_op
from kernels.plugin import plugin_kernel, without_scratch
from kernels.window_attention import window_attention_op

triton = pytest.importorskip("triton", reason="building needs Triton: pip install triton")


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    "call, pointers, grid",
    [
        (lambda: geglu_op._init_fn(empty(3, 7, 90)), ("x", "out"), (21, 1, 1)),
        (lambda: window_attention_op._init_fn(empty(2, 8, 6, 48), empty(48), 1, 4), ("qkv", "bias", "out"), (4, 1, 2)),
    ],
)
def test_only_pointers_are_left(call, pointers, grid, tmp_path):
    kernel = plugin_kernel(call, 80, ptx_version=80)
    assert (kernel.pointers, kernel.grid, kernel.spills) == (pointers, grid, 0)
    assert ".version 8.0" in kernel.ptx and ".target sm_80" in kernel.ptx
    parameters = re.search(rf"\.entry {kernel.name}\(([^)]*)\)", kernel.ptx)[1]
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * len(pointers)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (tmp_path / "kernel.ptx").write_text(kernel.ptx)
    command = [assembler, "--gpu-name=sm_80", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operations_of_several_kernels_are_refused():
    with pytest.raises(ValueError, match=r"channel_attention\.gram.*channel_attention\.apply"):
        plugin_kernel(lambda: channel_attention_op._init_fn(empty(1, 9, 48), 1), 80)


def test_used_scratch_memory_is_refused():
    parameters = ",".join(f"\n.param .u64 k_param_{i}" for i in range(3))
    ptx = f".visible .entry k({parameters}\n)\n{{ld [k_param_2];}}"
    with pytest.raises(ValueError, match="scratch memory"):
        without_scratch(ptx, "k")
