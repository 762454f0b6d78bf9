"""Triton's interpreter without what makes it slow; imported only where kernels are interpreted.

At every call of a device function the interpreter patches Triton's language again, over the last patch, which makes a
kernel with a few of them ten times slower; once a module and launch is enough. And it builds its table of types at
every question for one. Its conversion to 8-bit floats loses the carry of a mantissa that rounds up (31.7 becomes 16);
PyTorch's takes its place.
"""

from functools import cache

import torch
import triton.language as tl
from triton.runtime import interpreter

_launch, _patched = interpreter.GridExecutor.__call__, set()
_of_number = cache(_ask := interpreter._get_np_dtype)
_convert = interpreter._convert_float


def _launch_afresh(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _call(self, *args, **kwargs):
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _numpy_type(kind):
    return _ask(kind) if kind.scalar.is_ptr() else _of_number(kind.scalar)


def _to_float(values, kind, target, rounding_mode):
    if kind == tl.float32 and target == tl.float8e4nv:
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return _convert(values, kind, target, rounding_mode)


interpreter.GridExecutor.__call__ = _launch_afresh
interpreter.InterpretedFunction.__call__ = _call
interpreter._get_np_dtype = _numpy_type
interpreter._convert_float = _to_float
