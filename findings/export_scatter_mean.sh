#!/usr/bin/env bash
# PyTorch exports a scatter mean to ONNX as "the last value wins".
#
# Guess, written before the first run: torch.onnx.export refuses scatter_reduce(reduce="mean"), for ONNX has no such
#   reduction, or writes a sum and a count; sum, product, maximum and minimum work.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.3.5, Python 3.11.
# Behaviour: the export succeeds, the checker accepts the graph, and its ScatterElements has reduction "none": each
#   place holds one of its values. The other reductions are right. Pooling tokens by segment (mean of the patches of
#   a region, of the words of a phrase) is the usual place for it. Values that meet nobody (one per place) hide it.
# Output seen:
#   mean: PyTorch [2.0, 10.0], exported [3.0, 10.0], reductions none none
#   sum: PyTorch [6.0, 10.0], exported [6.0, 10.0], reductions none add
#   prod: PyTorch [6.0, 10.0], exported [6.0, 10.0], reductions none mul
#   amax: PyTorch [3.0, 10.0], exported [3.0, 10.0], reductions min max
#   amin: PyTorch [1.0, 10.0], exported [1.0, 10.0], reductions max min
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import onnx
import onnxruntime
import torch


class Pool(torch.nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def forward(self, values, segments):
        return torch.zeros(2).scatter_reduce(0, segments, values, reduce=self.reduce, include_self=False)


args = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
same = {}
for reduce in ("mean", "sum", "prod", "amax", "amin"):
    module = Pool(reduce)
    proto = torch.onnx.export(module, args, dynamo=True, opset_version=20, verbose=False).model_proto
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    found = session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))[0].tolist()
    expected = module(*args).tolist()
    kinds = [a.s.decode() for n in proto.graph.node if n.op_type == "ScatterElements" for a in n.attribute if a.s]
    print(f"{reduce}: PyTorch {expected}, exported {found}, reductions", *kinds)
    same[reduce] = expected == found
assert same == {"mean": False, "sum": True, "prod": True, "amax": True, "amin": True}
PY
