"""Open what a command captions with: the checkpoint, the limits of its language model, and an engine for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from export.manifest import ArtifactError, Manifest
from serve.engines.base import LLMEngine, LLMSpec, Options
from serve.engines.factory import engine_class
from serve.engines.vllm_settings import encoder_bytes
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.published import resolve
from vlv.common.command import Misuse

# environment variables that name the folders of caches, and the part of --cache that each gets
CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "XDG_CACHE_HOME": "",
}


@dataclass(frozen=True)
class ModelOptions:
    """What the arguments of serve.command say about the models; a field is an argument."""

    ckpt: str | None  # checkpoint folder, published weights, or a hub id
    max_tokens: int | None = None  # longest caption; None: 300, or what fits
    in_flight: int | None = None  # captions that are decoded together; None: as the engine chooses
    engine: str | None = None  # one of serve.ENGINES; None: vllm, or remote with llm_url
    llm_url: str | None = None
    lora: Path | None = None
    tensor_parallel: int = 1
    encoder_placement: str = "process"  # one of serve.PLACEMENTS
    llm_quantization: str | None = None
    kv_cache_dtype: str = "auto"
    cache: Path | None = None  # folder of what is compiled; None: the caches of the user
    llm_dtype: str = "auto"
    gguf: Path | None = None
    gguf_type: str = "f16"
    encoder: str = "torch"  # a runtime of export.runtimes
    artifacts: Path | None = None
    prompt_batch: int = 32
    workers: int | None = None
    ignore_icc: bool = False
    fast_jpeg: bool = False
    crop: str = "center"  # what the model sees of an image: one of vlv.data.decoding.crop.CROPS
    debug: bool = False
    precision: str | None = None  # of the encoder in torch; one of TORCH_PRECISIONS
    cuda_graphs: bool = True


@dataclass(frozen=True)
class Model:
    """Options that have been checked, as far as that goes without loading anything."""

    options: ModelOptions
    checkpoint: Checkpoint
    spec: LLMSpec
    max_tokens: int

    @classmethod
    def of(cls, options: ModelOptions) -> Model:
        """Check options. Raises Misuse if they fit neither each other nor what is on the disk; CheckpointError."""
        if not options.ckpt:
            raise Misuse("--ckpt is needed (--help shows the usage)")
        if options.cache:
            use_cache(options.cache)
        try:
            checkpoint = resolve(options.ckpt)
        except CheckpointError as error:
            raise Misuse(f"--ckpt: {error}") from error
        if options.encoder_placement == "engine" and options.encoder != "torch":
            raise Misuse(f"--encoder {options.encoder} runs in our process: not with --encoder-placement engine")
        if (options.encoder == "torch") != (options.artifacts is None):
            raise Misuse(f"--encoder {options.encoder} and --artifacts: an exported encoder needs both, torch neither")
        if options.precision and options.encoder != "torch":
            raise Misuse(f"--precision {options.precision} and --encoder {options.encoder}: an export has its own")
        try:
            if options.artifacts:
                Manifest.open(options.artifacts)
        except ArtifactError as error:
            raise Misuse(f"--artifacts: {error}") from error
        spec = LLMSpec.of(checkpoint)
        try:
            max_tokens = spec.max_tokens(options.max_tokens)
        except ValueError as error:
            raise Misuse(f"--max-tokens: {error}") from error
        return cls(options, checkpoint, spec, max_tokens)

    @property
    def flags(self) -> str:
        """Return the flags that change captions where they are not the default, for the records of captions."""
        options = self.options
        settings = (
            ("max-tokens", self.max_tokens, self.spec.max_tokens(None)),
            ("crop", options.crop, "center"),
            ("precision", options.precision, None),
            ("llm-dtype", options.llm_dtype, "auto"),
            ("llm-quantization", options.llm_quantization, None),
            ("kv-cache-dtype", options.kv_cache_dtype, "auto"),
            ("gguf", options.gguf and options.gguf.name, None),
            ("gguf-type", options.gguf_type, "f16"),
        )
        given = [f"--{flag} {value}" for flag, value, default in settings if value != default]
        return " ".join(given + ["--ignore-icc"] * options.ignore_icc + ["--fast-jpeg"] * options.fast_jpeg)

    def engine(self) -> LLMEngine:
        """Return a new engine, not started. Raises OptionError for an option that it does not take."""
        options = self.options
        kind = engine_class(options.engine or ("remote" if options.llm_url else "vllm"))
        engine_options = Options(
            options.lora,
            options.tensor_parallel,
            options.llm_url,
            options.llm_dtype,
            options.gguf,
            options.gguf_type,
            options.encoder_placement,
            options.llm_quantization,
            options.kv_cache_dtype,
            self._encoder_bytes(),
        )
        return kind(self.spec, self.max_tokens, options.in_flight, options.debug, engine_options)

    def _encoder_bytes(self) -> int:
        """Return the bytes of a GPU that the encoder takes outside of the engine."""
        if self.options.encoder_placement == "engine":
            return 0
        width = 4 if self.options.precision == "fp32" else 2  # bytes of a number
        return encoder_bytes(self.checkpoint, self.options.prompt_batch, width)


def use_cache(folder: Path) -> None:
    """Let everything that is compiled or converted be kept in one folder, also by processes that this one starts."""
    for name, part in CACHES.items():
        os.environ[name] = str((folder / part).absolute())
