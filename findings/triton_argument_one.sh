#!/usr/bin/env bash
# A Triton kernel adds an integer argument to INT8 or BF16 data in a narrower type when the argument is 1.
#
# Guess, written before the first run: the dtype of `tl.load(p_in) + n` follows from the dtypes of the data and of n, so
#   it is the same for n = 1 and n = 2; the interpreter and the compiled kernel agree on it.
# Versions: triton 3.9.0, torch 2.13.0, numpy 2.3.5, Python 3.11. No GPU is used: kernels are compiled, not launched.
# Behaviour: the JIT makes a constant of an argument that is 1. A constant is a number of Python, which takes the data's
#   type, where an argument is an int32, which widens it. So int8 + n is int32 for n = 2 and int8 for n = 1, and
#   127 + 1 stored to an int32 pointer is -128; uint8 + n wraps at 255, and bfloat16 + n is rounded to bfloat16. The
#   interpreter specializes nothing: there the sum is 128. An annotation (n: tl.int32) or do_not_specialize keeps the
#   wide type. (That n.to(...) fails for 1 alone, triton-lang/triton#2939, has the same cause, but shows.)
# Output seen:
#   int8 127 + n: n=1 in i8, is -128 (interpreter 128); n=2 in i32, is 129 (interpreter 129)
#   uint8 255 + n: n=1 in i8, is 0 (interpreter 256); n=2 in i32, is 257 (interpreter 257)
#   bfloat16 256 + n: n=1 in bf16, is 256 (interpreter 257); n=2 in f32, is 258 (interpreter 258)
#   int8, n: tl.int32: n=1 in i32
#   int8, do_not_specialize: n=1 in i32
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet triton==3.9.0 torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >kernels.py <<'PY'
import triton
import triton.language as tl


@triton.jit
def add(p_in, p_out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(p_out + offsets, tl.load(p_in + offsets) + n)


@triton.jit
def add_annotated(p_in, p_out, n: tl.int32, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(p_out + offsets, tl.load(p_in + offsets) + n)


@triton.jit(do_not_specialize=["n"])
def add_unspecialized(p_in, p_out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(p_out + offsets, tl.load(p_in + offsets) + n)
PY
cat >interpret.py <<'PY'
import torch
from kernels import add

cases = (torch.int8, 127, torch.int32), (torch.uint8, 255, torch.int32), (torch.bfloat16, 256, torch.float32)
for dtype, value, wide in cases:
    for n in (1, 2):
        out = torch.empty(16, dtype=wide)
        add[(1,)](torch.full((16,), value, dtype=dtype), out, n, BLOCK=16)
        print(out[0].item())
PY
cat >compile.py <<'PY'
import os
import re
import subprocess
import sys

import torch
from kernels import add, add_annotated, add_unspecialized
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Target:
    """Name a GPU to compile for, in place of the one that a driver finds."""

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def sum_type(kernel, dtype, wide, n):
    """Return the element type of the addition of the data in the kernel that the JIT compiles for this n."""
    ttir = kernel.warmup(dtype, wide, n, BLOCK=128, grid=(1,)).asm["ttir"]
    return re.search(r"arith\.add[if] .*: tensor<128x(\w+)>", ttir)[1]


driver.set_active(Target())
lines = subprocess.check_output([sys.executable, "interpret.py"], env=os.environ | {"TRITON_INTERPRET": "1"})
interpreted = map(float, lines.split())
cases = (torch.int8, 127, torch.int32), (torch.uint8, 255, torch.int32), (torch.bfloat16, 256, torch.float32)
for dtype, value, wide in cases:
    words = []
    for n in (1, 2):
        kind = sum_type(add, dtype, wide, n)
        computed = torch.tensor(value, dtype=wide if kind in ("i32", "f32") else dtype).add(n).item()
        in_python = next(interpreted)
        words.append(f"n={n} in {kind}, is {computed:g} (interpreter {in_python:g})")
        assert in_python == value + n
        assert (computed == value + n) == (n == 2)
    print(f"{str(dtype).removeprefix('torch.')} {value} + n:", "; ".join(words))
for label, kernel in (("n: tl.int32", add_annotated), ("do_not_specialize", add_unspecialized)):
    kind = sum_type(kernel, torch.int8, torch.int32, 1)
    print(f"int8, {label}: n=1 in {kind}")
    assert kind == "i32"
PY
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$dir/cache" "$dir/env/bin/python" compile.py
