"""Look at a graph for seconds before an engine is built from it for minutes: python -m export.lint FILE.onnx …

Unsupported operators, 64-bit integers that leak into the data path, shapes that do not follow the profile, and the
memory that building will take. Reads the graph, not the weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export import cli

if TYPE_CHECKING:
    from export.manifest import Artifact

# Of the standard operators, those that a trace of our modules can bring and that TensorRT 11 and TensorRT-RTX 1.7
# parse (onnx-tensorrt, docs/operators.md), with the integer products that ONNX Runtime alone runs.
COMMON = frozenset(
    """Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSigmoid Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log MatMul Max MaxPool Mean Min Mod
    Mul Neg Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    Relu Reshape Resize Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax SpaceToDepth Split
    Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor""".split()
)
ORT_ONLY = frozenset(("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"))
# where 64-bit integers belong: shapes and indices
SHAPES = frozenset(
    """Shape Size Gather Concat Constant ConstantOfShape Slice Squeeze Unsqueeze Reshape Expand Range Cast Identity
    Add Sub Mul Div Mod Min Max Equal Where Less Greater GreaterOrEqual LessOrEqual Trilu ScatterND
    ReduceProd""".split()
)
BUILD_MEMORY = 3.2  # peak memory of a TensorRT-RTX build over the weights' size: 13.8 GB for 4.3 GB, measured


def problems(file: Path, artifact: Artifact | None = None, runtime: str = "onnx") -> list[str]:
    """What is wrong with an ONNX file for a runtime; empty where nothing is. Needs neither weights nor a device."""
    import onnx

    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own type, wherever it comes from
        return [f"{file} is no ONNX graph ({type(error).__name__}): export again"]
    found = [*_operators(model, runtime), *_edges(model, artifact), *_leaks(model)]
    if runtime != "onnx":
        found += _memory(file, model)
    return found


def _operators(model, runtime: str) -> list[str]:
    allowed = COMMON | (ORT_ONLY if runtime == "onnx" else frozenset())
    wrong: dict[str, str] = {}
    for node in model.graph.node:
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        if node.domain not in ("", "ai.onnx") or node.op_type not in allowed:
            wrong.setdefault(kind, node.name)
    return [f"operator {kind} (node {name}) is not one that {runtime} runs" for kind, name in sorted(wrong.items())]


def _edges(model, artifact: Artifact | None) -> list[str]:
    import onnx

    kinds = {"uint8": onnx.TensorProto.UINT8, "int32": onnx.TensorProto.INT32, "float32": onnx.TensorProto.FLOAT}
    names = {value: key for key, value in kinds.items()}
    found = []
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind not in names:
            found.append(
                f"{value.name} is {onnx.TensorProto.DataType.Name(kind).lower()}: edges are {', '.join(kinds)}"
            )
    ports = {port.name: port for port in artifact.inputs} if artifact else {}
    for value in model.graph.input:
        shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if not (port := ports.get(value.name)):
            continue
        if port.batched and not isinstance(shape[0], str):
            found.append(f"{value.name} has a fixed batch of {shape[0]}, and the profile is {artifact.profile}")
        if tuple(shape[port.batched :]) != port.shape:
            found.append(f"{value.name} is {shape}, outside the profile's {['B', *port.shape]}")
    return found


def _leaks(model) -> list[str]:
    """Nodes of the data path that take or give 64-bit integers."""
    import onnx

    wide = {i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT64}
    found = []
    for node in model.graph.node:
        gives = node.op_type in ("Shape", "Size") or (
            node.op_type == "Cast" and any(a.name == "to" and a.i == onnx.TensorProto.INT64 for a in node.attribute)
        )
        # an op of shapes that sees nothing but 64-bit integers passes them on
        passes = node.op_type in SHAPES - {"Cast", "Equal", "Less", "Greater"} and node.input and (
            {i for i in node.input if i} <= wide if node.op_type != "Gather" else node.input[0] in wide
        )  # fmt: skip
        if gives or passes:
            wide.update(node.output)
        elif node.op_type not in SHAPES | {"Split", "Tile", "Pad", "Resize", "ReduceMean", "ReduceSum", "Transpose",
                                           "GatherElements", "TopK", "Range"} and wide & set(node.input):  # fmt: skip
            found.append(f"node {node.name} ({node.op_type}) computes on 64-bit integers: cast to int32 before it")
    return found


def _memory(file: Path, model) -> list[str]:
    weights = file.stat().st_size + sum(f.stat().st_size for f in file.parent.glob(f"{file.name}.data"))
    needed, free = BUILD_MEMORY * weights, _available()
    if needed > free:
        return [
            f"building takes about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: build elsewhere"
        ]
    return []


def _available() -> int:
    """Bytes of memory that can be had now."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = cli.parser("lint", __doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="ONNX graphs")
    p.add_argument("--runtime", default="rtx", choices=("onnx", "rtx", "trt"), help="what is to run them (rtx)")
    return cli.run(p.parse_args(argv), _lint)


def _lint(args: argparse.Namespace) -> int:
    found = []
    for file in args.files:
        if not file.is_file():
            raise cli.Misuse(f"no file {file}")
        found += [f"{file}: {problem}" for problem in problems(file, None, args.runtime)]
    for problem in found:
        cli.say(f"error: {problem}")
    if not found:
        print(f"{len(args.files)} graphs without complaint")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
