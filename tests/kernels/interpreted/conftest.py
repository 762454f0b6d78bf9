"""These tests run where TRITON_INTERPRET=1; elsewhere tests/kernels/test_interpreted.py starts them."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import torch
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    _start, _patched = interpreter.GridExecutor.__call__, set()

    def _start_afresh(self, *args, **kwargs):
        _patched.clear()
        return _start(self, *args, **kwargs)

    def _call(self, *args, **kwargs):
        # the interpreter patches the language again, over the last patch, at every call of a device function,
        # which makes a kernel with a few of them ten times slower; once a module and launch is enough
        if id(self.fn.__globals__) not in _patched:
            _patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = _start_afresh
    interpreter.InterpretedFunction.__call__ = _call


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
