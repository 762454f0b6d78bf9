"""Kernels in TensorRT's form: only pointers left, scratch parameters gone, and PTX that still assembles."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernels.channel_attention import channel_attention_op
from kernels.cross_attention import cross_attention_op
from kernels.tensorrt.plugin import plugin_kernels, without_scratch
from kernels.window_attention import window_attention_op

triton = pytest.importorskip("triton", reason="building needs Triton: pip install triton")


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def kernels_of(op, inputs: list[torch.Tensor], *numbers: int):
    return plugin_kernels(lambda: op._init_fn(*inputs, *numbers), inputs, 80, ptx_version=80)


@pytest.mark.parametrize(
    "op, inputs, numbers, grid",
    [
        (cross_attention_op, [empty(2, 70, 3, 16), empty(2, 7, 3, 16), empty(2, 7, 3, 16)], (), (2, 3, 2)),
        (window_attention_op, [empty(2, 8, 6, 48), empty(48)], (1, 4), (4, 1, 2)),
    ],
)
def test_only_pointers_are_left(op, inputs, numbers, grid, tmp_path):
    (kernel,), results = kernels_of(op, inputs, *numbers)
    assert (kernel.inputs, kernel.outputs, results) == (tuple(range(len(inputs))), (len(inputs),), (len(inputs),))
    assert (kernel.grid, kernel.spills) == (grid, 0)
    assert ".version 8.0" in kernel.ptx and ".target sm_80" in kernel.ptx
    parameters = re.search(rf"\.entry {kernel.name}\(([^)]*)\)", kernel.ptx)[1]
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * (len(inputs) + 1)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (tmp_path / "kernel.ptx").write_text(kernel.ptx)
    command = [assembler, "--gpu-name=sm_80", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_kernels_share_what_lies_between():
    """Channel attention: sums of products of the projections with themselves, then those and the projections."""
    (gram, apply), results = kernels_of(channel_attention_op, [empty(1, 9, 48)], 1)
    assert (gram.kernel, gram.inputs, gram.outputs) == ("channel_attention.gram", (0, 0), (1,))
    assert (apply.inputs, apply.outputs, results) == ((0, 1), (2,), (2,))
    assert gram.written[0].dtype == torch.float32 and gram.written[0].shape == (1, 1, 1, 16, 16)


def test_views_are_refused():
    x = empty(2, 7, 3, 16)
    with pytest.raises(ValueError, match="no whole tensor"):
        plugin_kernels(lambda: cross_attention_op._init_fn(x[1:], x, x), [x], 80)


def test_used_scratch_memory_is_refused():
    parameters = ",".join(f"\n.param .u64 k_param_{i}" for i in range(3))
    ptx = f".visible .entry k({parameters}\n)\n{{ld [k_param_2];}}"
    with pytest.raises(ValueError, match="scratch memory"):
        without_scratch(ptx, "k")
