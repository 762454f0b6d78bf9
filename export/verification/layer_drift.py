"""Compare a graph with the reference block by block, to find where it drifts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from export.components import tolerance
from export.graphs import Graph
from export.manifest import Artifact
from export.quantize.bf16_upcast import upcast


def compare(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest error over the largest magnitude, and the RMS error over the RMS.

    Both are 0 where the values are equal, as zeros are, and inf where the expected ones alone are all zero.
    """
    difference, expected = found.double() - expected.double(), expected.double()
    return {
        "max": _ratio(difference.abs().max(), expected.abs().max()),
        "rms": _ratio(difference.square().mean().sqrt(), expected.square().mean().sqrt()),
    }


def _ratio(error: Tensor, size: Tensor) -> float:
    return 0.0 if error == 0 else (error / size).item()


def drift(artifact: Artifact, folder: Path, graph: Graph, inputs: dict[str, Tensor]) -> list[dict]:
    """Return per block its path, its RMS error relative to the reference's RMS, and whether that exceeds the tolerance.

    graph: the float32 module; inputs: by name. Blocks that optimization removed are left out.
    """
    expected = reference_outputs(graph, tuple(artifact.blocks), inputs)
    found = _graph_outputs(artifact, folder, inputs)
    report = []
    for depth, path in enumerate(artifact.blocks, 1):
        if path not in found or found[path].size != expected[path].numel():
            continue
        error = compare(torch.from_numpy(found[path]).flatten(), expected[path].flatten())["rms"]
        allowed = tolerance(artifact.precision, depth, graph.longest_sum)
        report.append({"block": path, "rms": error, "drifts": not error <= allowed})
    return report


@torch.inference_mode()
def reference_outputs(graph: Graph, paths: tuple[str, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the float32 module; return the (first) output of each block."""
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module, args, output):
            found[path] = output if isinstance(output, Tensor) else output[0]

        return hook

    hooks = [graph.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        graph(*(inputs[port.name] for port in graph.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _graph_outputs(artifact: Artifact, folder: Path, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Run a copy of the artifact's graph that has the blocks' values as outputs; return them by path."""
    model = onnx.load(folder / artifact.main_file, load_external_data=False)
    produced = {output for node in model.graph.node for output in node.output}
    names = {path: value for path, value in artifact.blocks.items() if value in produced}
    if not names:
        return {}
    for path, value in names.items():
        # a cast, because NumPy has no bfloat16
        model.graph.node.append(onnx.helper.make_node("Cast", [value], [f"block:{path}"], to=onnx.TensorProto.FLOAT))
        model.graph.output.append(onnx.ValueInfoProto(name=f"block:{path}"))
    if artifact.precision == "bf16":
        model = upcast(model)
    copy = folder / f".blocks-{os.getpid()}-{artifact.main_file}"  # beside its external data
    try:
        onnx.save(model, copy)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if artifact.precision == "bf16":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(copy, options, providers=["CPUExecutionProvider"])
        values = session.run([f"block:{p}" for p in names], {n: v.numpy() for n, v in inputs.items()})
    finally:
        copy.unlink(missing_ok=True)
    return dict(zip(names, values, strict=True))
