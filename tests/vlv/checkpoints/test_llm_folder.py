"""A language model's folder is used only if its weights are what its configuration says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv.checkpoints.folder import CheckpointError
from vlv.checkpoints.llm_folder import check_llm_folder, end_token_ids

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(captioning_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(captioning_checkpoint / "llm", tmp_path / "llm"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_good_folders_pass(folder):
    check_llm_folder(folder)
    tensors = load_file(folder / WEIGHTS)
    # a tied head may be stored too, and so may the constants that older transformers saved
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **frequencies})
    check_llm_folder(folder)
    change(folder / "config.json", tie_word_embeddings=False)
    check_llm_folder(folder)
    save(folder, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    change(folder / "config.json", tie_word_embeddings=True)
    check_llm_folder(folder)


def test_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    place = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if place[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    check_llm_folder(folder)
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards: model-00002-of-00002"):
        check_llm_folder(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_wrapped_names_are_refused(prefix, folder):
    save(folder, {prefix + name: tensor for name, tensor in load_file(folder / WEIGHTS).items()})
    with pytest.raises(CheckpointError, match=f"has a tensor '{prefix}model.*save the model inside the wrapper"):
        check_llm_folder(folder)


def test_an_untied_head_that_is_not_there(folder):
    change(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight, and tie_word_embeddings is false"):
        check_llm_folder(folder)


def test_missing_misshapen_and_unknown_tensors_are_named(folder):
    tensors = load_file(folder / WEIGHTS)
    down = next(name for name in sorted(tensors) if name.endswith("mlp.down_proj.weight"))
    save(folder, {name: tensor for name, tensor in tensors.items() if name != down})
    with pytest.raises(CheckpointError, match=f"does not fit its config.json: missing {down}$"):
        check_llm_folder(folder)
    save(folder, {**tensors, down: tensors[down][:-1].clone(), "extra.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"{down} is \[.*\], expected \[.*\]; unexpected extra\.weight"):
        check_llm_folder(folder)
    save(folder, {**tensors, down: tensors[down].to(torch.int8)})
    with pytest.raises(CheckpointError, match=f"does not fit its config.json: {down} is I8, expected floats$"):
        check_llm_folder(folder)
    save(folder, tensors)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change(folder / "config.json", num_hidden_layers=layers + 1, layer_types=None)
    with pytest.raises(CheckpointError, match=rf"missing model\.layers\.{layers}\..*; and \d+ more"):
        check_llm_folder(folder)


def test_damaged_files(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        check_llm_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        check_llm_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        check_llm_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        check_llm_folder(folder)


def test_end_tokens_are_the_tokenizers_and_the_models(folder):
    assert end_token_ids(folder) == (0,)
    generation = folder / "generation_config.json"
    change(generation, eos_token_id=[7, 0, 9])
    assert end_token_ids(folder) == (0, 7, 9)
    # as in Qwen2.5's base models with a chat tokenizer: the two name different tokens
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    count = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"].append({
        "id": count, "content": "<|im_end|>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    })  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    change(generation, eos_token_id=0)
    assert end_token_ids(folder) == (count, 0)
    generation.unlink()
    change(folder / "config.json", eos_token_id=[3])
    assert end_token_ids(folder) == (count, 3)


@pytest.mark.parametrize("wrong", ["<|end|>", [0, "x"], {"id": 0}])
def test_end_tokens_are_numbers(folder, wrong):
    change(folder / "generation_config.json", eos_token_id=wrong)
    with pytest.raises(CheckpointError, match=r"expected eos_token_id to be a token's number or a list of them, got "):
        end_token_ids(folder)


def test_no_end_token_at_all(folder):
    change(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    assert end_token_ids(folder) == (0,)
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    with pytest.raises(CheckpointError, match="names no end token"):
        end_token_ids(folder)
