"""The recorded outputs of the published implementation, from the slim copy or from ../shared."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.data.slim import PIXEL_STEP, TOKEN_STEP
from vlv.checkpoints.published_keys import PROMPT_IDS, TABLES

SLIM = Path(__file__).parents[1] / "data" / "official"
SHARED = Path(__file__).parents[3] / "shared"
FULL = SHARED / "official"

Weights = dict[str, torch.Tensor]
needs_shared = pytest.mark.skipif(not FULL.is_dir(), reason="no ../shared/official beside the repository")


@dataclass(frozen=True)
class Recording:
    """source: a folder with model.pt and its companions. Every step-th token and pixel is in `expected`."""

    source: Path
    crops: torch.Tensor  # uint8 [3, 3, 384, 384]
    expected: dict[str, torch.Tensor]
    captions: list[str]
    token_step: int
    pixel_step: int

    @classmethod
    def full(cls) -> Recording:
        expected = {k: torch.from_numpy(v) for k, v in np.load(FULL / "expected.npz").items()}
        return cls(FULL, expected["crop"], expected, json.loads((FULL / "captions.json").read_text()), 1, 1)

    @classmethod
    def slim(cls, folder: Path) -> Recording:
        """The slim copy, with its model.pt rebuilt in `folder`."""
        shutil.copytree(SLIM, folder, ignore=lambda *_: ["weights.safetensors"], dirs_exist_ok=True)
        torch.save(slim_weights(), folder / "model.pt")
        crops = [np.asarray(Image.open(SLIM / f"crop{i}.png")).transpose(2, 0, 1) for i in range(3)]
        expected = {k: torch.from_numpy(v) for k, v in np.load(SLIM / "expected.npz").items()}
        captions = json.loads((SLIM / "captions.json").read_text())
        return cls(folder, torch.from_numpy(np.stack(crops)), expected, captions, TOKEN_STEP, PIXEL_STEP)


def slim_weights() -> Weights:
    """The published state dict; the word table, tied as published, is zero but for the prompt's rows."""
    weights = load_file(SLIM / "weights.safetensors")
    rows = weights.pop("prompt_rows")
    table = torch.zeros(51289, rows.shape[1], dtype=rows.dtype)
    table[list(PROMPT_IDS)] = rows
    weights |= dict.fromkeys(TABLES, table)
    weights["VLV_model.model.language_model.final_logits_bias"] = torch.zeros(1, 51289, dtype=rows.dtype)
    return weights


def untied(weights: Weights) -> Weights:
    """As safetensors stores them: every tensor on its own."""
    return {name: tensor.clone() for name, tensor in weights.items()}


def sharded(folder: Path, weights: Weights, suffix: str) -> None:
    """Three shards and their index, as transformers (safetensors) and DeepSpeed (bin) write them."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    index = {}
    for shard in range(3):
        name = f"{stem}-{shard + 1:05}-of-00003.{suffix}"
        part = {n: t for i, (n, t) in enumerate(untied(weights).items()) if i % 3 == shard}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
