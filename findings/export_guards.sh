#!/usr/bin/env bash
# torch.onnx.export takes models whose dynamic size torch.export refuses, and keeps the branch of the example's size.
#
# Guess, written before the first run: torch.onnx.export is torch.export and a translation. A module and dynamic_shapes
#   that torch.export.export refuses ("Constraints violated") are refused by it too; what torch.export takes is right
#   in ONNX for every size within the Dim, as it is in the exported program.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.3.5, Python 3.11.
# Behaviour: torch.onnx.export asks torch.export to turn guards on sizes into run-time assertions, and then translates
#   none of them. `if width % 12: pad` exported with a width of 96 never pads; keeping int(0.7 * tokens) of 100 tokens
#   keeps 70 of any number; the input is still dynamic by name, the steps report success, and ONNX Runtime raises
#   nothing. Adaptive average pooling is the case that no caution of the author prevents: torch.export takes it and is
#   right for every size, the ONNX decomposition asks whether the example divides by 7 and bakes in the answer. Pyramid
#   pooling and the 7x7 head of older networks are such models. Only sizes beside the example's own show it.
# Output seen (sizes 60 to 139, example in brackets):
#   pad to windows of 12 (96): torch.export UserError, ONNX right for 7 of 80 sizes, first wrong 61
#   keep 70 % of tokens (100): torch.export UserError, ONNX right for 2 of 80 sizes, first wrong 60
#   pool to 7x7 (98): torch.export right for 80 of 80 sizes, ONNX right for 1 of 80 sizes, first wrong 60
#   pool to 7x7 (100): torch.export right for 80 of 80 sizes, ONNX right for 10 of 80 sizes, first wrong 60
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import onnxruntime
import torch
from torch.nn.functional import adaptive_avg_pool2d, pad

SIZES = range(60, 140)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def pad_to_windows(x):
    return pad(x, (0, 12 - x.shape[3] % 12)) if x.shape[3] % 12 else x


def keep_tokens(x):
    return x[..., : int(x.shape[3] * 0.7)]


def right(call, module):
    """Return the sizes for which `call` gives the module's result."""
    found = set()
    for size in SIZES:
        x = torch.rand(1, 1, 14, size)
        try:
            y = call(x)
        except Exception:
            continue
        expected = module(x)
        if y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5):
            found.add(size)
    return found


def compare(label, function, example):
    module, x = Call(function).eval(), torch.rand(1, 1, 14, example)
    shapes = ({3: torch.export.Dim("width", min=14, max=1000)},)
    try:
        program = torch.export.export(module, (x,), dynamic_shapes=shapes).module()
    except torch._dynamo.exc.UserError as error:
        assert "Constraints violated" in str(error)
        exported, words = None, "UserError"
    else:
        exported = len(right(program, module))
        words = f"right for {exported} of {len(SIZES)} sizes"
    onnx = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False, dynamic_shapes=shapes)
    proto = onnx.model_proto
    assert proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param == "width"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    good = right(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), module)
    first = min(set(SIZES) - good, default=None)
    print(
        f"{label} ({example}): torch.export {words}, ONNX right for {len(good)} of {len(SIZES)} sizes, "
        f"first wrong {first}"
    )
    assert example in good
    return exported, len(good)


assert compare("pad to windows of 12", pad_to_windows, 96) == (None, 7)
assert compare("keep 70 % of tokens", keep_tokens, 100) == (None, 2)
for example in (98, 100):
    exported, good = compare("pool to 7x7", lambda x: adaptive_avg_pool2d(x, 7), example)
    assert exported == len(SIZES) and good < 20
PY
