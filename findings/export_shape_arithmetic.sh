#!/usr/bin/env bash
# Sizes computed in Python are computed by other rules in the ONNX graph: `//` truncates, and floats are float32.
#
# Guess, written before the first run: -(-n // 12), Python's way to round up, is exported as a floor division and two
#   negations and is exact; n * 0.57 or n * 1.1 of a dynamic size is computed in double precision (ONNX has it), so a
#   size that PyTorch computes is the graph's size.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.3.5, Python 3.11.
# Behaviour: floordiv becomes ONNX's integer Div, which truncates, so that -(-n // 12) rounds down. Padding to whole
#   windows then has a negative amount, by which ONNX's Pad crops: the last rows of the image are gone in silence, and
#   a mean over ceil(n / 12) windows is divided by one less. The same module as an exported program (torch.export) is
#   right. Products with a Python float are made in float32, so floor and ceil differ where the double is just on the
#   other side of an integer, and arange with a step of 0.1 has one element too many or too few for nearly half of
#   all sizes. (-n) % 12 is right: ONNX's Mod follows Python. For integer tensors onnxscript issue 2342 names the gap.
# Output seen (sizes 20 to 199):
#   pad to windows by -(-n // 12): torch.export right for 180 of 180 sizes, ONNX for 15; 20 -> 12 instead of 24
#   pad to windows by -n % 12: torch.export right for 180 of 180 sizes, ONNX for 180
#   ceil(n * 1.1) rows: torch.export right for 180 of 180 sizes, ONNX for 173; 50 -> 55 instead of 56
#   arange(0, n * 0.1, 0.1): torch.export right for 180 of 180 sizes, ONNX for 100; 21 -> 22 instead of 21
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import math

import onnxruntime
import torch
from torch.nn.functional import pad

SIZES = range(20, 200)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def compare(label, function):
    module, x = Call(function).eval(), torch.rand(100)
    shapes = ({0: torch.export.Dim("n", min=14, max=1000)},)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes).module()
    onnx = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    expected, exported, found = {}, {}, {}
    for size in SIZES:
        x = torch.rand(size)
        expected[size], exported[size] = len(module(x)), len(program(x))
        found[size] = len(session.run(None, {name: x.numpy()})[0])
    wrong = [size for size in SIZES if found[size] != expected[size]]
    right = sum(exported[size] == expected[size] for size in SIZES)
    example = f"; {wrong[0]} -> {found[wrong[0]]} instead of {expected[wrong[0]]}" if wrong else ""
    print(
        f"{label}: torch.export right for {right} of {len(SIZES)} sizes, "
        f"ONNX for {len(SIZES) - len(wrong)}{example}"
    )
    assert right == len(SIZES)
    return wrong, found


wrong, found = compare("pad to windows by -(-n // 12)", lambda x: pad(x, (0, -(-x.shape[0] // 12) * 12 - x.shape[0])))
assert wrong == [size for size in SIZES if size % 12]
assert all(found[size] == size // 12 * 12 for size in SIZES)
wrong, _ = compare("pad to windows by -n % 12", lambda x: pad(x, (0, -x.shape[0] % 12)))
assert not wrong
wrong, found = compare("ceil(n * 1.1) rows", lambda x: x.mean() + torch.zeros(math.ceil(x.shape[0] * 1.1)))
assert wrong and all(abs(found[size] - size * 1.1) < 2 for size in SIZES)
wrong, _ = compare("arange(0, n * 0.1, 0.1)", lambda x: torch.arange(0, x.shape[0] * 0.1, 0.1))
assert len(wrong) > 30
PY
