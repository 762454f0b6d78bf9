#!/usr/bin/env bash
# The mean squared error of a sharded DTensor has the right value and a gradient that is too large by the mesh's size.
#
# Guess, written before the first run: a loss of torch.nn.functional of evenly sharded DTensors has the value and the
#   gradient of the full tensors; an operation that cannot be computed on shards raises.
# Versions: torch 2.13.0 (gloo, CPU), numpy 2.3.5, Python 3.11, four processes of torchrun.
# Behaviour: the mean of each shard is taken, and its backward divides by the shard's size: on 4 processes the gradients
#   of mse_loss, huber_loss, smooth_l1_loss, soft_margin_loss and binary_cross_entropy are 4 times too large, whichever
#   dimension is sharded. l1_loss, binary_cross_entropy_with_logits and (x - t).square().mean() are right, so a sum of
#   two losses is weighted by the number of GPUs; Adam hides the factor where there is one loss. For cross_entropy it
#   is the value that is wrong: with class weights or ignored targets it is the mean of the shards' means, NaN if one
#   shard has only ignored targets, while its gradient is right. With uneven shards mse_loss has a wrong value too.
#   (nll_loss with weights: pytorch/pytorch#185167; mean() of uneven shards was corrected in #163241.)
# Output seen:
#   mse_loss, rows sharded: value / full 1.000, gradient / full 4.00
#   mse_loss, columns sharded: value / full 1.000, gradient / full 4.00
#   huber_loss, rows sharded: value / full 1.000, gradient / full 4.00
#   smooth_l1_loss, rows sharded: value / full 1.000, gradient / full 4.00
#   soft_margin_loss, rows sharded: value / full 1.000, gradient / full 4.00
#   binary_cross_entropy, rows sharded: value / full 1.000, gradient / full 4.00
#   l1_loss, rows sharded: value / full 1.000, gradient / full 1.00
#   binary_cross_entropy_with_logits, rows sharded: value / full 1.000, gradient / full 1.00
#   square().mean(), rows sharded: value / full 1.000, gradient / full 1.00
#   cross_entropy, rows sharded: value / full 1.000, gradient / full 1.00
#   cross_entropy with class weights: value / full 1.007, gradient / full 1.00
#   cross_entropy, 2 of 8 rows ignored: value / full nan, gradient / full 1.00
#   mse_loss, 7 rows sharded: value / full 0.996, gradient / full 4.16
#   square().mean(), 7 rows sharded: value / full 1.000, gradient / full 1.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >losses.py <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
# Probabilities, which every loss below takes; targets likewise.
inputs, targets = torch.rand(2, 8, 8) * 0.8 + 0.1
classes = torch.arange(8)
ignored = torch.where(classes < 2, -100, classes)
weights = torch.arange(1.0, 9.0)


def replicated(tensor, like):
    return distribute_tensor(tensor, mesh, [Replicate()]) if isinstance(like, DTensor) else tensor


def square(x, t):
    return (x - t).square().mean()


def cross_entropy(x, t, labels=classes, weight=None):
    weight = None if weight is None else replicated(weight, x)
    return functional.cross_entropy(x, replicated(labels, x), weight=weight)


def compare(label, loss, dim=0, rows=8):
    """Print and return the value and the gradient's norm of the sharded loss, each divided by that of the full one."""
    x, t = inputs[:rows].clone().requires_grad_(), targets[:rows]
    expected = loss(x, t)
    expected.backward()
    sharded = distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_()
    found = loss(sharded, distribute_tensor(t, mesh, [Shard(dim)])).full_tensor()
    found.backward()
    value = (found / expected).item()
    gradient = (sharded.grad.full_tensor().norm() / x.grad.norm()).item()
    if dist.get_rank() == 0:
        print(f"{label}: value / full {value:.3f}, gradient / full {gradient:.2f}", flush=True)
    return value, gradient


def close(pair, value, gradient):
    return abs(pair[0] - value) < 1e-4 and abs(pair[1] - gradient) < 1e-4


for name in ("mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss", "binary_cross_entropy"):
    for dim, word in enumerate(("rows", "columns")[: 2 if name == "mse_loss" else 1]):
        assert close(compare(f"{name}, {word} sharded", getattr(functional, name), dim), 1, 4)
for name in ("l1_loss", "binary_cross_entropy_with_logits"):
    assert close(compare(f"{name}, rows sharded", getattr(functional, name)), 1, 1)
assert close(compare("square().mean(), rows sharded", square), 1, 1)
assert close(compare("cross_entropy, rows sharded", cross_entropy), 1, 1)
value, gradient = compare("cross_entropy with class weights", lambda x, t: cross_entropy(x, t, weight=weights))
assert abs(value - 1) > 1e-3 and abs(gradient - 1) < 1e-4
value, gradient = compare("cross_entropy, 2 of 8 rows ignored", lambda x, t: cross_entropy(x, t, labels=ignored))
assert value != value and abs(gradient - 1) < 1e-4
value, gradient = compare("mse_loss, 7 rows sharded", functional.mse_loss, rows=7)
assert abs(value - 1) > 1e-3 and gradient > 4.1
assert close(compare("square().mean(), 7 rows sharded", square, rows=7), 1, 1)
PY
OMP_NUM_THREADS=1 "$dir/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node 4 losses.py \
    2>"$dir/log" || { cat "$dir/log" >&2; exit 1; }
