"""Run an export with any runtime: the same two calls, whatever is behind them.

    engine = open_runtime("onnx", artifacts="out/vlv", checkpoint=checkpoint)
    prompts = engine.encode(images)          # uint8 [B, 3, S, S] -> [B, N, H]
    pictures = engine.reconstruct(engine.context(images))      # 50 steps -> uint8 [B, 3, S, S]

An EncoderRuntime keeps a Session a component; a Session runs one graph. A runtime is one kind of Session: PyTorch
here, ONNX
Runtime in engine_ort.py, TensorRT and TensorRT-RTX in engine_trt.py.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.components import RUNTIMES, Batch, Port
from export.manifest import ArtifactError, Manifest, source_hash
from vlv.checkpoints.folder import Checkpoint


class RuntimeUnavailable(ArtifactError):
    """The library or the device for a runtime is not here; the message says how to get it."""


class Session(ABC):
    """One graph on one device. Called with torch tensors by input name; gives tensors by output name."""

    def __init__(self, name: str, inputs: tuple[Port, ...], profile: Batch | None, device: torch.device):
        """profile: the batch sizes that the graph takes; None takes any."""
        self.name, self.inputs, self.profile, self.device = name, inputs, profile, device

    def __call__(self, **values: Tensor) -> dict[str, Tensor]:
        """Run. Raises ValueError on inputs that the graph does not take; nothing runs then."""
        batch = self._check(values)
        return self._run({k: v.to(self.device).contiguous() for k, v in values.items()}, batch)

    @abstractmethod
    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]: ...

    def _check(self, values: Mapping[str, Tensor]) -> int:
        """The batch size of the inputs, all found to be what the graph takes."""
        if values.keys() != {port.name for port in self.inputs}:
            raise ValueError(f"{self.name} takes {[p.name for p in self.inputs]}, not {sorted(values)}")
        first = next(port for port in self.inputs if port.batched)
        batch = len(values[first.name]) if values[first.name].ndim else 0
        for port in self.inputs:
            value = values[port.name]
            if tuple(value.shape) != port.at(batch) or value.dtype != getattr(torch, port.dtype):
                wanted = ["B", *port.shape] if port.batched else list(port.shape)
                raise ValueError(
                    f"{self.name} takes {port.name} as {port.dtype} {wanted}, not {value.dtype} {list(value.shape)}"
                )
        if self.profile and not self.profile.least <= batch <= self.profile.most:
            raise ValueError(
                f"a batch of {batch}: this {self.name} takes {self.profile.least} to {self.profile.most}; "
                "split the batch, or export with another --max-batch or --max-pictures"
            )
        return batch


class EncoderRuntime(ABC):
    """Encodes and reconstructs with one runtime; sessions are made when first needed."""

    word: str
    dtype: str  # what it computes in
    device: torch.device
    manifest: Manifest | None = None  # where its graphs come from
    max_batch: int | None = None  # images that `encode` takes at once; None: any number

    def __init__(self):
        self._sessions: dict[str, Session] = {}
        self._empty: Tensor | None = None

    @abstractmethod
    def _open(self, component: str) -> Session:
        """Make the session of a component. Raises ArtifactError or CheckpointError."""

    @property
    @abstractmethod
    def sampling(self) -> dict:
        """What `sampling_settings` gives."""

    def session(self, component: str) -> Session:
        """The session of a component."""
        if component not in self._sessions:
            self._sessions[component] = self._open(component)
        return self._sessions[component]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> prompt embeddings, float32 [B, N, H]."""
        found = self.session("encoder")(pixels=images)
        if "prompts" not in found:
            raise ArtifactError("this encoder writes no prompt embeddings: it was exported from a stage-1 checkpoint")
        return found["prompts"]

    @torch.inference_mode()
    def context(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> context of the text-to-image model, float32 [B, N, C]."""
        return self.session("encoder")(pixels=images)["context"]

    @torch.inference_mode()
    def reconstruct(
        self, context: Tensor, steps: int = 50, guidance: float = 2.0, seed: int = 0, sampler: str = "ddim"
    ) -> Tensor:
        """Context [B, N, C] -> pictures, uint8 [B, 3, S, S]; the same as vlv.diffusion.t2i.T2I.reconstruct's.

        The keys and values of the context are computed once and serve all steps.
        """
        from vlv.diffusion.scheduler import make_scheduler

        schedule, guided = make_scheduler(sampler, self.sampling["scheduler"]), guidance > 1
        schedule.set_timesteps(steps)
        draws = [torch.Generator().manual_seed(seed) for _ in context]
        noise = torch.stack([torch.randn(self.sampling["latents"], generator=draw) for draw in draws])
        takes = inspect.signature(schedule.step).parameters  # DDPM's goes on drawing from the same
        more = {"generator": draws} if "generator" in takes else {}
        latents = noise.to(self.device) * schedule.init_noise_sigma
        context = context.to(self.device, torch.float32)
        if guided:
            context = torch.cat([self._empty_context().expand_as(context), context])
        kv = self.session("context_kv")(context=context)
        unet = self.session("unet")
        for step in schedule.timesteps:
            x = schedule.scale_model_input(latents, step)
            x = torch.cat([x, x]) if guided else x
            prediction = unet(latents=x, timestep=step[None].float(), **kv)["prediction"]
            if guided:
                without, within = prediction.chunk(2)
                prediction = without + guidance * (within - without)
            latents = schedule.step(prediction, step, latents, **more).prev_sample
        pictures = self.session("vae_decoder")(latents=latents)["picture"]
        return (pictures * 255).round().to(torch.uint8)

    def _empty_context(self) -> Tensor:
        if self._empty is None:
            ids = torch.tensor([self.sampling["empty_ids"]], dtype=torch.int32)
            self._empty = self.session("text_encoder")(ids=ids)["context"]
        return self._empty


class TorchSession(Session):
    """A component as PyTorch runs it: the reference, in float32 on a CPU."""

    def __init__(self, name: str, graph, device: torch.device):
        super().__init__(name, graph.inputs, None, device)
        self.graph = graph.to(device)

    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        found = self.graph(*(values[port.name] for port in self.inputs))
        return dict(zip(self.graph.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))


class TorchRuntime(EncoderRuntime):
    """PyTorch, on the GPU in bfloat16 where there is one, else on the CPU in float32."""

    word = "torch"

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, compiled: bool = False):
        """compiled: through torch.compile."""
        super().__init__()
        self.checkpoint, self.compiled = checkpoint, compiled
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = str(self._dtype).removeprefix("torch.")

    def _open(self, component: str) -> Session:
        from export.graphs import load

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


class ArtifactRuntime(EncoderRuntime):
    """An engine over an artifact folder. With a checkpoint, its artifacts must have been made from its weights."""

    runtime = "onnx"
    target = ""
    manifest: Manifest

    def __init__(self, artifacts: str | Path, checkpoint: Checkpoint | None = None):
        """Read the manifest; artifacts are checked and loaded when first needed. Raises ArtifactError."""
        super().__init__()
        self.manifest, self.checkpoint = Manifest.open(artifacts), checkpoint

    @property
    def dtype(self) -> str:
        """The precision of the encoder."""
        return self.manifest.find("encoder", self.runtime, self.target).precision

    @property
    def max_batch(self) -> int:
        """Images that `encode` takes at once; loads the encoder. Raises ArtifactError."""
        profile = self.session("encoder").profile
        assert profile, "a session of an artifact has the artifact's"
        return profile.most

    def checked(self, component: str):
        """The manifest's entry, its files intact."""
        source = source_hash(self.checkpoint, component) if self.checkpoint else None
        return self.manifest.checked(component, self.runtime, self.target, source)

    @property
    def sampling(self) -> dict:
        if not self.manifest.sampling:
            raise ArtifactError(
                f"{self.manifest.folder} holds no text-to-image model: export a checkpoint with t2i/ to reconstruct"
            )
        return self.manifest.sampling


def open_runtime(
    word: str, artifacts: str | Path | None = None, checkpoint: Checkpoint | None = None
) -> EncoderRuntime:
    """The engine of a word of RUNTIMES. Raises ArtifactError or ValueError."""
    if word not in RUNTIMES:
        raise ValueError(f"no runtime {word!r}; there are {', '.join(RUNTIMES)}")
    if word == "torch":
        if checkpoint is None:
            raise ValueError("the runtime torch runs a checkpoint: name one")
        return TorchRuntime(checkpoint)
    if artifacts is None:
        raise ValueError(f"the runtime {word} runs exported artifacts: name their folder")
    if word.startswith("onnx"):
        from export.runtimes.onnxruntime import ENGINES
    else:
        from export.runtimes.tensorrt import ENGINES
    return ENGINES[word](artifacts, checkpoint)


def sampling_settings(checkpoint: Checkpoint) -> dict:
    """What sampling needs beside the graphs: the scheduler's settings, the latents' shape, the empty prompt's ids."""
    from transformers import CLIPTokenizer

    folder = checkpoint.t2i
    unet = json.loads((folder / "unet" / "config.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return {
        "scheduler": json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        "latents": [unet["in_channels"], unet["sample_size"], unet["sample_size"]],
        "empty_ids": tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids,
    }
