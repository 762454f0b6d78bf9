"""The engine that runs vLLM: one AsyncLLM that gets prompt embeddings.

vllm is imported late: its environment variables have to be set before.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging.config
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor

from serve.engines.base import EngineError, LLMEngine, OptionError, Sampling
from serve.engines.child_reaper import ChildProcessReaper
from serve.engines.sampling import Tokens
from serve.engines.vllm_settings import Device, VLLMSettings, flashinfer_problem, free_memory, settings
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.llm_folder import check_llm_folder
from vlv.common.command import one_line
from vlv.data.remote import cache_folder

SHUTDOWN = 20  # seconds that vLLM's processes have to end in order; killed, they leave shared memory to clean up
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
SET_NUM_THREADS = torch.set_num_threads  # vLLM's worker on a CPU replaces it in its process, which inline is this one
FEW_CORES = 4  # where serve.engines.vllm_executor is the faster
# encoder placements (serve.PLACEMENTS) that vLLM gets as its own multimodal model, and the field of their input
FIELDS = {"multimodal": "embeds", "engine": "crops"}


class VLLMEngine(LLMEngine):
    """Continuous batching by vLLM: in its own processes, or inline in a thread of this one."""

    name = "vllm"
    takes = frozenset({"lora", "tensor_parallel", "dtype", "placement", "quantization", "cache_dtype"})
    has_logprobs = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._placement = self.options.placement
        self._field = FIELDS.get(self._placement)
        self.takes_crops = self._field == "crops"
        # a CUDA graph cannot be captured while another thread allocates, and vLLM changes torch's default dtype
        self.loads_alone = self._placement == "inline"
        if self._field and not entry_points(group="vllm.general_plugins", name="vlv"):
            raise OptionError(
                f"--encoder-placement {self._placement}: vLLM looks for our model among installed packages, and this "
                "one is not installed; pip install --no-deps -e ."
            )
        if self.options.lora and self._field:
            raise OptionError(f"--lora does not go with --encoder-placement {self._placement}")
        if self.options.tensor_parallel > 1 and self._placement in ("inline", "engine"):
            raise OptionError(f"--tensor-parallel does not go with --encoder-placement {self._placement}: one GPU only")
        if self.options.quantization:
            if not self._device.cuda:
                raise OptionError(
                    f"--llm-quantization {self.options.quantization} needs a GPU: on a CPU vLLM has no FP8; "
                    "--engine llamacpp --gguf-type q8_0 quantises there"
                )
            if self.options.dtype == "float32":
                raise OptionError(
                    f"--llm-quantization {self.options.quantization} does not go with --llm-dtype float32: vLLM "
                    "quantises float16 and bfloat16 weights"
                )
        self._ids = itertools.count()
        self._lora = None
        self._lora_rank = lora_rank(self.options.lora) if self.options.lora else None
        self._engine, self._logs, self._failed, self._closed = None, None, False, False
        self._sockets: Path | None = None  # folder of vLLM's sockets, which it leaves behind
        self._reaper, self._others = ChildProcessReaper(), None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._others = {process.pid for process in _engine_processes()}  # of another engine here
        booted = loop.create_future()

        def boot() -> None:
            # vLLM's processes inherit the mask: a Ctrl-C is ours to handle, and ends them through close()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            error = None
            try:
                self._engine = self._boot()
            except BaseException as caught:
                error = caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, booted, error)

        self._set_environment()
        # a thread of its own, and a daemon: the event loop goes on decoding and encoding, and exit does not wait
        thread = threading.Thread(target=boot, name="vllm-boot", daemon=True)
        try:
            with _diverted(self._logs) if self._logs else contextlib.nullcontext():
                thread.start()
                while not booted.done():
                    self._reaper.watch(self._processes())
                    await asyncio.wait({booted}, timeout=0.2)
                booted.result()
        except CheckpointError:
            raise
        except Exception as error:
            raise EngineError(self._explain("vLLM does not start", error)) from error

    def _boot(self):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        check_llm_folder(self.spec.folder)
        self._load_tokenizer()
        arguments = AsyncEngineArgs(
            # we detokenize, alike for all engines; but vLLM has no multimodal model without
            skip_tokenizer_init=self._field is None,
            disable_log_stats=True,
            **self._settings.arguments,
            **(self._image_arguments() if self._field else self._prompt_arguments()),
            **self._lora_arguments(),
        )
        config = arguments.create_engine_config()
        if self._closed:
            raise EngineError("closed before it had started")
        if self._placement == "inline":
            from serve.engines.vllm_inline import InlineEngine

            return InlineEngine(config)
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    def _prompt_arguments(self) -> dict:
        """Return what makes vLLM take prompt embeddings."""
        return {"model": str(self.spec.folder), "enable_prompt_embeds": True, **self._executor()}

    def _image_arguments(self) -> dict:
        """Return what makes vLLM run our own model, on crops or on embeddings. Writes the model's folder."""
        from serve.vllm_model.config import require_tested
        from serve.vllm_model.folder import write_links
        from serve.vllm_plugin import register

        require_tested()
        register()  # vLLM's processes find it by this package's entry point, or by their copy of this registry
        checkpoint = Checkpoint.open(self.spec.folder.parent)
        folder = cache_folder("vllm") / f"{checkpoint.hash}-{self._field}"
        write_links(checkpoint, folder, loads_encoder=self.takes_crops)
        arguments = {
            "model": str(folder),
            "limit_mm_per_prompt": {"image": 1},
            "mm_processor_cache_gb": 0,  # every image is another one
            **self._executor(),
        }
        if self.takes_crops:
            # on a CPU vLLM does not schedule asynchronously
            scheduler = "AsyncBatchScheduler" if self._device.cuda else "BatchScheduler"
            arguments["scheduler_cls"] = f"serve.vllm_model.scheduler.{scheduler}"
            return arguments | ({"async_scheduling": True} if self._device.cuda else {})
        return arguments | {"skip_mm_profiling": True}  # there is no encoder whose memory could be measured

    def _executor(self) -> dict:
        inline = self._placement == "inline"  # on a CPU vLLM would start a process even then
        if self._device.cuda or not (self.encoder_threads or inline):
            return {}
        from serve.engines.vllm_executor import SharedCoresExecutor

        return {"distributed_executor_backend": SharedCoresExecutor}

    @functools.cached_property
    def _device(self) -> Device:
        if torch.cuda.is_available():
            return Device(True, torch.cuda.get_device_properties(0).total_memory)
        return Device(False, free_memory())

    @functools.cached_property
    def _settings(self) -> VLLMSettings:
        options = self.options
        return settings(
            self._device,
            self.spec,
            self.max_tokens,
            self._in_flight,
            options.quantization,
            options.cache_dtype,
            self._placement == "inline",
            options.tensor_parallel,
            options.dtype,
            options.encoder_bytes,
        )

    @property
    def in_flight(self) -> int:
        return self._settings.in_flight

    @property
    def notes(self) -> tuple[str, ...]:
        problem = flashinfer_problem() if self._device.cuda else None
        return (*self._settings.notes, *([f"{problem}, so vLLM samples with PyTorch"] if problem else []))

    @property
    def encoder_threads(self) -> int | None:
        """Half of few cores: more threads than cores spin while they wait for each other."""
        cores = len(os.sched_getaffinity(0))
        few = cores <= FEW_CORES and self.options.tensor_parallel == 1
        return max(1, cores // 2) if few else None

    def _lora_arguments(self) -> dict:
        if not self.options.lora:
            return {}
        import vllm
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        config = json.loads((self.options.lora / "adapter_config.json").read_text())
        for pattern in ("rank_pattern", "alpha_pattern"):
            if config.get(pattern) and not hasattr(PEFTHelper, "get_rank_and_scaling"):
                raise EngineError(
                    f"--lora: {self.options.lora} has layers of their own scale ({pattern}), which vLLM "
                    f"{vllm.__version__} would ignore: merge the adapter into llm/, or install vLLM 0.32"
                )
        self._lora = LoRARequest(self.options.lora.name, 1, str(self.options.lora))
        return {"enable_lora": True, "max_lora_rank": self._lora_rank}

    def _set_environment(self) -> None:
        """For vLLM's processes: flat memory, no usage reports, the log in a file (on stderr with debug)."""
        # activations stay in the heap: mapped anew for each operator, the kernel's zeroing of pages costs a quarter
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 << 20))
        # each step has another number of tokens, and oneDNN would keep code for 1,024 of them: +150 MiB
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        if flashinfer_problem():  # vLLM 0.26 would end at its first step
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        if self.options.tensor_parallel > 1:  # on a CPU, vLLM would want a NUMA node for each process
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if "VLLM_RPC_BASE_PATH" not in os.environ:
            self._sockets = Path(tempfile.mkdtemp(prefix="vlv-"))
            os.environ["VLLM_RPC_BASE_PATH"] = str(self._sockets)
        if self.debug or "VLLM_LOGGING_CONFIG_PATH" in os.environ:
            return
        folder = Path(tempfile.mkdtemp(prefix="vlv-vllm-"))
        self._logs = folder / "vllm.log"
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(processName)s %(levelname)s %(message)s"}},
            "handlers": {"file": {"class": "logging.FileHandler", "filename": str(self._logs), "formatter": "plain"}},
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        (folder / "logging.json").write_text(json.dumps(config))
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(folder / "logging.json")
        logging.config.dictConfig(config)  # vLLM reads the file only after its first messages

    def _explain(self, what: str, error: BaseException) -> str:
        """One sentence with the first cause, which vLLM leaves to its log, and where that is."""
        self._failed = True  # so the log is kept
        cause = one_line(error)
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            return f"{what}: it is not installed; install it, or use --engine transformers (--doctor says more)"
        if self._logs is None:
            return f"{what}: {cause}"
        causes = re.findall(r"^.*?\b(\w*(?:Error|Exception): .+)$", self._logs.read_text(errors="replace"), re.M)
        return f"{what}: {causes[0] if causes else cause} (its log: {self._logs})"

    async def tokens(self, embeds: Tensor, sampling: Sampling, every: bool) -> AsyncGenerator[list[int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt, number = self._prompt(embeds), str(next(self._ids))
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if sampling.temperature > 0 else None,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            min_tokens=sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            stop_token_ids=[] if sampling.ignore_eos else list(self.ends),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if every else RequestOutputKind.FINAL_ONLY,
        )
        request = self._engine.generate(prompt, params, number, lora_request=self._lora)
        try:
            async with aclosing(request) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    steps = completion.logprobs
                    logprobs = steps and [{i: entry.logprob for i, entry in step.items()} for step in steps]
                    yield Tokens(completion.token_ids, logprobs)
        except Exception as error:
            raise EngineError(self._explain("vLLM's engine has died", error)) from error

    def _prompt(self, values: Tensor) -> dict:
        """Return vLLM's input. `values`: embeddings, or a crop uint8 [3, S, S] if it takes crops. Raises EmbedsError.

        With its type, vLLM takes the input as it is; without, it would be looked at in another thread first.
        """
        if not self.takes_crops:
            self.spec.check(values)
        if self._field is None:
            return {"type": "embeds", "prompt_embeds": values}
        from serve.vllm_model.requests import image_input

        return image_input(self._field, values, self.spec.queries, str(next(self._ids)))

    def _processes(self) -> list:
        if self._others is None:  # never started
            return []
        return [process for process in _engine_processes() if process.pid not in self._others]

    @property
    def alive(self) -> bool:
        return self._engine is not None and not self._engine.errored

    async def close(self) -> None:
        self._closed = True
        if self._engine is not None:
            # in a thread: it waits for the processes, and a second Ctrl-C must still get through
            await asyncio.to_thread(self._engine.shutdown, timeout=SHUTDOWN)
            self._engine = None
            await asyncio.sleep(0)  # its cancelled tasks let go of it
            gc.collect()  # or its destructor would run, and fail, when the interpreter ends
        for process in self._processes():  # still booting, when it listens to nothing softer
            process.kill()
        self._reaper.dismiss()
        torch.set_num_threads = SET_NUM_THREADS
        if self._sockets is not None:
            os.environ.pop("VLLM_RPC_BASE_PATH", None)  # ours: the next process must not look for it
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None
        if self._logs is not None:
            os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)  # ours: the next process must not look for it
            logger = logging.getLogger("vllm")
            for handler in [h for h in logger.handlers if getattr(h, "baseFilename", "") == str(self._logs)]:
                logger.removeHandler(handler)
                handler.close()
            if not self._failed:
                shutil.rmtree(self._logs.parent, ignore_errors=True)


def lora_rank(folder: Path) -> int:
    """Return the largest rank in a PEFT adapter, rounded up to one that vLLM has. Raises OptionError."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        return next(r for r in LORA_RANKS if r >= rank)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"--lora: {file} does not describe a LoRA adapter: {one_line(error)}") from error
    except StopIteration:
        raise OptionError(f"--lora: {file}: rank {rank}; vLLM takes up to {LORA_RANKS[-1]}") from None


def _engine_processes() -> list:
    return [p for p in multiprocessing.active_children() if p.name.startswith("EngineCore")]


def _settle(future: asyncio.Future, error: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


@contextlib.contextmanager
def _diverted(log: Path):
    """Descriptors 1 and 2 lead to `log`: new processes inherit them and their libraries' chatter ends there.

    What this process itself prints to sys.stderr still goes where it went before.
    """
    saved = os.dup(1), os.dup(2)
    before, sys.stderr = sys.stderr, os.fdopen(os.dup(saved[1]), "w", buffering=1)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        for standard, copy in enumerate(saved, 1):
            os.dup2(copy, standard)
            os.close(copy)
