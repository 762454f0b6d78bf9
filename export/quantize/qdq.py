"""Quantize for TensorRT: float16 graphs whose linear layers multiply 8-bit floats (E4M3, arXiv 2209.05433) or integers.

Symmetric Q/DQ nodes before the products, as TensorRT reads them; ONNX Runtime computes the same for the check. NVIDIA's
ModelOpt makes such graphs too, but needs versions of onnx and onnxruntime that exclude ours, and a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import TensorsData

from export.quantize.int8 import save_quantized
from export.trace import Traced

MIN_SCALE = 2.0**-20  # float16 has 16 steps below it


@dataclass(frozen=True)
class Format:
    """An 8-bit number format."""

    onnx: str  # TensorProto's name
    torch: torch.dtype
    max: float
    by_channel: bool  # True: each column of a weight has its own scale


FORMATS = {
    "fp8": Format("FLOAT8E4M3FN", torch.float8_e4m3fn, 448.0, by_channel=False),
    "int8-trt": Format("INT8", torch.int8, 127.0, by_channel=True),
}


def quantized(
    traced: Traced,
    source: Path,
    work_dir: Path,
    calibration_ranges: TensorsData,
    excluded_blocks: tuple[str, ...],
    precision: str,
) -> Traced:
    """Quantize the float16 graph of the folder `source` into `work_dir`, except for `excluded_blocks`.

    precision: one of FORMATS; calibration_ranges: of activations (`int8.ranges`). Convolutions, attention and the
    layers that read one vector per image (Gemm) are not quantized either.
    """
    model = onnx.load(source / traced.files[0])
    layers = _Layers(model.graph, calibration_ranges, precision)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        path = traced.owner.get(node.name)
        if node.op_type == "MatMul" and node.input[1] in layers.weights and path and path not in excluded_blocks:
            nodes += layers.quantize(node)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        del field[:]
        field.extend(values)
    return save_quantized(model, work_dir, traced)


class _Layers:
    """Put Q/DQ before products; a tensor that several of them read gets one pair."""

    def __init__(self, graph: GraphProto, calibration_ranges: TensorsData, precision: str):
        self.graph = graph
        self.calibration_ranges = calibration_ranges
        self.precision = precision
        self.format = FORMATS[precision]
        self.weights = {constant.name: constant for constant in graph.initializer}
        self._quantized: set[str] = set()

    def quantize(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes to put before a MatMul, whose inputs become their outputs."""
        value, weight = node.input
        node.input[0], node.input[1] = f"{value}_rounded", f"{weight}_rounded"
        nodes = []
        if value not in self._quantized:
            nodes += self._activation(value)
        if weight not in self._quantized:
            nodes += self._weight(weight)
        self._quantized |= {value, weight}
        return nodes

    def _activation(self, name: str) -> list[NodeProto]:
        largest = np.abs(self.calibration_ranges[name].range_value).max()
        _, constants = self._scale(name, largest)
        quantize = helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_8bit"], f"{name}_quantize")
        return [quantize, self._dequantize(name, constants)]

    def _weight(self, name: str) -> list[NodeProto]:
        """Store weights [inputs, outputs] in 8 bits; return the node that reads them."""
        values = numpy_helper.to_array(self.weights[name]).astype(np.float32)
        scale, constants = self._scale(name, np.abs(values).max(0 if self.format.by_channel else None))
        scaled = torch.from_numpy(values / scale).clamp(-self.format.max, self.format.max)
        scaled = scaled if self.format.torch.is_floating_point else scaled.round()
        raw = scaled.to(self.format.torch).view(torch.uint8).numpy().tobytes()
        kind = TensorProto.DataType.Value(self.format.onnx)
        self.graph.initializer.append(helper.make_tensor(f"{name}_8bit", kind, values.shape, raw, raw=True))
        return [self._dequantize(name, constants, axis=1)]

    def _dequantize(self, name: str, constants: list[str], axis: int | None = None) -> NodeProto:
        inputs, outputs = [f"{name}_8bit", *constants], [f"{name}_rounded"]
        return helper.make_node("DequantizeLinear", inputs, outputs, f"{name}_dequantize", axis=axis)

    def _scale(self, name: str, largest: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return a tensor's scale (or scales), float16, and the names of scale and zero point."""
        scale = np.maximum(largest / self.format.max, MIN_SCALE).astype(np.float16)
        kind = TensorProto.DataType.Value(self.format.onnx)
        constants = [
            numpy_helper.from_array(np.asarray(scale), f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", kind, scale.shape, bytes(scale.size), raw=True),
        ]
        self.graph.initializer.extend(constants)
        return scale, [constant.name for constant in constants]
