#!/usr/bin/env bash
# Independent random draws of one graph become one draw, or none: in PyTorch's ONNX exporter, ONNX Runtime and OpenVINO.
#
# Guess, written before the first run: optimizers merge equal subexpressions only where they are deterministic, so two
#   dropouts of one tensor (Monte Carlo dropout), two Bernoulli masks or two noises of one shape stay independent.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, openvino 2026.4.1, numpy 2.3.5, x86-64.
# Behaviour: the exporter's elimination of common subexpressions spares RandomNormalLike and RandomUniformLike, and
#   merges Dropout in training mode and Bernoulli: eight passes of Monte Carlo dropout are one pass, and the spread that
#   is to measure uncertainty is exactly 0, while each run still differs, so a test that looks for randomness finds it.
#   From its basic level on ONNX Runtime removes such a Dropout altogether, though its training_mode is true; only with
#   both optimizers off the draws are PyTorch's. OpenVINO refuses this Dropout, and merges the normal noises, which the
#   other two leave alone: the noise of a VAE's latent is also that of the sampler.
# Output seen (distinct draws of the draws that the module makes):
#   dropout: PyTorch 8 of 8, exported 1 node; spread over the passes: PyTorch 0.99, exported 0.00
#   the exported draw differs from run to run: True
#   dropout exported without optimizer: 8 nodes, ONNX Runtime 8 with optimizations disabled, none at the basic level
#   Bernoulli: PyTorch 2 of 2, exported 1 node, ONNX Runtime 1
#   normal noise: PyTorch 2 of 2, exported 2 nodes, ONNX Runtime 2, OpenVINO 1, which differs from run to run: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import io

import onnxruntime
import openvino
import torch
from torch.nn.functional import dropout

LEVELS = onnxruntime.GraphOptimizationLevel
OFF, BASIC, ALL = LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_ALL


class Draws(torch.nn.Module):
    """Return `count` draws of one kind for one input, [count, n]."""

    def __init__(self, draw, count):
        super().__init__()
        self.draw, self.count = draw, count

    def forward(self, x):
        return torch.stack([self.draw(x) for _ in range(self.count)])


def exported(module, x, optimize=True):
    return torch.onnx.export(
        module, (x,), dynamo=True, opset_version=20, verbose=False, optimize=optimize
    ).model_proto


def in_onnxruntime(proto, level=ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def in_openvino(proto):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(proto.SerializeToString())), "CPU")
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def distinct(draws):
    return len(draws.unique(dim=0))


def nodes(proto, kind):
    return sum(node.op_type == kind for node in proto.graph.node)


x = torch.full((1000,), 0.5)
passes = Draws(lambda x: dropout(2 * x, 0.5, training=True), 8)
merged, plain = exported(passes, x), exported(passes, x, optimize=False)
run = in_onnxruntime(merged, OFF)
spread, lost = (float(draws.std(0).mean()) for draws in (passes(x), run(x)))
print(
    f"dropout: PyTorch {distinct(passes(x))} of 8, exported {nodes(merged, 'Dropout')} node; "
    f"spread over the passes: PyTorch {spread:.2f}, exported {lost:.2f}"
)
assert distinct(passes(x)) == 8 and nodes(merged, "Dropout") == 1
assert spread > 0.9 and lost == 0
again = not torch.equal(run(x), run(x))
print("the exported draw differs from run to run:", again)
assert again
draws = distinct(in_onnxruntime(plain, OFF)(x))
none = torch.equal(in_onnxruntime(plain, BASIC)(x), (2 * x).expand(8, -1))
print(
    f"dropout exported without optimizer: {nodes(plain, 'Dropout')} nodes, ONNX Runtime {draws} with optimizations "
    f"disabled, {'none' if none else 'some'} at the basic level"
)
assert nodes(plain, "Dropout") == draws == 8 and none

masks = Draws(torch.bernoulli, 2)
proto = exported(masks, x)
seen = [distinct(masks(x)), nodes(proto, "Bernoulli"), distinct(in_onnxruntime(proto)(x))]
print(f"Bernoulli: PyTorch {seen[0]} of 2, exported {seen[1]} node, ONNX Runtime {seen[2]}")
assert seen == [2, 1, 1]

noises = Draws(torch.randn_like, 2)
proto = exported(noises, x)
run_openvino = in_openvino(proto)
seen = [
    distinct(noises(x)),
    nodes(proto, "RandomNormalLike"),
    distinct(in_onnxruntime(proto)(x)),
    distinct(run_openvino(x)),
]
again = not torch.equal(run_openvino(x), run_openvino(x))
print(
    f"normal noise: PyTorch {seen[0]} of 2, exported {seen[1]} nodes, ONNX Runtime {seen[2]}, OpenVINO {seen[3]}, "
    f"which differs from run to run: {again}"
)
assert seen == [2, 2, 2, 1] and again
PY
