"""Define the signature of every runtime: a Session runs one graph, an EncoderRuntime keeps a session per component.

    runtime = open_runtime("onnx", artifacts="out/vlv", checkpoint=checkpoint)     # export/runtimes/factory.py
    prompts = runtime.encode(images)                              # uint8 [B, 3, S, S] -> float32 [B, N, H]
    images = runtime.reconstruct(runtime.context(images))         # 50 steps -> uint8 [B, 3, S, S]

PyTorch is in torch.py, ONNX Runtime in onnxruntime.py, TensorRT and TensorRT-RTX in tensorrt.py.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from export.components import Batch, Port
from export.manifest import Artifact, ArtifactError, Manifest, source_hash
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import UserError


class RuntimeUnavailable(ArtifactError):
    """Raised where the library or the device of a runtime is missing; the message says how to get it."""


class SessionInputError(UserError, ValueError):
    """Raised for inputs that a graph does not take."""


class Session(ABC):
    """Run one graph on one device: torch tensors by input name in, tensors by output name out."""

    def __init__(self, name: str, inputs: tuple[Port, ...], profile: Batch | None, device: torch.device):
        """profile: the batch sizes that the graph takes; None takes any."""
        self.name = name
        self.inputs = inputs
        self.profile = profile
        self.device = device

    def __call__(self, **values: Tensor) -> dict[str, Tensor]:
        """Run the graph. Raises SessionInputError for inputs that it does not take, before anything runs."""
        batch = self._check(values)
        return self._run({k: v.to(self.device).contiguous() for k, v in values.items()}, batch)

    @abstractmethod
    def _run(self, values: dict[str, Tensor], batch: int) -> dict[str, Tensor]: ...

    def _check(self, values: Mapping[str, Tensor]) -> int:
        """Return the batch size of the inputs. Raises SessionInputError unless names, shapes and dtypes fit."""
        if values.keys() != {port.name for port in self.inputs}:
            raise SessionInputError(f"{self.name} takes {[p.name for p in self.inputs]}, not {sorted(values)}")
        first = next(port for port in self.inputs if port.batched)
        batch = len(values[first.name]) if values[first.name].ndim else 0
        for port in self.inputs:
            value = values[port.name]
            if tuple(value.shape) != port.at(batch) or value.dtype != getattr(torch, port.dtype):
                expected = ["B", *port.shape] if port.batched else list(port.shape)
                raise SessionInputError(
                    f"{self.name} takes {port.name} as {port.dtype} {expected}, not {value.dtype} {list(value.shape)}"
                )
        if batch < 1:
            raise SessionInputError(f"{self.name} takes a batch of at least 1, not an empty one")
        if self.profile and not self.profile.min <= batch <= self.profile.max:
            raise SessionInputError(
                f"a batch of {batch}: this {self.name} takes {self.profile.min} to {self.profile.max}; "
                "split the batch, or export with another --max-batch or --max-images"
            )
        return batch


class EncoderRuntime(ABC):
    """Encode and reconstruct with one runtime; sessions are opened when first needed."""

    word: str
    dtype: str  # what it computes in
    device: torch.device
    manifest: Manifest | None = None  # where its graphs come from
    threads: int | None = None  # of a CPU, for sessions that are opened later; None: as many as PyTorch has
    max_batch: int | None = None  # images that `encode` takes at once; None: any number

    def __init__(self):
        self._sessions: dict[str, Session] = {}
        self._empty: Tensor | None = None

    @abstractmethod
    def _open(self, component: str) -> Session:
        """Open the session of a component. Raises ArtifactError or CheckpointError."""

    @property
    @abstractmethod
    def sampling(self) -> dict:
        """Return `sampling_settings` of the text-to-image model (export/runtimes/torch.py)."""

    def session(self, component: str) -> Session:
        """Return the session of a component."""
        if component not in self._sessions:
            self._sessions[component] = self._open(component)
        return self._sessions[component]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode uint8 [B, 3, S, S] to prompt embeddings, float32 [B, N, H]."""
        found = self.session("encoder")(pixels=images)
        if "prompts" not in found:
            raise ArtifactError("this encoder writes no prompt embeddings: it was exported from a stage-1 checkpoint")
        return found["prompts"]

    @torch.inference_mode()
    def context(self, images: Tensor) -> Tensor:
        """Encode uint8 [B, 3, S, S] to the context of the text-to-image model, float32 [B, N, C]."""
        return self.session("encoder")(pixels=images)["context"]

    @torch.inference_mode()
    def reconstruct(
        self, context: Tensor, steps: int = 50, guidance: float = 2.0, seed: int = 0, sampler: str = "ddim"
    ) -> Tensor:
        """Reconstruct images, uint8 [B, 3, S, S], from a context [B, N, C]; equal to vlv.diffusion.t2i.T2I.reconstruct.

        The keys and values of the context are computed once and serve all steps.
        """
        # diffusers: seconds of imports that captioning does not need
        from vlv.diffusion.scheduler import make_scheduler, require_finite

        schedule, guided = make_scheduler(sampler, self.sampling["scheduler"], steps), guidance > 1
        schedule.set_timesteps(steps)
        generators = [torch.Generator().manual_seed(seed) for _ in context]
        noise = torch.stack([torch.randn(self.sampling["latents"], generator=g) for g in generators])
        takes = inspect.signature(schedule.step).parameters  # DDPM draws noise at every step from the same generators
        more = {"generator": generators} if "generator" in takes else {}
        latents = noise.to(self.device) * schedule.init_noise_sigma
        context = context.to(self.device, torch.float32)
        if guided:
            context = torch.cat([self.empty_context().expand_as(context), context])
        kv = self.session("context_kv")(context=context)
        unet = self.session("unet")
        for step in schedule.timesteps:
            x = schedule.scale_model_input(latents, step)
            x = torch.cat([x, x]) if guided else x
            prediction = unet(latents=x, timestep=step[None].float(), **kv)["prediction"]
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = schedule.step(prediction, step, latents, **more).prev_sample
        images = self.session("vae_decoder")(latents=require_finite("latents", latents))["image"]
        return (require_finite("images", images) * 255).round().to(torch.uint8)

    def empty_context(self) -> Tensor:
        """Return the context of the empty prompt, float32 [1, N, C]; computed once."""
        if self._empty is None:
            ids = torch.tensor([self.sampling["empty_ids"]], dtype=torch.int32)
            self._empty = self.session("text_encoder")(ids=ids)["context"]
        return self._empty


