"""8 bits for TensorRT: a float16 graph whose linear layers multiply 8-bit floats (E4M3, arXiv 2209.05433) or integers.

Q/DQ nodes stand before their products, symmetric, as TensorRT reads them; ONNX Runtime computes the same for the check.
NVIDIA's ModelOpt makes such graphs too, but asks for versions of onnx and onnxruntime that exclude ours, and for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.quantize.precision import NotPossible, saved
from export.trace import Traced

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto
    from onnxruntime.quantization.calibrate import TensorsData

SMALLEST = 2.0**-20  # scale: float16 has 16 steps left below it


@dataclass(frozen=True)
class Format:
    """What a tensor is rounded to."""

    onnx: str  # TensorProto's name
    torch: torch.dtype
    largest: float
    by_channel: bool  # whether each column of a weight has a scale of its own


FORMATS = {
    "fp8": Format("FLOAT8E4M3FN", torch.float8_e4m3fn, 448.0, by_channel=False),
    "int8-trt": Format("INT8", torch.int8, 127.0, by_channel=True),
}


def quantized(
    traced: Traced, source: Path, made: Path, seen: TensorsData, exact: tuple[str, ...], precision: str
) -> Traced:
    """Quantize the float16 graph of the folder `source` into the folder `made`.

    precision: one of FORMATS; seen: ranges of activations (`quantize.ranges`); exact: blocks that stay in float16.
    Convolutions, attention and the layers of a picture's one vector (Gemm) do, too. Raises NotPossible.
    """
    import onnx

    model = onnx.load(source / traced.files[0])
    layers = _Layers(model.graph, seen, precision)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        path = traced.owner.get(node.name)
        if node.op_type == "MatMul" and node.input[1] in layers.weights and path and path not in exact:
            nodes += layers.quantize(node)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        del field[:]
        field.extend(values)
    return saved(model, made, traced)


class _Layers:
    """Puts Q/DQ before products; a tensor that several of them read gets one pair."""

    def __init__(self, graph: GraphProto, seen: TensorsData, precision: str):
        self.graph, self.seen, self.precision, self.format = graph, seen, precision, FORMATS[precision]
        self.weights = {constant.name: constant for constant in graph.initializer}
        self._made: set[str] = set()

    def quantize(self, node: NodeProto) -> list[NodeProto]:
        """The nodes to put before a MatMul, whose inputs become theirs."""
        value, weight = node.input
        node.input[0], node.input[1] = f"{value}_rounded", f"{weight}_rounded"
        nodes = []
        if value not in self._made:
            nodes += self._activation(value)
        if weight not in self._made:
            nodes += self._weight(weight)
        self._made |= {value, weight}
        return nodes

    def _activation(self, name: str) -> list[NodeProto]:
        from onnx import helper

        largest = np.abs(self.seen[name].range_value).max()
        if not np.isfinite(largest):
            raise NotPossible(
                f"{self.precision}: {name} overflows in float16, which the rest computes in: choose bf16 or fp32"
            )
        _, constants = self._scale(name, largest)
        quantize = helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_8bit"], f"{name}_quantize")
        return [quantize, self._dequantize(name, constants)]

    def _weight(self, name: str) -> list[NodeProto]:
        """Weights [inputs, outputs] are stored in 8 bits."""
        from onnx import TensorProto, helper, numpy_helper

        values = numpy_helper.to_array(self.weights[name]).astype(np.float32)
        scale, constants = self._scale(name, np.abs(values).max(0 if self.format.by_channel else None))
        scaled = torch.from_numpy(values / scale).clamp(-self.format.largest, self.format.largest)
        scaled = scaled if self.format.torch.is_floating_point else scaled.round()
        raw = scaled.to(self.format.torch).view(torch.uint8).numpy().tobytes()
        kind = TensorProto.DataType.Value(self.format.onnx)
        self.graph.initializer.append(helper.make_tensor(f"{name}_8bit", kind, values.shape, raw, raw=True))
        return [self._dequantize(name, constants, axis=1)]

    def _dequantize(self, name: str, constants: list[str], axis: int | None = None) -> NodeProto:
        from onnx import helper

        inputs, outputs = [f"{name}_8bit", *constants], [f"{name}_rounded"]
        return helper.make_node("DequantizeLinear", inputs, outputs, f"{name}_dequantize", axis=axis)

    def _scale(self, name: str, largest: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """A tensor's scale (or scales), float16, and the names of scale and zero point."""
        from onnx import TensorProto, helper, numpy_helper

        scale = np.maximum(largest / self.format.largest, SMALLEST).astype(np.float16)
        kind = TensorProto.DataType.Value(self.format.onnx)
        made = [
            numpy_helper.from_array(np.asarray(scale), f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", kind, scale.shape, bytes(scale.size), raw=True),
        ]
        self.graph.initializer.extend(made)
        return scale, [constant.name for constant in made]
