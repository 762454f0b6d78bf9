"""Language-model engines that continue prompt embeddings, behind one signature.

    engine = engine_class("vllm")(LLMSpec.of(checkpoint), max_tokens=300, in_flight=64)
    await engine.start()
    completion = await engine.generate(embeds, Sampling())      # embeds: [queries, llm_width]
    await engine.close()

Nothing heavy is imported before `start`."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class EngineError(RuntimeError):
    """The engine does not start, or has died: no request can be answered."""


class EmbedsError(ValueError):
    """One request's embeddings cannot be continued; other requests are unharmed."""


@dataclass(frozen=True)
class Sampling:
    """How a caption is decoded."""

    max_tokens: int = 300
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of the random draws where the temperature is above 0


@dataclass(frozen=True)
class Completion:
    """What the language model wrote; `token_ids` without the end token."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": it ended the caption itself; "length": it was cut at max_tokens


@dataclass(frozen=True)
class LLMSpec:
    """What an engine has to know of a checkpoint's language model before loading it."""

    folder: Path
    queries: int  # prompt embeddings a request
    width: int
    positions: int  # prompt and caption together may not be longer
    kv_values: int  # key and value numbers that one token leaves in the cache

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> LLMSpec:
        """Read llm/config.json and hold it against the encoder's. Raises CheckpointError."""
        file = checkpoint.llm / "config.json"
        try:
            config = json.loads(file.read_text())
            width, heads = config["hidden_size"], config["num_attention_heads"]
            kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
            positions, layers = config["max_position_embeddings"], config["num_hidden_layers"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} does not describe a causal language model: {error!r}") from error
        if width != checkpoint.config.llm_width:
            raise CheckpointError(
                f"{file} has a hidden size of {width}, and the encoder in {checkpoint.folder} writes embeddings of "
                f"width {checkpoint.config.llm_width}: the two do not belong together"
            )
        return cls(checkpoint.llm, checkpoint.config.queries, width, positions, 2 * layers * kv_heads * head)

    def max_tokens(self, wanted: int | None, default: int = 300) -> int:
        """`wanted`, or the default cut to what fits. Raises ValueError where `wanted` does not fit."""
        most = self.positions - self.queries
        if wanted is not None and not 0 < wanted <= most:
            raise ValueError(
                f"{wanted} tokens a caption: this model takes 1 to {most} "
                f"({self.positions} positions less {self.queries} prompt embeddings)"
            )
        return wanted or min(default, most)

    def check(self, embeds: Tensor) -> None:
        """Raise EmbedsError unless `embeds` is a finite float tensor [queries, width]."""
        if tuple(embeds.shape) != (self.queries, self.width) or not embeds.is_floating_point():
            raise EmbedsError(
                f"the language model takes float embeddings [{self.queries}, {self.width}], "
                f"not {embeds.dtype} {list(embeds.shape)}"
            )
        if not embeds.isfinite().all():
            raise EmbedsError("the embeddings are not finite: the encoder overflowed on this image")


class Engine(ABC):
    """Continues prompt embeddings; any number of requests at a time, on one event loop."""

    def __init__(self, spec: LLMSpec, max_tokens: int, in_flight: int, debug: bool = False):
        """`max_tokens` is the longest caption of any request, `in_flight` how many decode together."""
        self.spec, self.max_tokens, self.in_flight, self.debug = spec, max_tokens, in_flight, debug

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Raises EngineError."""

    @abstractmethod
    async def generate(self, embeds: Tensor, sampling: Sampling) -> Completion:
        """Continue embeds [queries, width]. Raises EmbedsError or EngineError."""

    @abstractmethod
    async def close(self) -> None:
        """Free the model and end its processes; also after a `start` that failed or was cancelled."""

    def _load_tokenizer(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self.spec.folder)
        self.end = self._tokenizer.eos_token_id

    def _complete(self, token_ids: list[int]) -> Completion:
        """Cut at the end token and turn into text, alike for all engines."""
        stopped = self.end in token_ids
        if stopped:
            token_ids = token_ids[: token_ids.index(self.end)]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(text, token_ids, "stop" if stopped else "length")


class TransformersEngine(Engine):
    """The reference: transformers' `generate`, on what waits at the moment, at most `in_flight` at once."""

    async def start(self) -> None:
        self._waiting: deque[tuple[Tensor, Sampling, asyncio.Future]] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "llm")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except Exception as error:
            raise EngineError(f"transformers cannot load {self.spec.folder}: {one_line(error)}") from error
        self._task = asyncio.create_task(self._serve())

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()  # stderr has one of its own
        self._load_tokenizer()
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self._llm = AutoModelForCausalLM.from_pretrained(self.spec.folder, dtype=dtype).to(device).eval()

    async def generate(self, embeds: Tensor, sampling: Sampling) -> Completion:
        self.spec.check(embeds)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((embeds, sampling, answer))
        self._wake.set()
        return await answer

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            jobs = [self._waiting.popleft()]
            # a batch decodes under one setting; seeds may differ, since a batch draws from one generator
            settings = (jobs[0][1].max_tokens, jobs[0][1].temperature)
            while self._waiting and len(jobs) < self.in_flight:
                if (self._waiting[0][1].max_tokens, self._waiting[0][1].temperature) != settings:
                    break
                jobs.append(self._waiting.popleft())
            if not self._waiting:
                self._wake.clear()
            try:
                rows = await loop.run_in_executor(self._thread, self._generate, [j[0] for j in jobs], jobs[0][1])
            except Exception as error:
                rows = [EngineError(f"transformers failed: {one_line(error)}")] * len(jobs)
            for (_, _, answer), row in zip(jobs, rows, strict=True):
                if answer.done():  # its task was cancelled
                    continue
                if isinstance(row, Exception):
                    answer.set_exception(row)
                else:
                    answer.set_result(self._complete(row))

    def _generate(self, embeds: list[Tensor], sampling: Sampling) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        prompt = torch.stack(embeds).to(self._llm.device, self._llm.dtype)
        torch.manual_seed(sampling.seed)
        # a fresh configuration: that of the checkpoint may hold penalties, top-k or beams
        draws = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0} if sampling.temperature else {}
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens, eos_token_id=self.end, pad_token_id=self.end, **draws
        )
        with torch.inference_mode():
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            return self._llm.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=config).tolist()

    async def close(self) -> None:
        if task := getattr(self, "_task", None):
            task.cancel()


def one_line(error: BaseException, length: int = 300) -> str:
    """An exception's type and message as one line of at most about `length` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[:length] + "…"


def engine_class(name: str) -> type[Engine]:
    """The engine class of a name."""
    if name == "vllm":
        from serve.vllm_engine import VllmEngine

        return VllmEngine
    return TransformersEngine
