"""Starts one kernel: compiled by Triton, or taken from the ahead-of-time builds, or only written down.

A launcher names its kernel ("window_attention.forward" is `forward` in kernels/triton/window_attention.py), a rule
for the grid, the arguments, and the constants that are compiled in. Nothing here imports Triton until a kernel
is to be run by it, so that a node with ahead-of-time builds (VLV_KERNELS_AOT) needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from kernels.runtime import dispatch
from kernels.runtime.tuning import config, next_smaller

ALIGNMENT = 16  # bytes of a pointer, or divisor of a size, that lets a kernel move 16 bytes at once
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int32: "*i32",
}  # fmt: skip
_recorded: list[list[Launch]] = []


@dataclass(frozen=True)
class Launch:
    """One start of one kernel."""

    kernel: str
    shape: str  # the class of shapes that its configuration was tuned for
    grid: tuple[str, ...]  # up to three expressions over `sizes`, the integer arguments and the constants
    args: dict[str, Tensor | int | float]
    constants: dict[str, int | float | bool]
    options: dict[str, int]  # num_warps, num_stages
    sizes: dict[str, int] = field(default_factory=dict)  # what only the grid depends on

    def blocks(self) -> tuple[int, int, int]:
        return grid_size(self.grid, {**self.args, **self.constants, **self.sizes})

    def signature(self) -> dict[str, str]:
        """What each argument is compiled as, by Triton's own rules for specialisation.

        "*bf16:16" is a pointer to 16-byte aligned memory, "i32:16" a multiple of 16, "1" the constant one
        (a contiguous stride), which is no argument of the compiled kernel any more.
        """
        return {name: _compiled_as(value) for name, value in self.args.items()}

    def key(self) -> str:
        """What a build of kernels.aot is found by."""
        parts = [f"{name}={kind}" for name, kind in self.signature().items()]
        return " ".join([self.kernel, *parts, *(f"{name}={value}" for name, value in self.constants.items())])


def _compiled_as(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        # a meta tensor stands for an allocation, and those are aligned
        aligned = value.device.type == "meta" or value.data_ptr() % ALIGNMENT == 0
        return _TYPES[value.dtype] + (f":{ALIGNMENT}" if aligned else "")
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "1"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind + (f":{ALIGNMENT}" if value % ALIGNMENT == 0 else "")


def grid_size(rule: tuple[str, ...], values: dict) -> tuple[int, int, int]:
    """The blocks in x, y and z; the rule's expressions may use + - * // and cdiv()."""
    names = {**values, "__builtins__": {}, "cdiv": lambda a, b: -(-a // b)}
    x, y, z = [eval(_compiled(part), names) for part in rule] + [1] * (3 - len(rule))
    return x, y, z


@cache
def _compiled(expression: str):
    return compile(expression, "<grid>", "eval")


def launch(
    kernel: str,
    shape: str,
    grid: tuple[str, ...],
    args: dict[str, Tensor | int | float],
    constants: dict[str, int | float | bool],
    **sizes: int,
) -> None:
    """Start the kernel on the device of its first tensor, on the current stream; nothing if the grid is empty.

    `shape` is what the tuned configuration is found by, such as "d32"; the configuration adds its own constants.
    """
    device = next(value.device for value in args.values() if isinstance(value, Tensor))
    tile, options = config(kernel, shape, device)
    start = Launch(kernel, shape, grid, args, {**constants, **tile}, options, sizes)
    if _recorded:
        _recorded[-1].append(start)
        return
    if 0 in start.blocks():
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if dispatch.AOT_FOLDER:
            from kernels.aot.load import builds

            builds(dispatch.AOT_FOLDER).launch(start, torch.cuda.current_stream().cuda_stream)
        else:
            _run(start, constants, device)


def _run(start: Launch, constants: dict[str, int | float | bool], device: torch.device) -> None:
    """Through Triton; a configuration that this GPU has no room for gives way to the next that it has, for good."""
    if start.constants.get("TMA"):
        import triton

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    try:
        function(start.kernel)[start.blocks()](**start.args, **start.constants, **start.options)
        return
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # Triton's, which must not be imported before it is needed
            raise
        smaller = next_smaller(start.kernel, start.shape, device)
        if smaller is None:
            raise
    tile, options = smaller
    _run(replace(start, constants={**constants, **tile}, options=options), constants, device)


@cache
def function(kernel: str):
    """The Triton function of that name."""
    module, name = kernel.split(".")
    return getattr(import_module(f"kernels.triton.{module}"), name)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches within are written down instead of run; with meta tensors nothing is allocated or computed."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()
