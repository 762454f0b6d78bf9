"""Language-model folders as people publish them: own generation settings, two end tokens, missing weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.engines.base import EngineError, LLMSpec, Options, Sampling
from serve.engines.factory import engine_class
from serve.engines.transformers import TransformersEngine
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common.command import INSTALL
from vlv.model.captioner import Captioner
from vlv.model.generation import cut_at_end

TOKENS, IMAGES = 120, 6
# Qwen2.5-Instruct's settings, and some that forbid the right tokens
SETTINGS = {
    "do_sample": True,
    "repetition_penalty": 1.5,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "num_beams": 3,
    "no_repeat_ngram_size": 2,
    "min_length": 100,
    "max_new_tokens": 5,
    "suppress_tokens": list(range(20, 200)),
}


def needs(word: str) -> None:
    """Skip the test where the engine's package is not installed."""
    if package := {"vllm": "vllm", "llamacpp": "xllamacpp"}.get(word):
        pytest.importorskip(package, reason=INSTALL[package])


def update(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def copy(captioning_checkpoint, tmp_path) -> Path:
    """A copy of the bundled checkpoint without its text-to-image model."""
    shutil.copytree(captioning_checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("t2i"))
    return tmp_path / "copy"


def other_end_token(llm: Path) -> None:
    """Make <|im_end|>, a new token, the tokenizer's end; the model goes on to write its own (QwenLM/Qwen#927)."""
    weights = load_file(llm / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    end = len(table)
    weights["model.embed_tokens.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    update(llm / "config.json", vocab_size=end + 1)
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": end, "content": "<|im_end|>", **flags})
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    update(llm / "tokenizer_config.json", eos_token="<|im_end|>")


@pytest.fixture
def embeds(captioning_checkpoint, scene_images):
    """The prompt embeddings of some images [IMAGES, queries, width]."""
    import numpy as np

    from vlv.data.image import load_crop

    checkpoint = Checkpoint.open(captioning_checkpoint)
    crops = [load_crop(scene_images / f"{i:02}.png", checkpoint.config.image_size) for i in range(IMAGES)]
    with torch.inference_mode():
        return checkpoint.load_encoder()(torch.from_numpy(np.stack(crops)))


def completions(word: str, checkpoint: Path, embeds) -> list:
    options = Options(placement="inline") if word == "vllm" else None  # in this process: it imports vLLM no second time
    engine = engine_class(word)(LLMSpec.of(Checkpoint.open(checkpoint)), TOKENS, IMAGES, options=options)

    async def run():
        try:
            await engine.start()
            return await asyncio.gather(*(engine.generate(row, Sampling(TOKENS)) for row in embeds))
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize("word", ["transformers", "vllm", "llamacpp"])
def test_the_folder_decides_neither_how_to_decode_nor_where_to_go_on(word, copy, captioning_checkpoint, embeds):
    """The captions are those of the folder without settings, and end where the model ends them."""
    needs(word)
    expected = completions("transformers", captioning_checkpoint, embeds)
    assert all(c.finish_reason == "stop" for c in expected)
    other_end_token(copy / "llm")
    update(copy / "llm" / "generation_config.json", **SETTINGS)
    found = completions(word, copy, embeds)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [(c.text, c.finish_reason) for c in found] == [(c.text, "stop") for c in expected]


@pytest.mark.parametrize("word", ["transformers", "vllm", "llamacpp"])
@pytest.mark.parametrize("damage", ["a layer", "the head", "a prefix"])
def test_incomplete_folders_are_refused_by_name(word, damage, copy, embeds):
    """Both libraries would write: transformers with random values, vLLM with uninitialized ones."""
    needs(word)
    file = copy / "llm" / "model.safetensors"
    weights = load_file(file)
    if damage == "a layer":
        del weights["model.layers.2.mlp.down_proj.weight"]
        words = "missing model.layers.2.mlp.down_proj.weight"
    elif damage == "the head":
        update(copy / "llm" / "config.json", tie_word_embeddings=False)
        words = "missing lm_head.weight"
    else:
        weights = {f"module.{name}": tensor for name, tensor in weights.items()}
        words = "was saved from a wrapper"
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises((EngineError, CheckpointError), match=words):
        completions(word, copy, embeds[:1])


def test_the_captioner_agrees(copy):
    """The reference of training and evaluation ends at the same tokens as the engines."""
    other_end_token(copy / "llm")
    captioner = Captioner.load(Checkpoint.open(copy))
    engine = TransformersEngine(LLMSpec.of(Checkpoint.open(copy)), TOKENS, 1)
    engine._load_tokenizer()
    assert tuple(captioner.end_tokens) == engine.ends and len(engine.ends) == 2
    assert cut_at_end([5, engine.ends[1], 6], engine.ends) == [5]
