#!/usr/bin/env bash
# OpenVINO reads an ONNX Resize with antialias=1 as one without.
#
# Guess, written before the first run: OpenVINO resamples as ONNX Runtime does (both name opset 18's Resize as
#   supported), to about 1e-6; or it refuses the attribute, as TensorRT's parser does.
# Versions: openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2, torch 2.13.0, onnxscript 0.7.2, numpy 2.3.5, x86-64.
# Behaviour: PyTorch's antialiased interpolation, exported by torch.onnx, is the same in ONNX Runtime. OpenVINO reads
#   the same file, warns of nothing, and returns exactly what it returns for antialias=0: a 64-pixel checkerboard
#   shrunk to 10 is off by up to 0.45 of the whole range. A vision encoder that resizes inside its graph sees aliased
#   images there.
# Output seen:
#   linear: ONNX Runtime to PyTorch 0.0000, OpenVINO to PyTorch 0.32, OpenVINO to its own antialias=0 0.0
#   cubic: ONNX Runtime to PyTorch 0.0000, OpenVINO to PyTorch 0.45, OpenVINO to its own antialias=0 0.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 torch==2.13.0 \
    onnxscript==0.7.2 numpy==2.3.5
cd "$dir"
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import io

import numpy as np
import onnxruntime
import openvino
import torch


class Resize(torch.nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return torch.nn.functional.interpolate(x, size=(10, 10), mode=self.mode, antialias=True)


def in_openvino(proto, x):
    core = openvino.Core()
    model = core.read_model(io.BytesIO(proto.SerializeToString()))
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]


row = torch.arange(64)
x = ((row[:, None] + row) % 2).float()[None, None]  # [1, 1, 64, 64], a checkerboard
for mode, word in (("bilinear", "linear"), ("bicubic", "cubic")):
    module = Resize(mode)
    expected = module(x).numpy()
    proto = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).model_proto
    (resize,) = (node for node in proto.graph.node if node.op_type == "Resize")
    (antialias,) = (a for a in resize.attribute if a.name == "antialias")
    assert antialias.i == 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = np.abs(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] - expected).max()
    smooth = in_openvino(proto, x.numpy())
    antialias.i = 0
    plain = in_openvino(proto, x.numpy())
    apart, same = np.abs(smooth - expected).max(), np.abs(smooth - plain).max()
    print(
        f"{word}: ONNX Runtime to PyTorch {reference:.4f}, OpenVINO to PyTorch {apart:.2f}, "
        f"OpenVINO to its own antialias=0 {same}"
    )
    assert reference < 1e-5
    assert apart > 0.2
    assert same == 0
PY
