"""ONNX Runtime sessions: on the CPU, on CUDA (with CUDA graphs), and through its TensorRT provider.

Inputs and outputs are bound where they are, so nothing is copied between host and device. A CUDA graph replays
fixed addresses: such a session keeps a set of buffers a batch size, and copies into them what has changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from export.manifest import Artifact
from export.quantize.bf16_upcast import widen
from export.runtimes.base import ArtifactRuntime, RuntimeUnavailable, Session

if TYPE_CHECKING:
    import onnxruntime

_NUMPY = {"uint8": np.uint8, "int32": np.int32, "float32": np.float32}
_GPU_WHEEL = "python -m pip install --no-deps onnxruntime-gpu"


class OrtSession(Session):
    """A graph in ONNX Runtime."""

    def __init__(self, artifact: Artifact, folder: Path, providers: list, device: torch.device, graphs: bool = False):
        """providers: ONNX Runtime's list, the wanted one first; graphs: replay CUDA graphs."""
        import onnxruntime

        super().__init__(artifact.name, artifact.inputs, artifact.profile, device)
        self.outputs, self.graphs = artifact.outputs, graphs
        options, file = session_options(), folder / artifact.main_file
        wide = device.type == "cpu" and artifact.precision == "bf16"
        if wide:  # all as it is: the optimizer would take the roundings for superfluous
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with _widened(file) if wide else contextlib.nullcontext(file) as graph, flushed():
            self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self._buffers: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._held: dict[tuple[int, str], Tensor] = {}

    @classmethod
    def on_cpu(cls, artifact: Artifact, folder: Path) -> OrtSession:
        """On the CPU, where every export is checked."""
        return cls(artifact, folder, ["CPUExecutionProvider"], torch.device("cpu"))

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        import onnxruntime

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
        """The buffers of a batch size, with `values` in them."""
        if batch not in self._buffers:
            self._buffers[batch] = ({k: torch.empty_like(v) for k, v in values.items()}, self._outputs(batch))
        inputs, outputs = self._buffers[batch]
        for name, value in values.items():
            # the same context's keys and values come at every step, and nobody writes into them
            if not name.startswith("kv_") or self._held.get((batch, name)) is not value:
                inputs[name].copy_(value)
                self._held[batch, name] = value
        return inputs, outputs


def session_options() -> onnxruntime.SessionOptions:
    """What all sessions that are used, not inspected, have in common."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about its own optimizer
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in its threads; see `flushed`
    return options


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Numbers below 1e-38 count as zero in this thread, which runs a session beside the session's own ones.

    A sharp softmax leaves such numbers, and products with them take a hundred times as long.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _widened(file: Path) -> Iterator[Path]:
    """A bfloat16 graph as a CPU can run it, beside its external data as long as it is being loaded."""
    import onnx

    twin = file.with_name(f".wide-{os.getpid()}-{file.name}")
    try:
        onnx.save(widen(onnx.load(file, load_external_data=False)), twin)
        yield twin
    finally:
        twin.unlink(missing_ok=True)


class OrtRuntime(ArtifactRuntime):
    """ONNX Runtime on the CPU."""

    word = "onnx"
    device = torch.device("cpu")
    provider = "CPUExecutionProvider"
    graphs = False  # whether its sessions replay CUDA graphs

    def __init__(self, artifacts, checkpoint=None):
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeUnavailable(
                "ONNX Runtime is not installed: python -m pip install --no-deps -r requirements/cpu.lock"
            ) from error
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
        return OrtSession(artifact, self.manifest.folder, self.providers(artifact), self.device, self.graphs)


class OrtCudaRuntime(OrtRuntime):
    """ONNX Runtime on CUDA, replaying a CUDA graph a batch size."""

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
        sizes = {"min": artifact.profile.least, "opt": artifact.profile.usual, "max": artifact.profile.most}
        shapes = {
            f"trt_profile_{kind}_shapes": ",".join(
                f"{port.name}:{'x'.join(map(str, port.at(size)))}" for port in artifact.inputs
            )
            for kind, size in sizes.items()
        }
        settings = {
            "device_id": 0, "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache),
            # the graph's hash, so that an engine of other weights is never taken for this one's
            "trt_engine_cache_prefix": f"{artifact.component}-{artifact.graph[:16]}", **shapes,
        }  # fmt: skip
        return [(self.provider, settings), ("CUDAExecutionProvider", {"device_id": 0})]


ENGINES = {engine.word: engine for engine in (OrtRuntime, OrtCudaRuntime, OrtTensorRTRuntime)}
