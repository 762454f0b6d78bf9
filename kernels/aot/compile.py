"""Compile one launch for one architecture, without a GPU, and read the registers and memory that it needs.

Triton is imported late: it is optional, and plugins and loaders import this module without it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kernels.runtime import dispatch
from kernels.runtime.launch import function
from kernels.runtime.spec import ALIGNMENT, Launch


@dataclass(frozen=True)
class Build:
    """A compiled launch: what kernels.aot writes to files, and what kernels.occupancy compares."""

    symbol: str  # the kernel's name in the PTX
    ptx: str
    cubin: bytes
    warps: int
    shared: int  # bytes of shared memory of a block, all of it dynamic
    registers: int  # of a thread
    spills: int  # bytes of a thread in local memory


def signature(start: Launch) -> dict[str, str]:
    """Return the type that each argument is compiled for, in the order of the kernel's parameters."""
    types = start.signature()
    return {name: types[name] for name in function(start.kernel).arg_names if name in types}


def compile_launch(start: Launch, sm: int, scratch: bool = False) -> Build:
    """Build `start` for compute capability `sm` (90 is 9.0). Raises ValueError where it cannot be built.

    scratch: allow a kernel that needs scratch memory, which only Triton can launch.
    """
    if dispatch.INTERPRET:
        raise ValueError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET and VLV_KERNELS")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types = function(start.kernel), signature(start)
    kinds = dict.fromkeys(kernel.arg_names, "constexpr")
    kinds |= {name: kind.split(":")[0] for name, kind in types.items() if kind != "1"}
    constants = {**start.constants, **{name: 1 for name, kind in types.items() if kind == "1"}}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").endswith(f":{ALIGNMENT}")]
    source = ASTSource(kernel, kinds, constants, {(i,): [["tt.divisibility", ALIGNMENT]] for i in aligned})
    try:
        built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(start.options))
    except (triton.TritonError, RuntimeError) as error:
        raise ValueError(f"{start.kernel} does not compile for sm{sm}: {error}") from error
    if not scratch and (built.metadata.global_scratch_size or built.metadata.profile_scratch_size):
        raise ValueError(f"{start.kernel} asks for scratch memory, which an ahead-of-time launch cannot give")
    cubin = built.asm["cubin"]
    registers, spills = resources(cubin)
    return Build(
        built.metadata.name, built.asm["ptx"], cubin, built.metadata.num_warps, built.metadata.shared, registers, spills
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers of a thread, bytes that it spills), read by the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]
