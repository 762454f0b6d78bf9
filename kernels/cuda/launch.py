"""Launch kernels/cuda/window_attention.cu where a configuration says so: CUDA_DESIGN of kernels.runtime.tuning."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

from kernels.aot.load import checked, driver
from kernels.cuda.nvrtc import compile_cuda, library
from kernels.runtime.spec import ALIGNMENT, Launch
from kernels.runtime.tuning import CUDA_DESIGN

SOURCE = Path(__file__).parent / "window_attention.cu"
THREADS = 288
# the kernel's parameters in their order, by the names of the Triton kernel's arguments
PARAMETERS = {
    "qkv": ctypes.c_void_p, "bias": ctypes.c_void_p, "out": ctypes.c_void_p,
    "height": ctypes.c_int, "width": ctypes.c_int, "C": ctypes.c_int,
    "stride_b": ctypes.c_longlong, "stride_h": ctypes.c_uint, "stride_w": ctypes.c_uint, "scale": ctypes.c_float,
}  # fmt: skip


def takes(start: Launch) -> bool:
    """Return True if the kernel computes this launch: half precision, 12 x 12 windows, heads of 32, aligned rows."""
    constants, args = start.constants, start.args
    if constants.get("DESIGN") != CUDA_DESIGN:
        return False
    qkv, rows = args["qkv"], [args[f"stride_{axis}"] for axis in "bhw"]
    aligned = [qkv.data_ptr(), args["bias"].data_ptr(), *(qkv.element_size() * stride for stride in rows)]
    return (
        qkv.dtype in (torch.float16, torch.bfloat16)
        and args["bias"].dtype == qkv.dtype
        and (constants["WINDOW"], constants["HEAD_DIM"], args["stride_c"]) == (12, 32, 1)
        and not any(number % ALIGNMENT for number in aligned)
        and 32 * args["stride_h"] < 2**31  # a window's bytes have 32-bit offsets
        and start.blocks()[0] < 2**16
        and _has_compiler()
    )


@cache
def _has_compiler() -> bool:
    try:
        library()
    except OSError as error:
        warnings.warn(f"window_attention runs on its Triton kernel: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def defines(start: Launch) -> dict[str, int]:
    """Return the macros that the kernel is compiled with for a launch."""
    half = {"HALF": 1} if start.args["qkv"].dtype == torch.float16 else {}
    return half | {"PADDED": int(start.constants["PADDED"]), "BLOCKS": start.constants["GROUP"]}


def parameters(start: Launch) -> list[ctypes._SimpleCData]:
    """Return the kernel's parameters in their order."""
    values = ((start.args[name], kind) for name, kind in PARAMETERS.items())
    return [kind(value.data_ptr() if isinstance(value, torch.Tensor) else value) for value, kind in values]


def run(start: Launch) -> None:
    """Launch the kernel on the current device and stream."""
    device = start.args["qkv"].device
    values = parameters(start)
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    windows, heads, batch = start.blocks()
    function = _function(device.index or 0, tuple(defines(start).items()))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    # heads vary first, so those of a window, whose channels are neighbours in memory, run together
    grid = (heads, windows, batch)
    checked(driver(), "cuLaunchKernel", function, *grid, THREADS, 1, 1, 0, stream, pointers, None)


@cache
def _function(index: int, macros: tuple[tuple[str, int], ...]) -> ctypes.c_void_p:
    """Compile the kernel for a GPU and load it."""
    major, minor = torch.cuda.get_device_capability(index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    checked(driver(), "cuModuleLoadData", ctypes.byref(module), compile_cuda(SOURCE, 10 * major + minor, dict(macros)))
    checked(driver(), "cuModuleGetFunction", ctypes.byref(function), module, b"forward")
    return function
