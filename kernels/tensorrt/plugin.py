"""Kernels in the form of TensorRT's ahead-of-time plugins: PTX, launch parameters, and only pointers to pass.

    kernels, results = plugin_kernels(lambda: window_attention_op._init_fn(qkv, bias, heads, window), [qkv, bias], 90)

TensorRT's engine then needs neither Python nor Triton. Shapes are static: every size, stride and scale is compiled in,
so a kernel's only parameters are its inputs and then its outputs, which is TensorRT's own order. An operation of two
kernels (channel attention, GroupNorm) is two plugins, and the tensor between them is one of the engine's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.aot.compile import compile_launch, signature
from kernels.aot.load import SCRATCH
from kernels.runtime import tuning
from kernels.runtime.launch import recording
from kernels.runtime.spec import Launch


@dataclass(frozen=True)
class PluginKernel:
    """What a plugin's `aot_impl` returns, without extra scalars.

    `inputs` and `outputs` are numbers of values: the operation's inputs come first, then every kernel's outputs.
    """

    kernel: str  # "window_attention.forward"
    name: str  # the entry in the PTX
    ptx: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    written: tuple[Tensor, ...]  # meta tensors like the outputs
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    registers: int
    spills: int


def plugin_kernels(
    call: Callable[[], Tensor | tuple[Tensor, ...]], inputs: list[Tensor], sm: int, ptx_version: int | None = None
) -> tuple[list[PluginKernel], tuple[int, ...]]:
    """Return the kernels that `call` launches for compute capability `sm`, and the numbers of the values it returns.

    call: runs the operation's launcher on `inputs`, meta tensors of the engine's shapes, such as
    `lambda: window_attention_op._init_fn(qkv, bias, 8, 12)`. ptx_version: at most what TensorRT's CUDA takes (86 is
    8.6). Raises ValueError where a kernel's parameters cannot be a plugin's.
    """
    with tuning.forced(f"sm{sm}"), recording() as record:
        results = call()
    values = {_memory(x): number for number, x in enumerate(inputs)}
    kernels = [_kernel(start, values, sm, ptx_version) for start in record]
    results = results if isinstance(results, tuple) else (results,)
    return kernels, tuple(values[_memory(x)] for x in results)


def _memory(x: Tensor) -> int:
    """Return an identity of a meta tensor's memory; views share it."""
    return x.untyped_storage()._cdata


def _kernel(start: Launch, values: dict[int, int], sm: int, ptx_version: int | None) -> PluginKernel:
    pointers = {name: start.args[name] for name in signature(start) if isinstance(start.args[name], Tensor)}
    inputs, outputs = [], {}
    for name, x in pointers.items():
        number = values.get(_memory(x))
        if x.storage_offset() or (number is not None and outputs):
            raise ValueError(f"{start.kernel}: {name} is no whole tensor, or an input that follows an output")
        if number is None:
            number = values[_memory(x)] = len(values)
            outputs[number] = x
        else:
            inputs.append(number)
    scalars = {name: value for name, value in start.args.items() if name not in pointers}
    options = start.options | ({"ptx_version": ptx_version} if ptx_version else {})
    fixed = replace(start, args=pointers, constants={**start.constants, **scalars}, options=options)
    built = compile_launch(fixed, sm)
    return PluginKernel(
        kernel=start.kernel,
        name=built.symbol,
        ptx=without_scratch(built.ptx, built.symbol),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        written=tuple(outputs.values()),
        grid=start.blocks(),
        block=(built.warps * 32, 1, 1),
        shared=built.shared,
        registers=built.registers,
        spills=built.spills,
    )


def without_scratch(ptx: str, symbol: str) -> str:
    """Return the PTX without the two pointers to scratch memory that Triton appends, which TensorRT does not pass.

    Raises ValueError where the kernel reads one of them.
    """
    head, parameters, body = re.split(r"(\.entry [^(]+\([^)]*\))", ptx, maxsplit=1)
    declared = re.findall(rf"[^,(]*\b({re.escape(symbol)}_param_\d+)\b[^,)]*", parameters)
    for name in declared[-SCRATCH:]:
        if re.search(rf"\b{name}\b", body):
            raise ValueError(f"{symbol} uses scratch memory, which a TensorRT plugin does not have")
        parameters = re.sub(rf",\s*[^,(]*\b{name}\b", "", parameters)
    return head + parameters + body
