"""Run graphs in ONNX Runtime: on the CPU, on CUDA (with CUDA graphs), and through its TensorRT provider.

Inputs and outputs are bound in place: nothing is copied between host and device. A CUDA graph replays fixed
addresses, so such a session keeps one set of buffers per batch size and copies changed inputs into it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from export.manifest import Artifact, ArtifactError
from export.quantize.bf16_upcast import upcast
from export.runtimes.base import ArtifactRuntime, RuntimeUnavailable, Session
from vlv.common.command import one_line

_NUMPY = {"uint8": np.uint8, "int32": np.int32, "float32": np.float32}
_GPU_WHEEL = "python -m pip install --no-deps onnxruntime-gpu"


class OrtSession(Session):
    """Run a graph in ONNX Runtime."""

    def __init__(
        self,
        artifact: Artifact,
        folder: Path,
        providers: list,
        device: torch.device,
        graphs: bool = False,
        threads: int | None = None,
    ):
        """providers: ONNX Runtime's list, the preferred one first; graphs: replay CUDA graphs; threads: of a CPU."""
        super().__init__(artifact.name, artifact.inputs, artifact.profile, device)
        self.outputs = artifact.outputs
        self.graphs = graphs
        options, file = session_options(threads), folder / artifact.main_file
        emulated = device.type == "cpu" and artifact.precision == "bf16"
        if emulated:  # the optimizer would remove the casts that round
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            with _upcast_file(file) if emulated else contextlib.nullcontext(file) as graph, flushed():
                self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # ONNX Runtime's have no common class, onnx raises protobuf's
            raise ArtifactError(
                f"ONNX Runtime does not load {file} ({one_line(error)}); make it again: {artifact.command}"
            ) from error
        given = {value.name: value.shape[1:] for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        for port in (*self.inputs, *self.outputs):
            if port.batched and given.get(port.name) != list(port.shape):
                raise ArtifactError(
                    f"{file} has {port.name} as {given.get(port.name)}, its entry in the manifest as "
                    f"{list(port.shape)}; make it again: {artifact.command}"
                )
        self._buffers: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._held: dict[tuple[int, str], Tensor] = {}

    @classmethod
    def on_cpu(cls, artifact: Artifact, folder: Path) -> OrtSession:
        """Open an artifact on the CPU, where every export is checked."""
        return cls(artifact, folder, ["CPUExecutionProvider"], torch.device("cpu"))

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        options = onnxruntime.RunOptions()
        if self.graphs:
            values, found = self._fixed(values, batch)
            options.add_run_config_entry("gpu_graph_id", str(batch))
        else:
            found = self._outputs(batch)
        binding = self.session.io_binding()
        where = (self.device.type, self.device.index or 0)
        for port in self.inputs:
            value = values[port.name]
            binding.bind_input(port.name, *where, _NUMPY[port.dtype], tuple(value.shape), value.data_ptr())
        for port in self.outputs:
            value = found[port.name]
            binding.bind_output(port.name, *where, _NUMPY[port.dtype], tuple(value.shape), value.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        with flushed():
            self.session.run_with_iobinding(binding, options)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        return {name: value.clone() for name, value in found.items()} if self.graphs else found

    def _outputs(self, batch: int) -> dict[str, Tensor]:
        return {
            port.name: torch.empty(port.at(batch), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.outputs
        }

    def _fixed(self, values: dict[str, Tensor], batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the buffers of a batch size after copying `values` into the inputs."""
        if batch not in self._buffers:
            self._buffers[batch] = ({k: torch.empty_like(v) for k, v in values.items()}, self._outputs(batch))
        inputs, outputs = self._buffers[batch]
        for name, value in values.items():
            # the keys and values of one context come again at every step, and nothing writes into them
            if not name.startswith("kv_") or self._held.get((batch, name)) is not value:
                inputs[name].copy_(value)
                self._held[batch, name] = value
        return inputs, outputs


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return the options of every session that runs; threads: of a CPU, None for as many as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()  # ONNX Runtime itself ignores OMP_NUM_THREADS
    options.log_severity_level = 3  # errors only: the warnings are about its own optimizer
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in its threads; see `flushed`
    return options


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Flush denormal numbers (below 1e-38) to zero in this thread, which computes beside the session's own threads.

    A sharp softmax leaves such numbers, and products with them take a hundred times as long.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _upcast_file(file: Path) -> Iterator[Path]:
    """Write a bfloat16 graph as a CPU can run it, beside its external data; deleted when the block ends."""
    twin = file.with_name(f".upcast-{os.getpid()}-{file.name}")
    try:
        onnx.save(upcast(onnx.load(file, load_external_data=False)), twin)
        yield twin
    finally:
        twin.unlink(missing_ok=True)


class OrtRuntime(ArtifactRuntime):
    """ONNX Runtime on the CPU."""

    word = "onnx"
    device = torch.device("cpu")
    provider = "CPUExecutionProvider"
    graphs = False  # True: its sessions replay CUDA graphs

    def __init__(self, artifacts, checkpoint=None):
        have = onnxruntime.get_available_providers()
        if self.provider not in have:
            raise RuntimeUnavailable(
                f"this ONNX Runtime has no {self.provider} (it has {', '.join(have)}): {_GPU_WHEEL}"
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailable(f"the runtime {self.word} needs a CUDA device, and PyTorch sees none: use onnx")
        super().__init__(artifacts, checkpoint)

    def providers(self, artifact: Artifact) -> list:
        return [self.provider]

    def _open(self, component: str) -> Session:
        artifact = self.checked(component)
        return OrtSession(
            artifact, self.manifest.folder, self.providers(artifact), self.device, self.graphs, self.threads
        )


class OrtCudaRuntime(OrtRuntime):
    """ONNX Runtime on CUDA, replaying one CUDA graph per batch size."""

    word = "onnx-cuda"
    device = torch.device("cuda", 0)
    provider = "CUDAExecutionProvider"
    graphs = True

    def providers(self, artifact: Artifact) -> list:
        return [(self.provider, {"device_id": 0, "enable_cuda_graph": "1"})]


class OrtTensorRTRuntime(OrtRuntime):
    """ONNX Runtime's TensorRT provider; its engines are cached beside the artifacts."""

    word = "onnx-trt"
    device = torch.device("cuda", 0)
    provider = "TensorrtExecutionProvider"

    def providers(self, artifact: Artifact) -> list:
        cache = self.manifest.folder / "trt-cache"
        sizes = {"min": artifact.profile.min, "opt": artifact.profile.opt, "max": artifact.profile.max}
        shapes = {
            f"trt_profile_{kind}_shapes": ",".join(
                f"{port.name}:{'x'.join(map(str, port.at(size)))}" for port in artifact.inputs
            )
            for kind, size in sizes.items()
        }
        settings = {
            "device_id": 0, "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache),
            # the graph's hash: an engine of other weights is never reused
            "trt_engine_cache_prefix": f"{artifact.component}-{artifact.graph[:16]}", **shapes,
        }  # fmt: skip
        return [(self.provider, settings), ("CUDAExecutionProvider", {"device_id": 0})]
