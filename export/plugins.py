"""Put our fused kernels into TensorRT engines: an ONNX graph with a node per kernel, and the plugins that run them.

`make` does all of it for one component:

- `add_bodies` completes a graph traced with nodes (kernels/tensorrt/onnx_nodes.py): each node becomes a call of an
  ONNX function whose body is the operation's plain reference. So any runtime runs the file, and ONNX Runtime compares
  it with the graph without nodes.
- `kernel_graph` turns it into the graph that TensorRT builds from: one node per kernel, no functions, a fixed batch.
- `register` makes the plugins known to TensorRT: quick-deployable ones, compiled ahead of time from our Triton source,
  so that the engine needs no Python. Their names carry the hash of their code: no timing of other code is reused.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import onnx
import onnx_ir
import torch
from onnx.inliner import inline_local_functions
from torch import nn

import kernels
from export import trace
from export.components import PEAK, tolerance
from export.graphs import load
from export.manifest import Artifact, ArtifactError
from export.quantize.precision import DTYPES
from export.runtimes.onnxruntime import OrtSession
from export.verification.inputs import NOISE, VerificationInputs
from export.verification.verifier import compare
from kernels.tensorrt.onnx_nodes import DOMAIN, FLOATS, OPERATIONS
from kernels.tensorrt.plugin import PluginKernel, plugin_kernels
from vlv.checkpoints.folder import Checkpoint

VERIFICATION_INPUTS = NOISE + 1  # images that a graph with nodes is compared on

_SIGNATURE = "vlv.signature"  # key of a function's metadata
_BODY_BATCH = 5  # batch while tracing a body
PTX_VERSION = 88  # of CUDA 12.9: new enough for all our targets, old enough for every TensorRT 11


@dataclass(frozen=True)
class Signature:
    """One operation at one size: everything that a node's kernels and its body depend on."""

    operation: str
    inputs: tuple[tuple[int, tuple[int | None, ...]], ...]  # ONNX's number of the dtype, and the shape; None: the batch
    attributes: dict[str, int | float]

    @classmethod
    def of(cls, node) -> Signature:
        """Return the signature of a traced node. Raises ValueError where a size other than the batch is not known."""
        inputs = []
        for value in node.inputs:
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
            if None in shape[1:]:
                raise ValueError(f"{node.name} ({node.op_type}): the shape of {value.name} is not known, {value.shape}")
            inputs.append((int(value.dtype), shape))
        return cls(node.op_type, tuple(inputs), {name: a.value for name, a in node.attributes.items()})

    @classmethod
    def read(cls, text: str) -> Signature:
        """Parse what `text` returns."""
        values = json.loads(text)
        inputs = tuple((dtype, tuple(shape)) for dtype, shape in values["inputs"])
        return cls(values["operation"], inputs, values["attributes"])

    def text(self) -> str:
        """Return the signature as JSON."""
        return json.dumps(vars(self), sort_keys=True)

    @property
    def name(self) -> str:
        return f"{self.operation}_{hashlib.sha256(self.text().encode()).hexdigest()[:8]}"

    def empty(self, batch: int, device: str) -> list[torch.Tensor]:
        """Return inputs of a batch, filled with zeros."""
        sizes = [(FLOATS[dtype], [batch if n is None else n for n in shape]) for dtype, shape in self.inputs]
        return [torch.zeros(shape, dtype=dtype, device=device) for dtype, shape in sizes]


class _Body(nn.Module):
    """Compute an operation's reference as a node does, without unused results."""

    def __init__(self, signature: Signature, results: int):
        super().__init__()
        self.signature, self.results = signature, results

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        operation = OPERATIONS[self.signature.operation]
        return operation.call(operation.reference, inputs, self.signature.attributes)[: self.results]


