#!/usr/bin/env bash
# Gloo's maximum over ranks keeps a NaN of one rank and drops that of another, and DTensor's amax inherits it.
#
# Guess, written before the first run: all_reduce(MAX) of a tensor that is NaN on one rank is NaN on all ranks,
#   whichever rank it is, as torch.maximum of the same tensors is; amax of a DTensor is the amax of the full tensor.
# Versions: torch 2.13.0 (gloo, CPU), numpy 2.3.5, Python 3.11, two processes of torchrun.
# Behaviour: with a single value a NaN on rank 0 survives and one on rank 1 is replaced by rank 0's number. With 8
#   values, half survive in both cases: each half is reduced in the other order. MIN does the same. DTensor.amax and
#   the infinity norm of a tensor sharded over the two ranks inherit it: a NaN in the second shard is dropped, where
#   the sum keeps it. "Is any rank's loss NaN" needs isnan() and a sum.
# Output seen:
#   NaN on rank 0: MAX of 1 value nan, NaN among 8 values 4
#   NaN on rank 1: MAX of 1 value 1.0, NaN among 8 values 4
#   DTensor with NaN in shard 0: amax nan, infinity norm nan, sum nan
#   DTensor with NaN in shard 1: amax 3.0, infinity norm 3.0, sum nan
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$dir"
cat >reduce.py <<'PY'
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == 2


def say(text):
    if rank == 0:
        print(text, flush=True)


def reduced(bad, size, op):
    x = torch.full((size,), math.nan if rank == bad else rank + 1.0)
    dist.all_reduce(x, op=op)
    return x


for bad in (0, 1):
    one, eight = (reduced(bad, size, dist.ReduceOp.MAX) for size in (1, 8))
    say(f"NaN on rank {bad}: MAX of 1 value {one.item()}, NaN among 8 values {int(eight.isnan().sum())}")
    assert math.isnan(one.item()) == (bad == 0)
    assert 0 < int(eight.isnan().sum()) < 8
    assert 0 < int(reduced(bad, 8, dist.ReduceOp.MIN).isnan().sum()) < 8
    assert reduced(bad, 8, dist.ReduceOp.SUM).isnan().all()

mesh = init_device_mesh("cpu", (world,))
for shard in (0, 1):
    full = torch.arange(8.0)
    full[[0, 7][shard]] = math.nan
    x = distribute_tensor(full, mesh, [Shard(0)])
    amax, norm, total = (y.full_tensor().item() for y in (x.amax(), torch.linalg.vector_norm(x, math.inf), x.sum()))
    say(f"DTensor with NaN in shard {shard}: amax {amax}, infinity norm {norm}, sum {total}")
    assert math.isnan(full.amax()) and math.isnan(total)
    assert math.isnan(amax) == math.isnan(norm) == (shard == 0)
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$dir/env/bin/torchrun" --standalone --nproc-per-node 2 reduce.py
