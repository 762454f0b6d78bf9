"""Launch one kernel: through Triton, from an ahead-of-time build, or in CUDA C++; or record the launch without it.

Nothing here imports Triton until Triton is to run a kernel, so a node with ahead-of-time builds (VLV_KERNELS_AOT)
needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from kernels.aot.load import builds
from kernels.cuda import launch as cuda
from kernels.runtime import dispatch
from kernels.runtime.spec import Argument, Constant, Grid, Launch
from kernels.runtime.tuning import config, next_smaller

_recorded: list[list[Launch]] = []


def launch(kernel: str, shape: str, grid: Grid, args: dict[str, Argument], constants: dict[str, Constant]) -> None:
    """Launch the kernel on the device of its first tensor, on the current stream; do nothing if the grid is empty.

    kernel: "window_attention.forward" is `forward` in kernels/triton/window_attention.py. shape: the class of shapes
    that the tuned configuration is found by, such as "d32"; the configuration adds its own constants, and the grid is
    a function of all constants.
    """
    device = next(value.device for value in args.values() if isinstance(value, Tensor))
    tile, options = config(kernel, shape, device)
    start = Launch(kernel, shape, grid, args, {**constants, **tile}, options)
    if _recorded:
        _recorded[-1].append(start)
        return
    if 0 in start.blocks():
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if dispatch.AOT_FOLDER:
            builds(dispatch.AOT_FOLDER).launch(start, torch.cuda.current_stream().cuda_stream)
        else:
            _run(start, constants, device)


def _run(start: Launch, constants: dict[str, Constant], device: torch.device) -> None:
    """Launch through Triton; a configuration too large for this GPU is replaced by the next smaller one, for good."""
    if device.type == "cuda" and cuda.takes(start):
        cuda.run(start)
        return
    if start.constants.get("TMA"):
        import triton  # late: a node with ahead-of-time builds has none

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
    """Return the Triton function of that name."""
    module, name = kernel.split(".")
    return getattr(import_module(f"kernels.triton.{module}"), name)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches within instead of running them; with meta tensors nothing is allocated or computed."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()