def make(
    checkpoint: Checkpoint, graph: Artifact, work_dir: Path, plain: Path, target: str
) -> tuple[Path, dict[str, PluginKernel]] | None:
    """Write the file in `work_dir` that TensorRT builds from; return it and its plugins, or None if nothing is fused.

    plain: the graph's own file, which the new one is compared with in ONNX Runtime. Raises ArtifactError.
    """
    module = load(checkpoint, graph.component).fuse()
    if graph.precision in DTYPES:
        module.cast(DTYPES[graph.precision], graph.fp32_blocks)
    file = work_dir / f"{graph.component}.nodes.onnx"
    trace.to_onnx(module, file, graph.profile, graph.opset, add_bodies)
    model = onnx_ir.load(file)
    if not model.functions:
        return None
    _require_equal(checkpoint, graph, module.longest_sum, file, plain)
    plugins = kernel_graph(model, graph.profile.max, int(target.removeprefix("sm")))
    built = work_dir / f"{graph.component}.plugins.onnx"
    onnx_ir.save(model, built)  # weights in a file of their own stay there
    return built, plugins


def _require_equal(checkpoint: Checkpoint, graph: Artifact, longest_sum: int, file: Path, plain: Path) -> None:
    """Raise ArtifactError unless both files compute the same in ONNX Runtime, on an image and on noise."""
    if graph.precision == "bf16":  # a CPU runs it operator by operator
        onnx.save(inline_local_functions(onnx.load(file, load_external_data=False)), file)
    sessions = [OrtSession.on_cpu(replace(graph, files={one.name: {}}), one.parent) for one in (file, plain)]
    allowed = tolerance(graph.precision, len(graph.blocks), longest_sum)
    for inputs in VerificationInputs(checkpoint, VERIFICATION_INPUTS).inputs(graph.component):
        few = {p.name: inputs[p.name][: graph.profile.max] if p.batched else inputs[p.name] for p in graph.inputs}
        found, expected = (session(**few) for session in sessions)
        for name, value in expected.items():
            figures = compare(found[name], value)
            if not (figures["rms"] <= allowed and figures["max"] <= PEAK * allowed):
                raise ArtifactError(
                    f"{graph.component} with plugin nodes differs from its plain graph in {name} by "
                    f"{figures['rms']:.1e} RMS ({allowed:.1e} allowed): build with --plugins off"
                )


def add_bodies(model, opset: int) -> None:
    """Give every node of our domain in a traced onnx_ir model its function, one for all nodes of the same signature."""
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        node.resize_outputs(len(used))  # attention's log-sums, which only a gradient reads, come last
        signature = Signature.of(node)
        key = (DOMAIN, signature.name, "")
        if key not in model.functions:
            model.functions[key] = _function(signature, len(used), opset)
        node.op_type = signature.name
        node.attributes.clear()


def _function(signature: Signature, results: int, opset: int):
    """Return the body as an ONNX function with its constants inside; its metadata hold the signature."""
    axis = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes = tuple({0: axis} if shape[0] is None else {} for _, shape in signature.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Body(signature, results).eval(),
            tuple(signature.empty(_BODY_BATCH, "cpu")),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    graph = program.model.graph
    for value in list(graph.initializers.values()):
        constant = onnx_ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].name = f"{value.name}_constant"
        value.replace_all_uses_with(constant.outputs[0])
        graph.insert_before(graph[0], constant)
    graph.initializers.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
    function = onnx_ir.Function(DOMAIN, signature.name, graph=graph, attributes=[])
    function.metadata_props[_SIGNATURE] = signature.text()
    return function


