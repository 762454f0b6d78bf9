"""Compile CUDA C++ with NVRTC, NVIDIA's compiler as a library; it needs no GPU."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def library() -> ctypes.CDLL:
    """Return NVRTC: the one that PyTorch's wheels for CUDA bring, else the system's. Raises OSError without one."""
    wheels = (Path(torch.__file__).parents[1] / "nvidia").glob("*/lib/libnvrtc.so.*")
    for name in (*map(str, sorted(wheels)), "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def compile_cuda(source: Path, sm: int, defines: dict[str, int]) -> bytes:
    """Return the cubin of a file for compute capability `sm` (90 is 9.0). Raises ValueError with the compiler's log."""
    nvrtc, program = library(), ctypes.c_void_p()
    options = [f"--gpu-architecture=sm_{sm}", *(f"-D{name}={value}" for name, value in defines.items())]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
            raise ValueError(f"{source.name} does not compile for sm{sm}:\n{log}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    return content.raw
