"""Run engines of TensorRT and TensorRT-RTX on the GPU that they were built for.

The target and the builder's version are compared with the device and the library before an engine is deserialized.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from export.manifest import Artifact, ArtifactError
from export.runtimes.base import ArtifactRuntime, RuntimeUnavailable, Session
from export.runtimes.tensorrt_library import LIBRARIES, Library, Log, device_target


class TrtSession(Session):
    """Run an engine on torch's current stream and torch's tensors."""

    def __init__(self, library: Library, artifact: Artifact, file: Path, device: torch.device):
        super().__init__(artifact.name, artifact.inputs, artifact.profile, device)
        self.outputs = artifact.outputs
        trt = library.load()
        self._log = Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{file} cannot be loaded ({self._log.last()}); make it again: {artifact.command}")
        self._context = self._engine.create_execution_context()
        batched = next(port.name for port in self.inputs if port.batched)
        self._fixed_batch = self._engine.get_tensor_shape(batched)[0]  # -1: any of the profile; fixed with plugins

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        size = batch if self._fixed_batch < 0 else self._fixed_batch
        if size > batch:
            ports = {port.name: port for port in self.inputs}
            values = {k: pad_batch(v, size) if ports[k].batched else v for k, v in values.items()}
        found = {
            port.name: torch.empty(port.at(size), dtype=getattr(torch, port.dtype), device=self.device)
            for port in self.outputs
        }
        for name, value in values.items():
            self._context.set_input_shape(name, tuple(value.shape))
        for name, value in {**values, **found}.items():
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError(f"{self.name} failed: {self._log.last()}")
        return {name: value[:batch] for name, value in found.items()}


def pad_batch(x: Tensor, size: int) -> Tensor:
    """Repeat the last row of x until it has `size` rows."""
    return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


class RtxRuntime(ArtifactRuntime):
    """TensorRT-RTX."""

    word = runtime = "rtx"

    def __init__(self, artifacts, checkpoint=None):
        self.library = LIBRARIES[self.runtime]
        self.library.load()
        self.target = device_target()
        if not self.target:
            raise RuntimeUnavailable(
                f"the runtime {self.word} needs a CUDA device, and there is none: use onnx or torch"
            )
        self.device = torch.device("cuda", 0)
        super().__init__(artifacts, checkpoint)

    def _open(self, component: str) -> Session:
        artifact = self.checked(component)
        require_builder(self.library, artifact)
        return TrtSession(self.library, artifact, self.manifest.folder / artifact.main_file, self.device)


class TrtRuntime(RtxRuntime):
    """TensorRT."""

    word = runtime = "trt"


def require_builder(library: Library, artifact: Artifact) -> None:
    """Raise ArtifactError unless the engine was built by this version of the library."""
    if artifact.builder != library.builder:
        raise ArtifactError(
            f"{artifact.name} was built by {artifact.builder}, and this is {library.builder}; "
            f"make it again: {artifact.command}"
        )