def kernel_graph(model, batch: int, sm: int) -> dict[str, PluginKernel]:
    """Change an onnx_ir model with our nodes into one that TensorRT builds from; return its plugins by name.

    batch: the only batch of the engine. sm: its compute capability, 90 for sm90. Raises ValueError.
    """
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else batch for size in value.shape])
    kernels_of, plugins = {}, {}
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        if node.op_type not in kernels_of:
            function = model.functions[DOMAIN, node.op_type, ""]
            kernels_of[node.op_type] = _plugin_kernels(Signature.read(function.metadata_props[_SIGNATURE]), batch, sm)
        node_kernels, results = kernels_of[node.op_type]
        values = dict(enumerate(node.inputs))
        for kernel in node_kernels:
            name = f"{kernel.kernel.replace('.', '_')}_{hashlib.sha256(kernel.ptx.encode()).hexdigest()[:12]}"
            plugins[name] = kernel
            attributes = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
            new_node = onnx_ir.node(
                name, [values[i] for i in kernel.inputs], attributes, domain=DOMAIN, num_outputs=len(kernel.outputs)
            )
            new_node.name = f"{node.name}_{kernel.kernel}"
            values |= zip(kernel.outputs, new_node.outputs, strict=True)
            for number, value, like in zip(kernel.outputs, new_node.outputs, kernel.written, strict=True):
                value.name, value.shape = f"{new_node.name}_{number}", onnx_ir.Shape(like.shape)
                value.dtype = onnx_ir.DataType(next(kind for kind, dtype in FLOATS.items() if dtype == like.dtype))
            model.graph.insert_before(node, new_node)
        for old, number in zip(node.outputs, results, strict=False):
            new = values[number]
            new.name, old.name = old.name, f"{old.name}_replaced"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.functions.clear()
    return plugins


def _plugin_kernels(signature: Signature, batch: int, sm: int) -> tuple[list[PluginKernel], tuple[int, ...]]:
    """Return the kernels of an operation at a batch size, and the numbers of the tensors that are its results."""
    operation, inputs = OPERATIONS[signature.operation], signature.empty(batch, "meta")
    compiled, results = plugin_kernels(
        lambda: operation.call(operation.op._init_fn, inputs, signature.attributes), inputs, sm, PTX_VERSION
    )
    # the shapes of a node's tensors, which are contiguous in memory
    laid = [replace(kernel, written=tuple(map(operation.laid, kernel.written))) for kernel in compiled]
    if gaps := [one.kernel for one in laid if not all(x.is_contiguous() for x in one.written)]:
        raise ValueError(f"{gaps[0]} writes a tensor with gaps, which TensorRT does not have")
    return laid, results


def register(trt: ModuleType, plugins: dict[str, PluginKernel]) -> None:
    """Make the plugins known to TensorRT's parser, unless it knows them already."""
    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    for name, kernel in plugins.items():
        if not hasattr(trtp.op.define_or_get(DOMAIN), name):
            _register(trt, trtp, f"{DOMAIN}::{name}", kernel)


def _register(trt: ModuleType, trtp: ModuleType, plugin: str, kernel: PluginKernel) -> None:
    kinds = {torch.float32: trt.DataType.FLOAT, torch.float16: trt.DataType.HALF, torch.bfloat16: trt.DataType.BF16}
    names = [f"input_{i}" for i in range(len(kernel.inputs))]
    tensors = tuple[(trtp.TensorDesc,) * len(kernel.outputs)]

    def describe(*_inputs):
        return tuple(trtp.from_shape_expr(tuple(x.shape), kinds[x.dtype]) for x in kernel.written)

    def launch(*_inputs_outputs_tactic):
        parameters = trtp.KernelLaunchParams()
        for axis, blocks, threads in zip("xyz", kernel.grid, kernel.block, strict=True):
            setattr(parameters, f"grid_{axis}", blocks)
            setattr(parameters, f"block_{axis}", threads)
        parameters.shared_mem = kernel.shared
        return kernel.name, kernel.ptx, parameters, trtp.SymIntExprs(0)

    # TensorRT reads the number of tensors and attributes from the functions' signatures
    launched = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    describe.__signature__ = _signature(dict.fromkeys(names, trtp.TensorDesc), tensors)
    arguments = {**dict.fromkeys(names, trtp.TensorDesc), "outputs": tensors, "tactic": int}
    launch.__signature__ = _signature(arguments, launched)
    trtp.register(plugin)(describe)
    trtp.aot_impl(plugin)(launch)


def _signature(arguments: dict[str, type], result: type) -> inspect.Signature:
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, either, annotation=kind) for name, kind in arguments.items()], return_annotation=result
    )


def source_hash() -> str:
    """Return the hash of everything that the plugins are compiled from, in hex."""
    folder = Path(kernels.__file__).parent
    found = hashlib.sha256(version("triton").encode())
    for file in sorted([*folder.rglob("*.py"), folder / "tuned.json"]):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
