"""The engine that runs transformers' `generate`: the reference."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from serve.engines.base import EngineError, LLMEngine, Sampling
from vlv.checkpoints.folder import CheckpointError
from vlv.checkpoints.llm_folder import check_llm_folder
from vlv.common.command import hush, one_line
from vlv.common.device import choose_device, inference_dtype
from vlv.model.generation import greedy_generation_config

_LOADING = threading.Lock()  # loading changes torch's default dtype; two at once would not restore it


@dataclass
class _Job:
    """One request; `steps` gets its new tokens, then None or an error."""

    embeds: Tensor
    sampling: Sampling
    steps: asyncio.Queue = field(default_factory=asyncio.Queue)
    over: bool = False  # it has all its tokens, or was cancelled

    @property
    def settings(self) -> Sampling:
        """Return what all requests of a batch share; seeds may differ, since a batch draws from one generator."""
        return replace(self.sampling, seed=0, stop=())


class TransformersEngine(LLMEngine):
    """Decode batches of the requests that wait, at most `in_flight` together."""

    name = "transformers"

    async def start(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "llm")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except Exception as error:
            why = str(error) if isinstance(error, CheckpointError) else one_line(error)
            raise EngineError(f"transformers cannot load {self.spec.folder}: {why}") from error
        self._task = asyncio.create_task(self._serve())

    def _load(self) -> None:
        check_llm_folder(self.spec.folder)
        hush()  # stderr has a progress line of its own
        self._load_tokenizer()
        device = choose_device()
        with _LOADING:
            llm = AutoModelForCausalLM.from_pretrained(self.spec.folder, dtype=inference_dtype(device))
        self._llm = llm.to(device).eval()

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        self.spec.check(embeds)
        if not self.alive:
            raise EngineError("transformers has failed")
        job = _Job(embeds, sampling)
        self._waiting.append(job)
        self._wake.set()
        try:
            while (step := await job.steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            job.over = True

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            jobs = [self._waiting.popleft()]
            while self._waiting and len(jobs) < self.in_flight and self._waiting[0].settings == jobs[0].settings:
                jobs.append(self._waiting.popleft())
            if not self._waiting:
                self._wake.clear()
            jobs = [job for job in jobs if not job.over]
            if not jobs:
                continue
            try:
                await loop.run_in_executor(self._thread, self._generate, loop, jobs)
            except Exception as error:  # after one in CUDA, all that follow fail too
                for job in [*jobs, *self._waiting]:
                    job.steps.put_nowait(EngineError(f"transformers failed: {one_line(error)}"))
                return
            for job in jobs:
                job.steps.put_nowait(None)

    def _generate(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job]) -> None:
        """Decode one batch, and hand every step to the event loop."""
        sampling = jobs[0].sampling
        prompt = torch.stack([job.embeds for job in jobs]).to(self._llm.device, self._llm.dtype)
        torch.manual_seed(sampling.seed)
        options: dict = {"min_new_tokens": sampling.min_tokens or None}
        if sampling.temperature:
            options |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p or None}
        if sampling.ignore_eos:
            options["eos_token_id"] = None
        config = greedy_generation_config(
            self._llm, sampling.max_tokens, self.ends, temperature=sampling.temperature, **options
        )

        def after_step(ids: Tensor, _, **__) -> Tensor:
            step = ids[:, -1].tolist()
            loop.call_soon_threadsafe(self._deliver, jobs, step)
            return torch.tensor([job.over for job in jobs], device=ids.device)  # a cancelled one ends early

        mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        with torch.inference_mode():
            self._llm.generate(
                inputs_embeds=prompt,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[_require_numbers],
                stopping_criteria=[after_step],
            )

    def _deliver(self, jobs: list[_Job], step: list[int]) -> None:
        for job, token in zip(jobs, step, strict=True):
            if not job.over:
                job.steps.put_nowait([token])
                if token in self.ends and not job.sampling.ignore_eos:  # the rest of its row is padding
                    job.over = True
                    job.steps.put_nowait(None)

    @property
    def alive(self) -> bool:
        return not self._task.done()

    async def close(self) -> None:
        if task := getattr(self, "_task", None):
            task.cancel()
        if thread := getattr(self, "_thread", None):
            thread.shutdown(wait=False)


def _require_numbers(_, scores: Tensor) -> Tensor:
    """Return the logits [B, vocabulary]. Raises EngineError for NaN, of which generate would make an empty caption."""
    if scores.isnan().any():
        raise EngineError("the language model computes NaN: its weights are damaged, or overflow")
    return scores
