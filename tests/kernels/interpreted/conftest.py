"""These tests run where TRITON_INTERPRET=1; elsewhere tests/kernels/test_interpreted.py starts them."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
