#!/usr/bin/env bash
# In PyTorch 2.11, torch.compiler.is_exporting() is true inside torch.compile, so a module that switches to exportable
# operations for torch.export computes with them in every compiled model too.
#
# Guess, written before the first run: is_exporting() is false in eager mode and under torch.compile, and true under
#   torch.export alone; is_compiling() is the one that is true under both.
# Versions: torch 2.11.0, Python 3.11. On 2.13.0 the guess holds.
# Behaviour: Dynamo replaces the call by the constant True in both cases. The compiled module takes the branch meant for
#   the export, without a warning or a graph break; where both branches compute the same, only its speed tells.
# Output seen:
#   eager: kernel, torch.export: reference, torch.compile: reference
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.11.0 numpy==2.3.5
cat >"$dir/branch.py" <<'PY'
import torch
from torch import nn


class Branch(nn.Module):
    """Return 1 from the branch of the kernel, 0 from the reference that can be exported."""

    def forward(self, x):
        return torch.zeros_like(x) if torch.compiler.is_exporting() else torch.ones_like(x)


def name(call):
    return "kernel" if call(x).item() else "reference"


module, x = Branch(), torch.rand(1)
eager, exported = name(module), name(torch.export.export(module, (x,)).module())
compiled = name(torch.compile(module, backend="eager", fullgraph=True))
print(f"eager: {eager}, torch.export: {exported}, torch.compile: {compiled}")
assert (eager, exported, compiled) == ("kernel", "reference", "reference")
PY
"$dir/env/bin/python" "$dir/branch.py"
