"""Check a graph in seconds, before an engine is built from it for minutes.

Finds unsupported operators, 64-bit integers in the data path, shapes outside the profile, operators that compute
something else than their PyTorch code, and too little memory for the build. Reads the graph, not the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from export.manifest import Artifact

# Standard operators that a trace of our modules can contain and that TensorRT 11 and TensorRT-RTX 1.7 parse
# (onnx-tensorrt, docs/operators.md).
COMMON = frozenset(
    """Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSigmoid Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max MaxPool Mean Min Mod
    Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    Relu Reshape Resize Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus SpaceToDepth
    Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor""".split()
)
ORT_ONLY = frozenset(("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"))
# operators on shapes and indices, which are 64-bit integers
SHAPES = frozenset(
    """Shape Size Gather Concat Constant ConstantOfShape Slice Squeeze Unsqueeze Reshape Expand Range Cast Identity
    Add Sub Mul Div Mod Min Max Equal Where Less Greater GreaterOrEqual LessOrEqual Trilu ScatterND
    ReduceProd""".split()
)
# operators of the data path that take 64-bit sizes or indices
TAKE_INT64 = frozenset("Split Tile Pad Resize ReduceMean ReduceSum Transpose GatherElements TopK Range".split())
MASKED = -1e4  # what is added to scores, or put in their place, to mask them, is below
BUILD_MEMORY = 3.2  # peak memory of a TensorRT-RTX build over the size of the weights: measured, 13.8 GB for 4.3 GB


def problems(file: Path, artifact: Artifact | None = None, runtime: str = "onnx") -> list[str]:
    """Return what is wrong with an ONNX file for a runtime; needs neither weights nor a device."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own exception, whichever implementation it is
        return [f"not an ONNX graph ({type(error).__name__}): export again"]
    if not model.graph.node or not model.graph.output:  # an empty file is a valid message of protobuf
        return ["not an ONNX graph, it has no nodes or no outputs: export again"]
    found = [*_operators(model, runtime), *_edges(model, artifact), *_leaks(model), *_inexact(model)]
    if runtime != "onnx":
        found += _memory(file)
    return found


def _operators(model: ModelProto, runtime: str) -> list[str]:
    allowed = COMMON | (ORT_ONLY if runtime == "onnx" else frozenset())
    wrong: dict[str, str] = {}
    for node in model.graph.node:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if node.domain not in ("", "ai.onnx") or node.op_type not in allowed:
            wrong.setdefault(kind, node.name)
    return [f"operator {kind} (node {name}) is not supported by {runtime}" for kind, name in sorted(wrong.items())]


def _edges(model: ModelProto, artifact: Artifact | None) -> list[str]:
    kinds = {"uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    names = {value: key for key, value in kinds.items()}
    found = []
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind not in names:
            actual = TensorProto.DataType.Name(kind).lower()
            found.append(f"{value.name} is {actual}: inputs and outputs must be {', '.join(kinds)}")
    ports = {port.name: port for port in artifact.inputs} if artifact else {}
    for value in model.graph.input:
        shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if not (port := ports.get(value.name)):
            continue
        if port.batched and not isinstance(shape[0], str):
            found.append(f"{value.name} has a fixed batch of {shape[0]}, but the profile is {artifact.profile}")
        if tuple(shape[port.batched :]) != port.shape:
            found.append(f"{value.name} is {shape}, outside the profile's {['B', *port.shape]}")
    return found


def _leaks(model: ModelProto) -> list[str]:
    """Return the nodes of the data path that compute on 64-bit integers."""
    int64 = {i.name for i in model.graph.initializer if i.data_type == TensorProto.INT64}
    found = []
    for node in model.graph.node:
        makes = node.op_type in ("Shape", "Size") or (
            node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.INT64 for a in node.attribute)
        )
        # an operator on shapes whose inputs are all 64-bit integers passes them on
        passes = node.op_type in SHAPES - {"Cast", "Equal", "Less", "Greater"} and node.input
        passes = passes and (
            {i for i in node.input if i} <= int64 if node.op_type != "Gather" else node.input[0] in int64
        )
        if makes or passes:
            int64.update(node.output)
        elif node.op_type not in SHAPES | TAKE_INT64 and int64 & set(node.input):
            found.append(f"node {node.name} ({node.op_type}) computes on 64-bit integers: cast to int32 before it")
    return found


