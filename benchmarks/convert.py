"""Time and peak memory of converting a published checkpoint of full size, and back.

    python -m benchmarks.convert                    # 4.2 B parameters in bf16: needs 25 GB of disk
    python -m benchmarks.convert --preset tiny --dtype float16 --out /tmp/smoke.json

A checkpoint of random weights is streamed to disk in the published layout, as a torch file and as
safetensors; `python -m vlv.published` converts it and writes it back, each in its own process; the
result is compared tensor by tensor, and everything is deleted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from vlv.checkpoints import published_keys as keys
from vlv.checkpoints.random_weights import llm_plan, maker, tokenizer
from vlv.checkpoints.tensor_files import Tensors, weight_files, write_safetensors, write_state_dict
from vlv.common.command import command_line
from vlv.common.files import write_json
from vlv.model.config import PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder

WORDS, CLIP_WORDS, FRAMES = 51289, 49408, 100  # rows of tables that the encoder uses little or nothing of


def published_plan(config: VLVConfig, llm: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The published state dict's tensors, as meta tensors; the word tables tied to the first are left out."""
    with torch.device("meta"):
        ours = VLVEncoder(config).to(dtype).state_dict()
    plan = {keys.LLM + name: tensor for name, tensor in llm.items()}
    rows = {keys.TABLES[0]: WORDS, f"{keys.STAGE1}model.visual_temporal_embed.pos_idx_to_embed": FRAMES}
    for name, (our_name, piece, part) in keys.disassemble(keys.layout(config), ours).items():
        tensor = part(ours[our_name])
        count = len(tensor) if piece.rows is None else rows.get(name, piece.last_row + 1)
        plan[name] = torch.empty(count, *tensor.shape[1:], dtype=dtype, device="meta")
    for name, shape in {
        keys.TABLES[3]: (WORDS, config.width),
        f"{keys.STAGE1}model.language_model.final_logits_bias": (1, WORDS),
        f"{keys.CLIP}embeddings.token_embedding.weight": (CLIP_WORDS, config.context_width),
    }.items():
        plan[name] = torch.empty(shape, dtype=dtype, device="meta")
    return plan


def write_published(folder: Path, config: VLVConfig, llm_preset: str, dtype: torch.dtype, kind: str) -> int:
    """Stream a random published checkpoint, with the configurations of what it was made of; its parameters."""
    llm_config, llm = llm_plan(llm_preset, dtype)
    plan = published_plan(config, llm, dtype)
    for name in ("qwen", "florence2", "text_encoder"):
        (folder / name).mkdir(parents=True)
    llm_config.save_pretrained(folder / "qwen")
    tokenizer(llm_config.vocab_size).save_pretrained(folder / "qwen")
    vision = config.vision
    described = {
        "dim_embed": vision.dims, "num_heads": vision.heads, "num_groups": vision.groups, "depths": vision.depths,
        "patch_stride": vision.strides, "patch_padding": vision.paddings, "patch_prenorm": vision.prenorm,
        "window_size": vision.window,
    }  # fmt: skip
    text = {"encoder_attention_heads": config.heads}
    write_json(
        folder / "florence2" / "config.json",
        {"model_type": "florence2", "vision_config": described, "text_config": text},
    )
    side = config.image_size * config.upsample
    write_json(folder / "florence2" / "preprocessor_config.json", {"size": {"height": side, "width": side}})
    write_json(
        folder / "text_encoder" / "config.json",
        {
            "model_type": "clip_text_model",
            "num_attention_heads": config.context_heads,
            "hidden_act": config.context_activation,
        },
    )
    if kind == "pt":
        aliases = dict.fromkeys(keys.TABLES[1:3], keys.TABLES[0])
        if llm_config.tie_word_embeddings:
            aliases[keys.LLM + "lm_head.weight"] = keys.LLM + "model.embed_tokens.weight"
        write_state_dict(folder / "model.pt", [*plan, *aliases], plan, maker(plan), aliases)
    else:
        write_safetensors(folder / "model.safetensors", plan, maker(plan))
    return sum(tensor.numel() for tensor in plan.values())


def measure(*command: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of `python -m vlv.published` with these arguments."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "vlv.published", *command], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        # ru_maxrss would count this process's memory at the fork; the kernel's own mark does not
        status = Path(f"/proc/{process.pid}/status").read_text()
        marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max(peak, *(int(mark) * 1024 for mark in marks), 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"conversion failed with exit code {process.returncode}")
    return time.monotonic() - start, peak


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def identical(first: Path, second: Path) -> bool:
    """Whether two published checkpoints have the same names, dtypes, shapes and bits."""
    a, b = Tensors(weight_files(first)), Tensors(weight_files(second))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def run(preset: str, dtype: torch.dtype, kind: str, workspace: Path) -> dict:
    config, source, ours = PRESETS[preset], workspace / "source", workspace / "ours"
    start = time.monotonic()
    parameters = write_published(source, config, preset, dtype, kind)
    written = time.monotonic() - start
    weights = weight_files(source)[0]
    there, there_peak = measure(str(source), "--out", str(ours), "--image-size", str(config.image_size))
    back_to = workspace / ("back.pt" if kind == "pt" else "back")
    back, back_peak = measure(str(ours), "--to-published", "--out", str(back_to))
    largest = max(size(weights), size(ours))
    return {
        "preset": preset, "dtype": str(dtype).removeprefix("torch."), "source": kind, "parameters": parameters,
        "source_bytes": size(weights), "target_bytes": size(ours), "write_source_s": round(written, 1),
        "convert_s": round(there, 1), "convert_peak_rss": there_peak,
        "convert_peak_over_larger": round(there_peak / largest, 3),
        "back_s": round(back, 1), "back_peak_rss": back_peak, "back_peak_over_larger": round(back_peak / largest, 3),
        "bit_exact": identical(weights, back_to),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen2.5-3b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--kinds", nargs="+", choices=("pt", "safetensors"), default=["pt", "safetensors"])
    parser.add_argument("--workspace", type=Path, help="folder on a disk with room (default: the system's temporary)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/convert.json"))
    args = parser.parse_args()
    if args.workspace:
        args.workspace.mkdir(parents=True, exist_ok=True)
    command = command_line("benchmarks.convert")
    result = {"command": command, "machine": machine.describe(), "runs": []}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.workspace) as workspace:
            result["runs"].append(run(args.preset, getattr(torch, args.dtype), kind, Path(workspace)))
        print(json.dumps(result["runs"][-1]), file=sys.stderr)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
