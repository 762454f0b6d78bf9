"""Launch the builds of kernels.aot through the CUDA driver, without Triton.

    VLV_KERNELS_AOT=builds/kernels python -m serve.vllm_caption …      # operations find their builds by themselves

or by hand: `Builds(folder).launch(start, stream)` with a kernels.runtime.spec.Launch. Only libcuda is needed, which
comes with the GPU's driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from functools import cache
from pathlib import Path

from torch import Tensor

from kernels.aot.manifest import FORMAT, MANIFEST
from kernels.runtime.spec import Argument, Launch

SCRATCH = 2  # pointers that Triton adds to a kernel's parameters; null, as no kernel here asks for scratch memory
STATIC_SHARED = 48 * 1024  # bytes of shared memory that a block gets without asking the driver
_DYNAMIC_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def pack(signature: dict[str, str], args: dict[str, Argument]) -> list[ctypes._SimpleCData]:
    """Return the kernel's parameters in order, scratch pointers included, compiled-in ones ("1") left out.

    Raises ValueError where a value is not what the build was made for: the kernel would read the wrong memory.
    """
    packed = []
    for name, kind in signature.items():
        value, (base, _, divisor) = args[name], kind.partition(":")
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if base == "1":
            if number != 1:
                raise ValueError(f"{name} is {number}; this build is for {name} = 1")
            continue
        if divisor and number % int(divisor):
            raise ValueError(f"{name} is {number}; this build is for multiples of {divisor}")
        if base == "i32" and not -(2**31) <= number < 2**31:
            raise ValueError(f"{name} is {number}; this build is for 32-bit numbers")
        packed.append(ctypes.c_uint64(number) if base.startswith("*") else _C_TYPES[base](number))
    return packed + [ctypes.c_uint64(0)] * SCRATCH


@cache
def driver() -> ctypes.CDLL:
    """Return libcuda, initialised. Raises OSError where there is none, or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise OSError("no libcuda.so.1 here: launching built kernels needs an NVIDIA GPU and its driver") from error
    if cuda.cuInit(0):
        raise OSError("the CUDA driver finds no GPU")
    return cuda


def checked(cuda: ctypes.CDLL, call: str, *args) -> None:
    """Call the driver. Raises RuntimeError with its word for an error."""
    code = getattr(cuda, call)(*args)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{call} failed: {(text.value or b'unknown error').decode()} ({code})")


class Builds:
    """Launch the builds in a folder of kernels.aot. A function is loaded at its first launch and kept."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: make it with python -m kernels.aot --out {folder}")
        content = json.loads(manifest.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"{manifest} has format {content.get('format')}; this version reads {FORMAT}")
        self.targets: dict[str, dict[str, dict]] = content["targets"]
        self._functions: dict[tuple[int, str], ctypes.c_void_p] = {}

    def entry(self, start: Launch, target: str) -> dict:
        """Return the build for this launch. Raises KeyError naming what is missing."""
        if target not in self.targets:
            raise KeyError(f"{self.folder} has builds for {', '.join(self.targets)}, not for this GPU's {target}")
        if start.key() not in self.targets[target]:
            raise KeyError(f"{self.folder} has no build of {start.key()}; rebuild it for these shapes")
        return self.targets[target][start.key()]

    def binary(self, entry: dict) -> bytes:
        """Return the cubin, checked against the manifest before the driver sees it. Raises ValueError."""
        data = (self.folder / f"{entry['file']}.cubin").read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['file']}.cubin in {self.folder} is not the file that the manifest describes")
        return data

    def launch(self, start: Launch, stream: int) -> None:
        """Launch the kernel on a CUDA stream, in the current context (PyTorch's, once it has used the GPU)."""
        cuda = driver()
        context, device = ctypes.c_void_p(), ctypes.c_int()
        checked(cuda, "cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            raise RuntimeError("no CUDA context is current: use the GPU once through PyTorch first")
        checked(cuda, "cuCtxGetDevice", ctypes.byref(device))
        entry = self.entry(start, _architecture(cuda, device.value))
        loaded = (context.value, entry["file"])
        if loaded not in self._functions:
            self._functions[loaded] = self._load(cuda, entry)
        values = pack(entry["arguments"], start.args)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        block = (entry["warps"] * 32, 1, 1)
        handle = ctypes.c_void_p(stream)
        checked(
            cuda,
            "cuLaunchKernel",
            self._functions[loaded],
            *start.blocks(),
            *block,
            entry["shared"],
            handle,
            pointers,
            None,
        )

    def _load(self, cuda: ctypes.CDLL, entry: dict) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        checked(cuda, "cuModuleLoadData", ctypes.byref(module), self.binary(entry))
        checked(cuda, "cuModuleGetFunction", ctypes.byref(function), module, entry["symbol"].encode())
        if entry["shared"] > STATIC_SHARED:
            checked(cuda, "cuFuncSetAttribute", function, _DYNAMIC_SHARED_ATTRIBUTE, entry["shared"])
        return function


@cache
def _architecture(cuda: ctypes.CDLL, device: int) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    checked(cuda, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    checked(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return f"sm{major.value}{minor.value}"


builds = cache(Builds)