def _inexact(model: ModelProto) -> list[str]:
    """Return nodes that compute something else than the PyTorch code that torch.onnx.export makes them from."""
    makers = {output: node for node in model.graph.node for output in node.output}
    constants, computed = _small_constants(model), _computed(model)
    found = []
    for node in model.graph.node:
        inputs = [makers[name] for name in node.input if name in makers]
        if node.op_type == "ScatterElements" and _reduction(node) == "none":
            found.append(
                f"node {node.name} (ScatterElements) keeps the last value where indices repeat, and "
                "scatter_reduce(mean) is exported so: divide a sum by a count instead"
            )
        elif node.op_type == "Log" and any(one.op_type == "Sigmoid" for one in inputs):
            found.append(
                f"node {node.name} (Log) of a sigmoid, as logsigmoid is exported, is -inf for large negative inputs: "
                "use -softplus(-x)"
            )
        elif node.op_type == "Log" and any(_adds_one(one, constants) for one in inputs):
            found.append(
                f"node {node.name} (Log) of 1 + x, as log1p is exported, loses x below 1e-7: "
                "compute the logarithm outside of the module"
            )
        elif node.op_type == "Log" and any(_sums_exponentials(one, makers) for one in inputs):
            found.append(
                f"node {node.name} (Log) of a running sum of exponentials, as logcumsumexp is exported, is -inf where "
                "the sum lies about 100 below its row's maximum: compute it outside of the module"
            )
        elif node.op_type == "Sub" and _is_exp_minus_one(node, makers, constants):
            found.append(
                f"node {node.name} (Sub) of exp(x) - 1, as expm1 is exported, loses x below 1e-7: "
                "use tanh(x / 2) * (exp(x) + 1)"
            )
        elif node.op_type == "Resize" and _attribute(node, "antialias") and not _attribute(node, "exclude_outside"):
            found.append(
                f"node {node.name} (Resize) with antialias=1 and exclude_outside=0 weighs pixels beyond the border, "
                "unlike Pillow and PyTorch: set exclude_outside=1"
            )
        elif _has_computed_mask(node, inputs, makers, constants, computed):
            found.append(
                f"node {node.name} ({node.op_type}) has a mask that is computed: a row that is masked entirely gives "
                "zeros or the mean, depending on the opset: keep one value of each row"
            )
    return found


def _small_constants(model: ModelProto) -> dict[str, np.ndarray]:
    """Return the constants that lie in the graph's own file and have at most 16 values."""
    return {
        one.name: numpy_helper.to_array(one)
        for one in model.graph.initializer
        if one.data_location != TensorProto.EXTERNAL and np.prod(one.dims, dtype=int) <= 16
    }


def _reduction(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")


def _adds_one(node: NodeProto, constants: dict[str, np.ndarray]) -> bool:
    return node.op_type == "Add" and any((constants[name] == 1).all() for name in node.input if name in constants)


def _is_exp_minus_one(node: NodeProto, makers: dict[str, NodeProto], constants: dict[str, np.ndarray]) -> bool:
    minuend, one = node.input
    is_exp = minuend in makers and makers[minuend].op_type == "Exp"
    return is_exp and one in constants and bool((constants[one] == 1).all())


def _sums_exponentials(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    return node.op_type == "CumSum" and node.input[0] in makers and makers[node.input[0]].op_type == "Exp"


def _attribute(node: NodeProto, name: str) -> int:
    """Return an integer attribute, 0 where the node has none."""
    return next((a.i for a in node.attribute if a.name == name), 0)


def _computed(model: ModelProto) -> set[str]:
    """Return the values that depend on the values of the graph's inputs, not only on their shapes."""
    computed = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and computed & set(node.input):
            computed.update(node.output)
    return computed


def _has_computed_mask(
    node: NodeProto,
    inputs: list[NodeProto],
    makers: dict[str, NodeProto],
    constants: dict[str, np.ndarray],
    computed: set[str],
) -> bool:
    """Return True for an attention or a softmax whose mask depends on the graph's inputs."""
    if node.op_type == "Attention":
        return len(node.input) > 3 and node.input[3] in computed
    if node.op_type != "Softmax":
        return False
    summands = [makers[name] for one in inputs if one.op_type == "Add" for name in one.input if name in makers]
    return any(
        one.op_type == "Where"
        and one.input[0] in computed
        and any((constants[name] < MASKED).all() for name in one.input[1:] if name in constants)
        for one in (*inputs, *summands)
    )


def _memory(file: Path) -> list[str]:
    weights = file.stat().st_size + sum(f.stat().st_size for f in file.parent.glob(f"{file.name}.data"))
    needed, free = BUILD_MEMORY * weights, _available()
    if needed > free:
        return [
            f"building takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: build elsewhere"
        ]
    return []


def _available() -> int:
    """Return the available memory in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
