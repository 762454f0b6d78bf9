#!/usr/bin/env bash
# safetensors stores a transposed NumPy array under its new shape with its old order of values.
#
# Guess, written before the first run: save_file keeps what the array says (`x[i, j]`) whatever its strides, as
#   numpy.save does; or it refuses an array that is not contiguous, as its own PyTorch writer does.
# Versions: safetensors 0.8.0, numpy 2.3.5, torch 2.13.0, Python 3.11.
# Behaviour: the buffer is written as it lies in memory. A [2, 3] array transposed to [3, 2], or one that is
#   Fortran-ordered, comes back with the right shape and dtype and its values permuted, in NumPy and in PyTorch. A
#   square matrix comes back transposed. A converter that writes `weight.T` (Flax kernels to PyTorch's layout) makes a
#   file that loads everywhere and is wrong. numpy.ascontiguousarray before the call is the remedy.
# Output seen:
#   transposed: [[0, 3], [1, 4], [2, 5]] read by NumPy [[0, 1], [2, 3], [4, 5]], by PyTorch [[0, 1], [2, 3], [4, 5]]
#   Fortran order: [[0, 1, 2], [3, 4, 5]] read by NumPy [[0, 3, 1], [4, 2, 5]], by PyTorch [[0, 3, 1], [4, 2, 5]]
#   contiguous copy: read as written
#   PyTorch's writer, transposed: ValueError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet safetensors==0.8.0 numpy==2.3.5 torch==2.13.0
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

x = np.arange(6, dtype=np.int32).reshape(2, 3)
for label, value in (("transposed", x.T), ("Fortran order", np.asfortranarray(x))):
    safetensors.numpy.save_file({"x": value}, "x.safetensors")
    in_numpy = safetensors.numpy.load_file("x.safetensors")["x"]
    in_torch = safetensors.torch.load_file("x.safetensors")["x"]
    print(f"{label}: {value.tolist()} read by NumPy {in_numpy.tolist()}, by PyTorch {in_torch.tolist()}")
    assert in_numpy.shape == tuple(in_torch.shape) == value.shape
    assert in_numpy.tolist() == in_torch.tolist() != value.tolist()
    assert in_numpy.flatten().tolist() == value.flatten(order="K").tolist()

safetensors.numpy.save_file({"x": np.ascontiguousarray(x.T)}, "x.safetensors")
assert (safetensors.numpy.load_file("x.safetensors")["x"] == x.T).all()
print("contiguous copy: read as written")
try:
    safetensors.torch.save_file({"x": torch.from_numpy(x).T}, "x.safetensors")
except ValueError:
    print("PyTorch's writer, transposed: ValueError")
else:
    raise SystemExit("PyTorch's writer takes a transposed tensor")
PY
