#!/usr/bin/env bash
# A learning rate that is a tensor is shared by the optimizer's groups: schedules apply once a group, or the last wins.
#
# Guess, written before the first run: lr=torch.tensor(0.1), which PyTorch's recipe for compiled optimizers recommends,
#   trains as lr=0.1 does: each parameter group has its own rate, and a scheduler's list of rates is one for each group.
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11.
# Behaviour: the groups that name no rate get the same tensor, not a copy, and schedulers write into it.
#   ReduceLROnPlateau writes once for each group, so with two groups (weights with and without weight decay) a factor
#   of 0.5 becomes 0.25, with three 0.125. Where groups have schedules of their own (LambdaLR, OneCycleLR), all groups
#   get the last one's: the backbone trains at the head's rate. Schedulers with one schedule for all are right. The
#   caller's tensor changes as well: a second optimizer made from it starts at the first one's end. No warning.
# Output seen:
#   ReduceLROnPlateau, factor 0.5, 1 group: number 0.05; tensor 0.05
#   ReduceLROnPlateau, factor 0.5, 2 groups: number 0.05 0.05; tensor 0.025 0.025
#   ReduceLROnPlateau, factor 0.5, 3 groups: number 0.05 0.05 0.05; tensor 0.013 0.013 0.013
#   LambdaLR, 1 and 0.01: number 0.1 0.001; tensor 0.001 0.001
#   OneCycleLR, 1 and 0.01: number 0.35 0.0035; tensor 0.0035 0.0035
#   after a step of AdamW of rates 0.1 and 0.001: number -0.1 -0.001; tensor -0.001 -0.001
#   the caller's tensor of 0.1 after LambdaLR: 0.001
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$dir/env/bin/python" - <<'PY'
import torch
from torch.optim import lr_scheduler


def optimizer(rate, groups):
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    for param in params:
        param.grad = torch.ones(1)
    return torch.optim.AdamW([{"params": [param]} for param in params], lr=rate)


def rates(optim):
    return [float(f"{float(group['lr']):.2g}") for group in optim.param_groups]


def plateau(rate, groups):
    optim = optimizer(rate, groups)
    scheduler = lr_scheduler.ReduceLROnPlateau(optim, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    return rates(optim)


def scheduled(rate, make):
    optim = optimizer(rate, 2)
    scheduler = make(optim)
    optim.step()
    scheduler.step()
    return rates(optim)


def stepped(rate):
    optim = optimizer(rate, 2)
    lr_scheduler.LambdaLR(optim, [lambda step: 1, lambda step: 0.01])
    optim.step()
    return [float(f"{group['params'][0].item():.2g}") for group in optim.param_groups]


def report(label, run, *args):
    """Return the results with the rate as a number and as a tensor."""
    found = run(0.1, *args), run(torch.tensor(0.1), *args)
    print(f"{label}: number", *found[0], end="; tensor ")
    print(*found[1])
    return found


for groups in (1, 2, 3):
    label = f"ReduceLROnPlateau, factor 0.5, {groups} group{'s' * (groups > 1)}"
    number, tensor = report(label, plateau, groups)
    assert number == [0.05] * groups
    assert torch.allclose(torch.tensor(tensor), torch.tensor(0.1 * 0.5**groups), rtol=0.05)
for label, make in {
    "LambdaLR, 1 and 0.01": lambda optim: lr_scheduler.LambdaLR(optim, [lambda step: 1, lambda step: 0.01]),
    "OneCycleLR, 1 and 0.01": lambda optim: lr_scheduler.OneCycleLR(optim, max_lr=[1, 0.01], total_steps=12),
}.items():
    number, tensor = report(label, scheduled, make)
    assert number[0] > 50 * number[1]
    assert tensor == [number[1]] * 2
number, tensor = report("after a step of AdamW of rates 0.1 and 0.001", stepped)
assert number == [-0.1, -0.001] and tensor == [-0.001, -0.001]
mine = torch.tensor(0.1)
stepped(mine)
print(f"the caller's tensor of 0.1 after LambdaLR: {mine.item():.2g}")
assert mine < 0.0011
PY
