"""A kernel as TensorRT's ahead-of-time plugins take it: PTX, launch parameters, and nothing but pointers to pass.

    kernel = plugin_kernel(lambda: window_attention_op._init_fn(qkv, bias, heads, window), sm=90)

TensorRT's engine then needs neither Python nor Triton. Shapes are static: every size, stride and scale is compiled
in, so the kernel's only parameters are its inputs and then its outputs, which is TensorRT's own order. Operations
of several kernels (channel attention, GroupNorm) need memory between them and are no single plugin.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels import tuning
from kernels.aot_loader import SCRATCH
from kernels.compile import compile_launch
from kernels.launch import recording


@dataclass(frozen=True)
class PluginKernel:
    """What a plugin's `aot_impl` returns. There are no extra scalars."""

    name: str  # the entry in the PTX
    ptx: str
    pointers: tuple[str, ...]  # inputs, then outputs
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    registers: int
    spills: int


def plugin_kernel(call: Callable[[], object], sm: int, ptx_version: int | None = None) -> PluginKernel:
    """The one kernel that `call` launches, with meta tensors of the engine's shapes, for compute capability `sm`.

    call: runs the operation's launcher, such as `lambda: window_attention_op._init_fn(qkv, bias, 8, 12)`.
    ptx_version: at most what TensorRT's CUDA takes (86 is 8.6). Raises ValueError for an operation of several kernels.
    """
    with tuning.forced(f"sm{sm}"), recording() as record:
        call()
    if len(record) != 1:
        raise ValueError(f"a plugin is one kernel, and this operation is {[one.kernel for one in record]}")
    (start,) = record
    pointers = {name: value for name, value in start.args.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in start.args.items() if name not in pointers}
    options = start.options | ({"ptx_version": ptx_version} if ptx_version else {})
    fixed = replace(start, args=pointers, constants={**start.constants, **scalars}, options=options)
    built = compile_launch(fixed, sm)
    return PluginKernel(
        built.symbol, without_scratch(built.ptx, built.symbol), tuple(pointers), start.blocks(),
        (built.warps * 32, 1, 1), built.shared, built.registers, built.spills,
    )  # fmt: skip


def without_scratch(ptx: str, symbol: str) -> str:
    """The PTX without the two pointers to scratch memory that Triton appends, which TensorRT would not pass.

    Raises ValueError where the kernel reads one of them.
    """
    head, parameters, body = re.split(r"(\.entry [^(]+\([^)]*\))", ptx, maxsplit=1)
    declared = re.findall(rf"[^,(]*\b({re.escape(symbol)}_param_\d+)\b[^,)]*", parameters)
    for name in declared[-SCRATCH:]:
        if re.search(rf"\b{name}\b", body):
            raise ValueError(f"{symbol} uses scratch memory, which a TensorRT plugin does not have")
        parameters = re.sub(rf",\s*[^,(]*\b{name}\b", "", parameters)
    return head + parameters + body
