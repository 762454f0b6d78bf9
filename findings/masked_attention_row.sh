#!/usr/bin/env bash
# A query that may attend to nothing: one PyTorch call has three answers, by the kind of mask and the ONNX opset.
#
# Guess, written before the first run: scaled_dot_product_attention and its exports agree on a row whose keys are all
#   masked; a boolean mask, minus infinity and the smallest float32 are three ways to say the same.
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, numpy 2.3.5, Python 3.11.
# Behaviour: the row is zeros, the mean of all values, or NaN.
#   - PyTorch: zeros for a boolean mask and minus infinity, the mean for the smallest float32.
#   - Exported with opset 20 (MatMul and Softmax): the mean for a boolean mask, NaN for minus infinity.
#   - Exported with opset 23 (Attention): zeros for all three, also where PyTorch takes the mean.
#   No opset agrees with PyTorch for all three masks. Left padding and empty crops of a batch are such rows; every
#   other row agrees to 1e-6, so a comparison of real inputs finds nothing.
# Output seen:
#   boolean: PyTorch zeros, opset 20 mean, opset 23 zeros
#   minus infinity: PyTorch zeros, opset 20 nan, opset 23 zeros
#   smallest float32: PyTorch mean, opset 20 mean, opset 23 zeros
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import onnxruntime
import torch


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def exported(opset, args):
    proto = torch.onnx.export(Attend(), args, dynamo=True, opset_version=opset, verbose=False).model_proto
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))[0])


def name(row, v):
    if row.isnan().all():
        return "nan"
    if not row.any():
        return "zeros"
    assert torch.allclose(row, v.mean(-2), atol=1e-6)
    return "mean"


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 4, 8)  # each [batch 1, heads 2, length 4, width 8]
keep = torch.ones(4, 4, dtype=torch.bool)
keep[1] = False
others = [0, 2, 3]
seen = {}
for label, mask in (
    ("boolean", keep),
    ("minus infinity", torch.zeros(4, 4).masked_fill(~keep, -torch.inf)),
    ("smallest float32", torch.zeros(4, 4).masked_fill(~keep, torch.finfo(torch.float32).min)),
):
    args = q, k, v, mask
    expected = Attend()(*args)
    results = {"PyTorch": expected, "opset 20": exported(20, args), "opset 23": exported(23, args)}
    for found in results.values():
        torch.testing.assert_close(found[:, :, others], expected[:, :, others], atol=1e-6, rtol=1e-5)
    seen[label] = [name(found[:, :, 1], v) for found in results.values()]
    print(f"{label}:", ", ".join(f"{which} {what}" for which, what in zip(results, seen[label], strict=True)))
assert seen == {
    "boolean": ["zeros", "mean", "zeros"],
    "minus infinity": ["zeros", "nan", "zeros"],
    "smallest float32": ["mean", "mean", "zeros"],
}
PY
