#!/usr/bin/env bash
# Triton's interpreter turns infinity and NaN into ordinary numbers when it casts to FP8.
#
# Guess, written before the first run: with TRITON_INTERPRET=1 a cast to float8e4nv or float8e5 rounds, overflows and
#   keeps NaN as PyTorch's cast to the same format does; the interpreter is the reference by which kernels are debugged.
# Versions: triton 3.9.0, torch 2.13.0, numpy 2.3.5, Python 3.11. No GPU is used.
# Behaviour: values within range are rounded right, except that ties of exponents can fall low (7.7 becomes 4 in
#   float8e5). Out of range the exponent's bits wrap: infinity becomes 256 and NaN 384 in float8e4nv, 65536 and 98304
#   in float8e5, whose largest number is 57344. A kernel that overflows, or that meets a NaN, passes every test that
#   asks for finite results here.
# Output seen:
#   float8e4nv: 500 -> 256 (PyTorch 448), 1e+06 -> 480 (PyTorch 448), inf -> 256 (PyTorch 448), nan -> 384 (PyTorch nan)
#   float8e5: 7.7 -> 4 (PyTorch 8), 1e+06 -> 65536 (PyTorch inf), inf -> 65536 (PyTorch inf), nan -> 98304 (PyTorch nan)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet triton==3.9.0 torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >cast.py <<'PY'
import math

import torch
import triton
import triton.language as tl


@triton.jit
def cast(p_in, p_out, dtype: tl.constexpr, n: tl.constexpr):
    offsets = tl.arange(0, n)
    tl.store(p_out + offsets, tl.load(p_in + offsets).to(dtype).to(tl.float32))


def compare(name, values):
    x = torch.tensor(values)
    found = torch.empty_like(x)
    cast[(1,)](x, found, getattr(tl, name), len(x))
    expected = x.to({"float8e4nv": torch.float8_e4m3fn, "float8e5": torch.float8_e5m2}[name]).float()
    rows = list(zip(values, found.tolist(), expected.tolist(), strict=True))
    print(f"{name}:", ", ".join(f"{a:g} -> {b:g} (PyTorch {c:g})" for a, b, c in rows))
    return dict(zip(map(str, values), found.tolist(), strict=True))


assert compare("float8e4nv", [0.3, 100.0 - 4, 240.0, 448.0]) == {"0.3": 0.3125, "96.0": 96, "240.0": 240, "448.0": 448}
e4 = compare("float8e4nv", [500.0, 1e6, math.inf, math.nan])
e5 = compare("float8e5", [7.7, 1e6, math.inf, math.nan])
assert e4["500.0"] == 256 and e4["inf"] == 256 and e4["nan"] == 384
assert e5["7.7"] == 4 and e5["1000000.0"] == e5["inf"] == 65536 and e5["nan"] == 98304
PY
TRITON_INTERPRET=1 "$dir/env/bin/python" cast.py
