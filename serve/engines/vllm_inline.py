"""vLLM's engine in a thread of this process: one CUDA context for it and for the encoder.

    engine = InlineEngine(vllm_config)                            # blocks until the model is loaded
    async for output in engine.generate(prompt, params, "1"): ...
    engine.shutdown()

It has what serve.engines.vllm uses of vLLM's AsyncLLM, which itself always starts processes. On a GPU vLLM's kernels
go to a stream of high priority, so that a batch of the encoder fills what a decode step leaves free.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future

import torch
from vllm.envs import disable_envs_cache
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

HIGH = -1  # CUDA's priorities: smaller numbers go first, 0 is the default


class InlineEngine:
    """Step vLLM's engine in one thread, which also loads it; requests come from one event loop."""

    def __init__(self, config):
        """Load the model that vLLM's configuration describes. Raises what vLLM raises."""
        self.model_config = config.model_config
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()  # ("add", ...), ("abort", id) or None to end
        self._outputs: dict[str, asyncio.Queue] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: Exception | None = None
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(config, loaded), name="vllm", daemon=True)
        self._thread.start()
        loaded.result()

    @property
    def errored(self) -> bool:
        """True if the engine has failed, and answers nothing more."""
        return self._error is not None

    async def generate(self, prompt: dict, params, request_id: str, lora_request=None) -> AsyncGenerator:
        """Yield vLLM's RequestOutputs. Closing the generator cancels the request. Raises what ended the engine."""
        if self._error is not None:
            raise self._error
        self._loop = asyncio.get_running_loop()
        outputs = self._outputs[request_id] = asyncio.Queue()
        self._jobs.put(("add", request_id, prompt, params, lora_request))
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._outputs[request_id]
            if not finished:
                self._jobs.put(("abort", request_id))

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread after its step, and free the model."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self, config, loaded: Future[None]) -> None:
        engine, set_num_threads = None, torch.set_num_threads
        try:
            if torch.cuda.is_available():
                torch.cuda.set_stream(torch.cuda.Stream(priority=HIGH))  # of this thread
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
            torch.set_num_threads = set_num_threads  # vLLM replaces it on a CPU, for a process of its own
            loaded.set_result(None)
            self._step(engine)
        except Exception as error:
            self._error = error
            if not loaded.done():
                loaded.set_exception(error)
            elif self._loop is not None:
                self._loop.call_soon_threadsafe(self._fail, error)
        finally:
            if engine is not None:
                engine.engine_core.shutdown()
            disable_envs_cache()  # another engine of this process has other variables

    def _step(self, engine: LLMEngine) -> None:
        """Add and cancel requests between steps, and hand out what the steps yield, until None comes."""
        while True:
            jobs = [] if engine.has_unfinished_requests() else [self._jobs.get()]
            for job in itertools.chain(jobs, self._waiting()):
                if job is None:
                    return
                kind, request_id, *request = job
                if kind == "abort":
                    engine.abort_request([request_id])
                    continue
                try:
                    prompt, params, lora = request
                    engine.add_request(request_id, prompt, params, lora_request=lora)
                except Exception as error:  # vLLM refuses this request alone
                    self._loop.call_soon_threadsafe(self._deliver, [(request_id, error)])
            if engine.has_unfinished_requests() and (outputs := engine.step()):
                self._loop.call_soon_threadsafe(self._deliver, [(output.request_id, output) for output in outputs])

    def _waiting(self):
        """Yield the jobs that are there, without waiting for more."""
        while True:
            try:
                yield self._jobs.get_nowait()
            except queue.Empty:
                return

    def _deliver(self, outputs: list[tuple[str, object]]) -> None:
        for request_id, output in outputs:
            if request_id in self._outputs:
                self._outputs[request_id].put_nowait(output)

    def _fail(self, error: Exception) -> None:
        for outputs in self._outputs.values():
            outputs.put_nowait(error)
