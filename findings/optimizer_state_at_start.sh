#!/usr/bin/env bash
# Reading an optimizer's state for a checkpoint before the first step changes the training that follows.
#
# Guess, written before the first run: get_optimizer_state_dict of torch.distributed.checkpoint reads; a run that also
#   saves a checkpoint at step 0 is the same to the last bit as one that does not.
# Versions: torch 2.13.0, numpy 2.3.5, Python 3.11. One process, no distributed setup.
# Behaviour: where an optimizer has no state yet, the call makes one by a step of its own, with zero gradients and a
#   rate of 0, and keeps it. Adam's counter so starts at 1, and its bias correction with it: the first step is 0.0074
#   instead of 0.01, and later ones are off until the moments have forgotten, about 1000 steps. SGD applies its
#   dampening to the first gradient too; Rprop, whose step sizes begin at the rate, begins at 1e-6. Nothing warns, and
#   optimizer.state_dict() has no such effect. (pytorch/pytorch#164929 is open; torchtitan#4382 resets Adam's state.)
# Output seen:
#   AdamW's first step: unread 0.010000, state_dict 0.010000, get_optimizer_state_dict 0.007441
#   Rprop's first step: unread 0.010000, state_dict 0.010000, get_optimizer_state_dict 0.000001
#   SGD's first step: unread 0.010000, state_dict 0.010000, get_optimizer_state_dict 0.001000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$dir/env/bin/python" -W ignore - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def unread(model, optimizer):
    return None


def plainly(model, optimizer):
    return optimizer.state_dict()


READERS = {"unread": unread, "state_dict": plainly, "get_optimizer_state_dict": get_optimizer_state_dict}


def first_step(make, read):
    """Return how far one weight goes in the first step, with a gradient of 1."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = make(model.parameters())
    read(model, optimizer)
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    return -model.weight.item()


for name, make, changed in (
    ("AdamW", lambda params: torch.optim.AdamW(params, lr=0.01), 0.01 * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5),
    ("Rprop", lambda params: torch.optim.Rprop(params, lr=0.01), 1e-6),
    ("SGD", lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.9), 0.001),
):
    found = {label: first_step(make, read) for label, read in READERS.items()}
    print(f"{name}'s first step:", ", ".join(f"{label} {step:.6f}" for label, step in found.items()))
    assert found["unread"] == found["state_dict"]
    assert abs(found["unread"] - 0.01) < 1e-6
    assert abs(found["get_optimizer_state_dict"] - changed) < 1e-6
PY