class ArtifactRuntime(EncoderRuntime):
    """Run the artifacts of a folder. With a checkpoint, they must have been made from its weights."""

    runtime = "onnx"
    target = ""
    manifest: Manifest

    def __init__(self, artifacts: str | Path, checkpoint: Checkpoint | None = None):
        """Read the manifest; artifacts are checked and loaded when first needed. Raises ArtifactError."""
        super().__init__()
        self.manifest = Manifest.open(artifacts)
        self.checkpoint = checkpoint

    @property
    def dtype(self) -> str:
        """Return the precision of the encoder."""
        return self.manifest.find("encoder", self.runtime, self.target).precision

    @property
    def max_batch(self) -> int:
        """Return how many images `encode` takes at once; loads the encoder. Raises ArtifactError."""
        profile = self.session("encoder").profile
        assert profile, "a session of an artifact has the artifact's"
        return profile.max

    def checked(self, component: str) -> Artifact:
        """Return the manifest's entry after checking its files and its source. Raises ArtifactError."""
        source = source_hash(self.checkpoint, component) if self.checkpoint else None
        return self.manifest.checked(component, self.runtime, self.target, source)

    @property
    def sampling(self) -> dict:
        if not self.manifest.sampling:
            raise ArtifactError(
                f"{self.manifest.folder} holds no text-to-image model: export a checkpoint with t2i/ to reconstruct"
            )
        return self.manifest.sampling
