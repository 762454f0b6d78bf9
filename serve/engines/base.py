"""The interface of the language-model engines, which continue prompt embeddings.

    engine = engine_class("vllm")(LLMSpec.of(checkpoint), max_tokens=300, in_flight=64)
    await engine.start()
    completion = await engine.generate(embeds, Sampling())      # embeds: [queries, llm_width]
    async for piece in engine.stream(embeds, Sampling()): ...    # the same, in pieces
    await engine.close()

serve.engines.factory chooses the class.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from serve.engines.detokenize import Detokenizer, decode
from serve.engines.sampling import Completion, Sampling
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.llm_folder import end_token_ids
from vlv.common.command import Misuse, UserError, one_line
from vlv.model.generation import cut_at_end

DEFAULT_IN_FLIGHT = 256
FLAGS = {  # of the fields of Options that a user sets
    "lora": "lora",
    "tensor_parallel": "tensor-parallel",
    "url": "llm-url",
    "dtype": "llm-dtype",
    "gguf": "gguf",
    "gguf_type": "gguf-type",
    "placement": "encoder-placement",
    "quantization": "llm-quantization",
    "cache_dtype": "kv-cache-dtype",
}


class EngineError(UserError, RuntimeError):
    """Raised when the engine does not start or has died: no request can be answered."""


class OptionError(Misuse):
    """Raised for an option that an engine does not take."""


class EmbedsError(UserError, ValueError):
    """Raised when the embeddings of one request cannot be continued; other requests are not affected."""


@dataclass(frozen=True)
class LLMSpec:
    """What an engine has to know about a checkpoint's language model before it loads it."""

    folder: Path
    queries: int  # prompt embeddings a request
    width: int
    positions: int  # prompt and caption together may not be longer
    kv_values: int  # key and value numbers that one token leaves in the cache

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LLMSpec:
        """Read llm/config.json and compare it with the encoder's. Raises CheckpointError."""
        file = checkpoint.llm / "config.json"
        try:
            config = json.loads(file.read_text())
            width, heads = config["hidden_size"], config["num_attention_heads"]
            kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
            positions, layers = config["max_position_embeddings"], config["num_hidden_layers"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{file} does not describe a causal language model: {error!r}") from error
        if width != checkpoint.config.llm_width:
            raise CheckpointError(
                f"{file} has a hidden size of {width}, and the encoder in {checkpoint.folder} writes embeddings of "
                f"width {checkpoint.config.llm_width}: the two do not belong together"
            )
        return cls(checkpoint.llm, checkpoint.config.queries, width, positions, 2 * layers * kv_heads * head)

    def max_tokens(self, requested: int | None, default: int = 300) -> int:
        """Return `requested`, or the default cut to what fits. Raises ValueError if `requested` does not fit."""
        limit = self.positions - self.queries
        if requested is not None and not 0 < requested <= limit:
            raise ValueError(
                f"{requested} tokens a caption: this model takes 1 to {limit} "
                f"({self.positions} positions less {self.queries} prompt embeddings)"
            )
        return requested or min(default, limit)

    def check(self, embeds: Tensor) -> None:
        """Raise EmbedsError unless `embeds` is a finite float tensor [queries, width] of at least 16 bits."""
        is_float = embeds.is_floating_point() and embeds.itemsize > 1  # torch cannot compute with 8 bits
        if tuple(embeds.shape) != (self.queries, self.width) or not is_float:
            raise EmbedsError(
                f"the language model takes float embeddings [{self.queries}, {self.width}], "
                f"not {embeds.dtype} {list(embeds.shape)}"
            )
        if not all(map(math.isfinite, embeds.aminmax())):  # NaN passes through; isfinite() takes ten times as long
            raise EmbedsError("the embeddings are not finite: the encoder overflowed on this image")


@dataclass(frozen=True)
class Options:
    """What only some engines can do; an engine refuses the options that it does not take."""

    lora: Path | None = None  # a PEFT adapter's folder
    tensor_parallel: int = 1  # devices that share the language model
    url: str | None = None  # of the server that runs the language model
    dtype: str = "auto"  # one of serve.LLM_DTYPES; auto: bfloat16 on a GPU, float32 on a CPU
    gguf: Path | None = None  # the language model's file; None: written on first use, into the cache
    gguf_type: str = "f16"  # of the file that is written: one of export.components.GGUF_TYPES
    placement: str = "process"  # one of serve.PLACEMENTS
    quantization: str | None = None  # of the language model while it is loaded: fp8
    cache_dtype: str = "auto"  # of keys and values: auto or fp8
    encoder_bytes: int = 0  # of the GPU's memory that the encoder needs beside the engine

    def model_id(self, checkpoint_hash: str) -> str:
        """Return the id that records carry: the checkpoint's hash, and the hash of the adapter if there is one."""
        if self.lora is None:
            return checkpoint_hash
        digest = hashlib.sha256()
        for file in sorted(self.lora.glob("adapter_*")):
            digest.update(file.name.encode() + file.read_bytes())
        return f"{checkpoint_hash}+{digest.hexdigest()[:8]}"


class LLMEngine(ABC):
    """Continue prompt embeddings, for any number of requests at a time on one event loop."""

    name: str
    takes: frozenset[str] = frozenset()  # fields of Options
    has_logprobs = False
    ends: tuple[int, ...]  # tokens that end a caption, once started
    encoder_threads: int | None = None  # for an encoder on the CPU beside it; None: as its library chooses
    takes_crops = False  # instead of embeddings: the encoder runs in the engine
    loads_alone = False  # no other thread of this process may compute while it loads

    def __init__(
        self,
        spec: LLMSpec,
        max_tokens: int,
        in_flight: int | None = None,
        debug: bool = False,
        options: Options | None = None,
    ):
        """`max_tokens` is the longest caption of any request, `in_flight` how many decode together (None: by default).

        Raises OptionError for an option that this engine does not take.
        """
        self.spec = spec
        self.max_tokens = max_tokens
        self._in_flight = in_flight
        self.debug = debug
        self.options = options or Options()
        for name, flag in FLAGS.items():
            if name not in self.takes and getattr(self.options, name) != getattr(Options, name):
                raise OptionError(f"--{flag} does not go with --engine {self.name}")

    @property
    def in_flight(self) -> int:
        """Return how many captions decode together."""
        return self._in_flight or DEFAULT_IN_FLIGHT

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a user should know of the settings, in sentences."""
        return ()

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Raises EngineError."""

    @abstractmethod
    def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        """Continue embeds [queries, width] and yield new token ids: as they come if `every`, else perhaps at the end.

        The end token may be the last. Closing the generator cancels the request. Raises EmbedsError or EngineError.
        """

    @property
    def alive(self) -> bool:
        """True if it can still answer after its start; if False, it has to be started again."""
        return True

    async def healthy(self) -> bool:
        """Return True if it answers now."""
        return self.alive

    @abstractmethod
    async def close(self) -> None:
        """Free the model and end its processes; also after a `start` that failed or was cancelled."""

    async def generate(self, embeds: Tensor, sampling: Sampling) -> Completion:
        """Continue embeds [queries, width]. Cancelling it cancels the request. Raises EmbedsError or EngineError."""
        if sampling.stop:
            async with aclosing(self.stream(embeds, sampling)) as chunks:
                parts = [chunk async for chunk in chunks]
            ids = [i for part in parts for i in part.token_ids]
            logprobs = None if sampling.logprobs is None else [p for part in parts for p in part.logprobs or []]
            return Completion("".join(part.text for part in parts), ids, parts[-1].finish_reason, logprobs)
        ids, logprobs = [], []
        async with aclosing(self.tokens(embeds, sampling, every=False)) as steps:
            async for step in steps:
                ids += step
                logprobs += getattr(step, "logprobs", None) or []
        caption = ids if sampling.ignore_eos else cut_at_end(ids, self.ends)
        reason = "stop" if len(caption) < len(ids) else "length"
        kept = None if sampling.logprobs is None else logprobs[: len(caption)]
        return Completion(decode(self._tokenizer, caption), caption, reason, kept)

    async def stream(self, embeds: Tensor, sampling: Sampling) -> AsyncGenerator[Completion]:
        """Continue embeds and yield pieces as they come; only the last one has a finish_reason."""
        text = Detokenizer(self._tokenizer, () if sampling.ignore_eos else self.ends, sampling.stop)
        async with aclosing(self.tokens(embeds, sampling, every=True)) as steps:
            async for step in steps:
                piece, ids = text.push(step)
                logprobs = None if sampling.logprobs is None else (getattr(step, "logprobs", None) or [])[: len(ids)]
                if text.ended:
                    yield Completion(piece, ids, "stop", logprobs)
                    return
                if ids:
                    yield Completion(piece, ids, "", logprobs)
        rest = text.rest()
        yield Completion(rest, [], "stop" if text.ended else "length")

    def token_text(self, token: int) -> str:
        """Return the text of one token."""
        return self._tokenizer.decode([token])

    def _load_tokenizer(self) -> None:
        self._tokenizer = load_tokenizer(self.spec.folder)
        self.ends = end_token_ids(self.spec.folder, self._tokenizer)


def load_tokenizer(folder: Path):
    """Return the tokenizer of a language model's folder. Raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises what has no class of its own
        raise CheckpointError(f"{folder} holds no tokenizer: {one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers invents an empty one for some models
        raise CheckpointError(f"{folder} holds no tokenizer: copy tokenizer.json and tokenizer_config.json there")
    return tokenizer
