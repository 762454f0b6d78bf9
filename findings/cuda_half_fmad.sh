#!/usr/bin/env bash
# --fmad=false holds for float16 and bfloat16 in a cubin, but not in PTX: what assembles the PTX fuses them again.
#
# Guess, worded after a first look with another nvcc: CUDA code compiled with --fmad=false never fuses a * b + c,
#   whatever the type; the PTX states it, so whatever assembles that PTX, as the driver does at load time, gives the
#   cubin's results.
# Versions: nvidia-cuda-nvrtc 13.4.92 (NVRTC), nvidia-cuda-nvcc 13.4.92 (ptxas), nvidia-cuda-runtime 13.4.92 (headers),
#   nvidia-cuda-nvdisasm 13.4.92, Linux x86-64. No GPU is used: the machine code is disassembled.
# Behaviour: for float and double the PTX has mul.rn and add.rn, which must not be fused. The operators of cuda_fp16.h
#   and cuda_bf16.h are inline assembly, mul.f16 and add.f16 without a rounding: the flag does not reach them, and the
#   assembler fuses them unless it is told --fmad=false itself. So NVRTC's cubin is unfused and its PTX becomes
#   fused: one kernel differs between the GPUs that it was built for and those that load its PTX, and a library that
#   hands NVRTC's PTX on has lost the flag. __hmul_rn and __hadd_rn keep it.
# Output seen (instructions of a * b + c with --fmad=false for SM 90):
#   float: cubin FADD FMUL; PTX add.rn.f32 mul.rn.f32, assembled FADD FMUL
#   double: cubin DADD DMUL; PTX add.rn.f64 mul.rn.f64, assembled DADD DMUL
#   __half: cubin HADD2 HMUL2; PTX add.f16 mul.f16, assembled HFMA2
#   __half2: cubin HADD2 HFMA2.MMA; PTX add.f16x2 mul.f16x2, assembled HFMA2.MMA
#   __nv_bfloat16: cubin HADD2.BF16_V2 HMUL2.BF16_V2; PTX add.bf16 mul.bf16, assembled HFMA2.BF16_V2
#   __half by __hmul_rn: cubin HADD2 HMUL2; PTX add.rn.f16 mul.rn.f16, assembled HADD2 HMUL2
#   in float16: 1.0009765625 * 1.0009765625 + -1.001953125 is 0 unfused, 9.54e-07 fused
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet nvidia-cuda-nvrtc==13.4.92 nvidia-cuda-nvcc==13.4.92 nvidia-cuda-runtime==13.4.92 \
    nvidia-cuda-nvdisasm==13.4.92
cd "$dir"
cat >fuse.py <<'PY'
import ctypes
import re
import struct
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(sysconfig.get_path("purelib")) / "nvidia"


def find(name):
    return next(path for path in ROOT.rglob(name) if path.is_file())


nvrtc = ctypes.CDLL(str(find("libnvrtc.so.13")))
ptxas, nvdisasm, include = find("ptxas"), find("nvdisasm"), find("cuda_fp16.h").parent
SOURCE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void kernel({type}* a, {type}* b, {type}* c) {{ c[0] = {sum}; }}
"""
OPERATORS, INTRINSICS = "a[0] * b[0] + c[0]", "__hadd_rn(__hmul_rn(a[0], b[0]), c[0])"


def compiled(source, arch, kind):
    """Return NVRTC's PTX or CUBIN of the source, compiled with --fmad=false."""
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}", "--fmad=false", f"--include-path={include}"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if nvrtc.nvrtcCompileProgram(program, len(options), array):
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise SystemExit(log.value.decode())
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
    return code.raw


def machine(cubin):
    """Return the names of the floating-point additions and multiplications of a cubin."""
    Path("kernel.cubin").write_bytes(cubin)
    text = subprocess.check_output([nvdisasm, "-c", "kernel.cubin"], text=True)
    return sorted(set(re.findall(r"\b((?:[FD](?:FMA|MUL|ADD)|H(?:FMA|MUL|ADD)2)[\w.]*)", text)))


def assembled(ptx, *options):
    Path("kernel.ptx").write_bytes(ptx.rstrip(b"\0"))
    subprocess.run([ptxas, "-arch=sm_90", *options, "kernel.ptx", "-o", "assembled.cubin"], check=True)
    return machine(Path("assembled.cubin").read_bytes())


for label, kind, form, fused in (
    ("float", "float", OPERATORS, None),
    ("double", "double", OPERATORS, None),
    ("__half", "__half", OPERATORS, "HFMA2"),
    ("__half2", "__half2", OPERATORS, "HFMA2"),
    ("__nv_bfloat16", "__nv_bfloat16", OPERATORS, "HFMA2"),
    ("__half by __hmul_rn", "__half", INTRINSICS, None),
):
    source = SOURCE.format(type=kind, sum=form)
    ptx = compiled(source, "compute_90", "PTX")
    words = sorted(set(re.findall(r"\b((?:fma|mul|add)[.\w]*(?:f16|f32|f64)[x2]*)", ptx.decode())))
    direct, late, told = machine(compiled(source, "sm_90", "CUBIN")), assembled(ptx), assembled(ptx, "--fmad=false")
    print(f"{label}: cubin", *direct, end="; PTX ")
    print(*words, end=", assembled ")
    print(*late)
    assert told == direct and len(direct) == 2
    assert (late == direct) == (fused is None)
    if fused:
        assert len(late) == 1 and late[0].startswith(fused)


def float16(x):
    return struct.unpack("e", struct.pack("e", x))[0]


a, c = 1 + 2**-10, -1 - 2**-9
unfused, fused = float16(float16(a * a) + c), float16(a * a + c)
print(f"in float16: {a} * {a} + {c} is {unfused:g} unfused, {fused:.3g} fused")
assert unfused == 0 < fused
PY
"$dir/env/bin/python" fuse.py
