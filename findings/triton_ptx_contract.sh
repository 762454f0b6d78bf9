#!/usr/bin/env bash
# PTX that Triton compiles ahead of time takes two parameters more than its kernel, and from SM 90 on fits one GPU only.
#
# Guess, written before the first run: a kernel of three run-time arguments has three .param entries in its PTX; PTX
#   for SM 90 says `.target sm_90` and runs on every later GPU, as PTX is meant to.
# Versions: triton 3.9.0, torch 2.13.0, Python 3.11. No GPU is used.
# Behaviour: two pointers for scratch memory follow the kernel's own parameters, also where the metadata give their
#   sizes as 0. A launcher that passes the three arguments (CUDA's driver API, a TensorRT plugin) leaves two unset.
#   The target is sm_80, sm_86 and sm_89, but sm_90a, sm_100a and sm_120a: the letter a makes PTX specific to one
#   architecture, by NVIDIA's rules, so the SM 90 text is no fallback for later GPUs. The PTX version rises with it.
# Output seen:
#   SM 80: PTX 8.8, sm_80, 5 parameters for 3 arguments, scratch sizes 0 and 0
#   SM 89: PTX 8.8, sm_89, 5 parameters for 3 arguments, scratch sizes 0 and 0
#   SM 90: PTX 9.4, sm_90a, 5 parameters for 3 arguments, scratch sizes 0 and 0
#   SM 100: PTX 9.4, sm_100a, 5 parameters for 3 arguments, scratch sizes 0 and 0
#   SM 120: PTX 9.4, sm_120a, 5 parameters for 3 arguments, scratch sizes 0 and 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet triton==3.9.0 torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >compile.py <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_one(p_in, p_out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + offsets, tl.load(p_in + offsets, mask=offsets < n) + 1, mask=offsets < n)


signature = {"p_in": "*fp32", "p_out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
arguments = sum(kind != "constexpr" for kind in signature.values())
targets = {}
for sm in (80, 89, 90, 100, 120):
    source = ASTSource(add_one, signature=signature, constexprs={"BLOCK": 128})
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32))
    ptx = kernel.asm["ptx"]
    parameters = len(re.findall(r"\.param .*add_one_param_\d+", ptx.split("{")[0]))
    version = re.search(r"\.version (\S+)", ptx)[1]
    targets[sm] = re.search(r"\.target (\w+)", ptx)[1]
    sizes = kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size
    print(
        f"SM {sm}: PTX {version}, {targets[sm]}, {parameters} parameters for {arguments} arguments, "
        f"scratch sizes {sizes[0]} and {sizes[1]}"
    )
    assert parameters == arguments + 2
    assert sizes == (0, 0)
assert targets == {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
PY
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$dir/cache" "$dir/env/bin/python" compile.py
