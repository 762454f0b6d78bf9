"""PyTorch as a runtime: the reference of every check in float32, and the default on a GPU in bfloat16."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from export.graphs import Graph, load
from export.runtimes.base import EncoderRuntime, Session
from vlv.checkpoints.folder import Checkpoint
from vlv.common.device import choose_device, inference_dtype


class TorchSession(Session):
    """Run a component's module in PyTorch."""

    def __init__(self, name: str, graph: Graph, device: torch.device):
        super().__init__(name, graph.inputs, None, device)
        self.graph = graph.to(device)

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        found = self.graph(*(values[port.name] for port in self.inputs))
        return dict(zip(self.graph.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))


class TorchRuntime(EncoderRuntime):
    """PyTorch: bfloat16 on a GPU, float32 on a CPU."""

    word = "torch"

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, compiled: bool = False):
        """compiled: through torch.compile."""
        super().__init__()
        self.checkpoint = checkpoint
        self.compiled = compiled
        self.device = choose_device(device)
        self._dtype = inference_dtype(self.device)
        self.dtype = str(self._dtype).removeprefix("torch.")

    def _open(self, component: str) -> Session:
        graph = load(self.checkpoint, component)
        if self._dtype != torch.float32:
            graph.cast(self._dtype)
        session = TorchSession(component, graph, self.device)
        if self.compiled:
            session.graph.compile(dynamic=False)
        return session

    @property
    def sampling(self) -> dict:
        return sampling_settings(self.checkpoint)


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
