"""FP8: a float16 graph whose linear layers multiply 8-bit floats (E4M3, arXiv 2209.05433), as TensorRT reads them.

Q/DQ nodes stand before their products, with one scale a tensor, for weights and activations.

NVIDIA's ModelOpt makes such graphs too, but asks for versions of onnx and onnxruntime that exclude ours, and for a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from export.quantize import NotPossible, saved
from export.trace import Traced

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto
    from onnxruntime.quantization.calibrate import TensorsData

LARGEST = 448.0  # of E4M3


def to_fp8(traced: Traced, source: Path, made: Path, seen: TensorsData, exact: tuple[str, ...] = ()) -> Traced:
    """Quantize the float16 graph of the folder `source` into the folder `made`.

    seen: ranges of activations (`quantize.ranges`); exact: blocks that stay in float16. Convolutions, attention and
    the layers of a picture's one vector (Gemm) do, too.
    """
    import onnx

    model = onnx.load(source / traced.files[0])
    layers = _Layers(model.graph, seen)
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

    def __init__(self, graph: GraphProto, seen: TensorsData):
        self.graph, self.seen = graph, seen
        self.weights = {constant.name: constant for constant in graph.initializer}
        self._made: set[str] = set()

    def quantize(self, node: NodeProto) -> list[NodeProto]:
        """The nodes to put before a MatMul, whose inputs become theirs."""
        value, weight = node.input
        node.input[0], node.input[1] = f"{value}_fp8", f"{weight}_fp8"
        nodes = []
        if value not in self._made:
            nodes += self._activation(value)
        if weight not in self._made:
            nodes += self._weight(weight)
        self._made |= {value, weight}
        return nodes

    def _activation(self, name: str) -> list[NodeProto]:
        from onnx import helper

        largest = np.abs(self.seen[name].range_value).max().item()
        if not np.isfinite(largest):
            raise NotPossible(f"fp8: {name} overflows in float16, which the rest computes in: choose int8-static")
        constants = self._constants(name, largest)
        quantize = helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_e4m3"], f"{name}_quantize")
        return [quantize, self._dequantized(name, constants)]

    def _weight(self, name: str) -> list[NodeProto]:
        from onnx import TensorProto, helper, numpy_helper

        values = torch.from_numpy(numpy_helper.to_array(self.weights[name]).astype(np.float32))
        constants = self._constants(name, values.abs().max().item())
        scale = numpy_helper.to_array(self.graph.initializer[-2]).item()
        raw = (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
        self.graph.initializer.append(
            helper.make_tensor(f"{name}_e4m3", TensorProto.FLOAT8E4M3FN, values.shape, raw, raw=True)
        )
        return [self._dequantized(name, constants)]

    def _dequantized(self, name: str, constants: list[str]) -> NodeProto:
        from onnx import helper

        return helper.make_node("DequantizeLinear", [f"{name}_e4m3", *constants], [f"{name}_fp8"], f"{name}_dequantize")

    def _constants(self, name: str, largest: float) -> list[str]:
        """Names of a tensor's scale, a float16 that maps `largest` to E4M3's, and of its zero point."""
        from onnx import TensorProto, helper, numpy_helper

        scale = max(np.float16(largest / LARGEST), np.finfo(np.float16).smallest_normal)
        made = [
            numpy_helper.from_array(np.array(scale, np.float16), f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", TensorProto.FLOAT8E4M3FN, (), b"\0", raw=True),
        ]
        self.graph.initializer.extend(made)
        return [constant.name for constant in made]
