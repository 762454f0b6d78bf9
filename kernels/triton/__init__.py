"""The Triton source of the operations; imported by kernels.runtime.launch when a kernel is first run or compiled."""

import os

# Triton 3.9 fuses a multiplication and an addition by default and announces that 3.10 will not
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernels.triton import interpreter  # noqa: F401
