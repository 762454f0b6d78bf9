"""PyTorch as a runtime: the reference of every check in float32, and the default on a GPU in bfloat16.

| precision      | what the encoder computes in                                                                        |
|----------------|-----------------------------------------------------------------------------------------------------|
| `fp32` `bf16`  | that dtype; without a precision bf16 on a GPU and fp32 on a CPU                                     |
| `fp8`          | 8-bit floats in the vision tower's linear layers (export/quantize/fp8.py), bf16 elsewhere           |
| `fp8-emulated` | the same 8-bit values on any device, multiplied in its usual dtype: slow, to see what captions lose |
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from export.components import TORCH_PRECISIONS
from export.graphs import Graph, load
from export.quantize.fp8 import to_fp8
from export.runtimes.base import EncoderRuntime, RuntimeUnavailable, Session
from export.runtimes.cuda_graphs import BatchGraphs, CudaCapture
from kernels.fp8_linear import has_fp8
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import one_line, say
from vlv.common.device import choose_device, inference_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchSession(Session):
    """Run a component's module in PyTorch."""

    def __init__(self, name: str, graph: Graph, device: torch.device):
        super().__init__(name, graph.inputs, None, device)
        self.graph = graph.to(device)
        self.replayed: BatchGraphs | None = None

    def capture(self, largest: int) -> None:
        """Run batches from CUDA graphs from now on, captured for sizes up to `largest` images. Raises RuntimeError."""
        (port,) = self.inputs
        like = torch.empty(port.at(1), dtype=getattr(torch, port.dtype), device=self.device)
        self.replayed = BatchGraphs(self.graph, like, largest, CudaCapture(self.device))

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        found = (self.replayed or self.graph)(*(values[port.name] for port in self.inputs))
        return dict(zip(self.graph.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))


class TorchRuntime(EncoderRuntime):
    """PyTorch, in one of the precisions above."""

    word = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        compiled: bool = False,
        precision: str | None = None,
        graphs: int = 0,
    ):
        """compiled: through torch.compile. graphs: images of the largest batch that CUDA graphs are captured for.

        Without `graphs`, on a CPU and with `compiled` the encoder runs without graphs. Raises ValueError,
        RuntimeUnavailable.
        """
        super().__init__()
        if precision not in (None, *TORCH_PRECISIONS):
            raise ValueError(f"no precision {precision!r} in PyTorch; there are {', '.join(TORCH_PRECISIONS)}")
        self.checkpoint = checkpoint
        self.compiled = compiled
        self.device = choose_device(device)
        self.graphs = graphs if self.device.type == "cuda" and not compiled else 0
        self._dtype = DTYPES.get(precision or "") or inference_dtype(self.device)
        self._fp8 = bool(precision) and precision.startswith("fp8")
        if precision == "fp8" and not has_fp8(self.device):
            raise RuntimeUnavailable(_no_fp8(self.device))
        self.dtype = "fp8" if self._fp8 else str(self._dtype).removeprefix("torch.")

    def _open(self, component: str) -> Session:
        graph = load(self.checkpoint, component)
        if self._dtype != torch.float32:
            graph.cast(self._dtype)
        if self._fp8 and component == "encoder":
            to_fp8(graph)
        session = TorchSession(component, graph, self.device)
        if self.compiled:
            session.graph.compile(dynamic=False)
        elif self.graphs and component == "encoder":
            _capture(session, self.graphs)
        return session

    @property
    def sampling(self) -> dict:
        return sampling_settings(self.checkpoint)


def _capture(session: TorchSession, largest: int) -> None:
    """Capture CUDA graphs, and say what memory they hold; where that fails, say why, and the session runs without."""
    try:
        session.capture(largest)
    except RuntimeError as error:  # CUDA's errors, too little memory among them
        say(f"{session.name}: runs without CUDA graphs, which could not be captured: {one_line(error, 200)}")
        return
    sizes, held = session.replayed.sizes, session.replayed.memory_bytes / 1e9
    say(f"{session.name}: CUDA graphs for batches of {', '.join(map(str, sizes))} hold {held:.1f} GB of GPU memory")


def _no_fp8(device: torch.device) -> str:
    """Return the sentence for a device without 8-bit floats."""
    what = "a CPU has none"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        what = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    return (
        f"--precision fp8 needs a GPU that multiplies 8-bit floats, of compute capability 8.9 or higher, and {what}: "
        "use bf16 or fp32, or fp8-emulated for the same captions without the speed"
    )


def sampling_settings(checkpoint: Checkpoint) -> dict:
    """Return what sampling needs beside the graphs: the scheduler, the latents' shape, the ids of the empty prompt."""
    from transformers import CLIPTokenizer  # a second of imports that captioning does not need

    folder = checkpoint.t2i
    unet = json.loads((folder / "unet" / "config.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return {
        "scheduler": json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        "latents": [unet["in_channels"], unet["sample_size"], unet["sample_size"]],
        "empty_ids": tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids,
    }
