"""Check a language model's folder before it is used, and read which tokens end a text."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vlv.checkpoints.folder import CheckpointError, read_json, safetensors_header
from vlv.checkpoints.tensor_files import shards
from vlv.model.generation import join_end_tokens

# Families whose files have the tensor names of their transformers classes. Others (mixtures of experts, for one) are
# renamed while they are loaded, so their names are not compared.
_SAME_NAMES = ("qwen2", "qwen3", "llama", "mistral")
_WRAPPED = re.compile(r"(module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
_CONSTANT = re.compile(r".*rotary_emb\.inv_freq")  # older transformers saved it


def end_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return the token ids that end a text: the tokenizer's end token, then the model's, each once.

    The model's are those of generation_config.json, or else of config.json; they differ from the tokenizer's in some
    published folders, and the model may write either. tokenizer: the folder's, if it is loaded already.
    Raises CheckpointError where there is none.
    """
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    files = (read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    named = next((i for i in files if i is not None), None)
    if named is not None and not all(isinstance(i, int) for i in (named if isinstance(named, list) else [named])):
        raise CheckpointError(
            f"{folder}: expected eos_token_id to be a token's number or a list of them, got {named!r}"
        )
    ids = join_end_tokens(tokenizer.eos_token_id, named)
    if not ids:
        raise CheckpointError(
            f"{folder} names no end token, so captions would never end: set eos_token in tokenizer_config.json"
        )
    return ids


def check_llm_folder(folder: Path) -> None:
    """Raise CheckpointError unless the folder's safetensors hold every tensor that its config.json describes.

    Reads the files' headers only. Without this check, transformers replaces a missing tensor by random values and vLLM
    leaves it uninitialized; both write text. A folder with only pytorch_model.bin is left to its loader.
    """
    values = read_json(folder / "config.json")
    if not values:
        raise CheckpointError(f"{folder} has no config.json: expected the folder of a transformers language model")
    files = _weight_files(folder)
    if not files:
        return
    tensors = {name: tensor for file in files for name, tensor in safetensors_header(file).items()}
    found = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    if wrapped := next((name for name in found if _WRAPPED.match(name)), None):
        raise CheckpointError(
            f"{files[0]} has a tensor {wrapped!r}, so it was saved from a wrapper (DDP, torch.compile, FSDP, PEFT): "
            "save the model inside the wrapper instead (model.module, model._orig_mod, merge_and_unload())"
        )
    if "quantization_config" in values or values.get("model_type") not in _SAME_NAMES:
        return
    problems = _problems(folder, found)
    problems += [f"{name} is {t['dtype']}, expected floats" for name, t in tensors.items() if "F" not in t["dtype"]]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(problems[:5])}{more}")


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that loaders read; none where there are only pytorch_model.bin files."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return shards(index)
    if found := sorted(folder.glob("*.safetensors")):
        return found
    if any(folder.glob("*.bin")):
        return []
    raise CheckpointError(f"{folder} holds no weights: expected model.safetensors, or its shards and their index")


def _problems(folder: Path, found: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the differences between tensors found and the tensors of config.json's model, one line each."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config).state_dict()
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no language model: {error}") from error
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings:
        expected.pop(head, None)
    elif head in expected and head not in found:
        return [f"missing {head}, and tie_word_embeddings is false: set it to true if {table} is the output layer too"]
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [
        f"{name} is {list(found[name])}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    known = {*expected, head}
    return problems + [f"unexpected {name}" for name in found if name not in known and not _CONSTANT.fullmatch(name)]
