#!/usr/bin/env bash
# Functions that PyTorch has for the sake of numerical stability are exported to ONNX as the formulas that they replace.
#
# Guess, written before the first run: logsigmoid, log1p, expm1 and logcumsumexp keep their accuracy through
#   torch.onnx.export; ONNX has Softplus, from which logsigmoid follows.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.3.5, Python 3.11.
# Behaviour: logsigmoid becomes Log(Sigmoid(x)), which is minus infinity at -200 and 0 at 20; log1p becomes Log(x + 1)
#   and expm1 becomes Exp(x) - 1, both 0 at 1e-8; logcumsumexp subtracts one maximum of the whole row, so a running
#   sum that starts 200 below it is minus infinity. A contrastive or preference loss, or a log-probability of beam
#   search, inside an exported graph loses exactly the values for which the function was chosen.
# Output seen:
#   logsigmoid(-200): PyTorch -200, exported -inf, by Sigmoid Log
#   logsigmoid(20): PyTorch -2.061e-09, exported 0, by Sigmoid Log
#   log1p(1e-08): PyTorch 1e-08, exported 0, by Add Log
#   expm1(1e-08): PyTorch 1e-08, exported 0, by Exp Sub
#   logcumsumexp(-200, 0)[0]: PyTorch -200, exported -inf, by ReduceMax Sub Exp CumSum Log Add
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import math

import onnxruntime
import torch


class Call(torch.nn.Module):
    def __init__(self, function, *args):
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x):
        return self.function(x, *self.args)


def exported(module, x):
    proto = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return float(found[0]), [node.op_type for node in proto.graph.node]


for label, module, values, wrong in (
    ("logsigmoid(-200)", Call(torch.nn.functional.logsigmoid), [-200.0], -math.inf),
    ("logsigmoid(20)", Call(torch.nn.functional.logsigmoid), [20.0], 0),
    ("log1p(1e-08)", Call(torch.log1p), [1e-8], 0),
    ("expm1(1e-08)", Call(torch.expm1), [1e-8], 0),
    ("logcumsumexp(-200, 0)[0]", Call(torch.logcumsumexp, 0), [-200.0, 0.0], -math.inf),
):
    x = torch.tensor(values)
    expected = float(module(x)[0])
    found, nodes = exported(module, x)
    print(f"{label}: PyTorch {expected:.4g}, exported {found:.4g}, by", *nodes)
    assert expected != 0 and math.isfinite(expected)
    assert found == wrong
PY
