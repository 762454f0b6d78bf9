"""Convert published weights to a checkpoint folder, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from vlv.checkpoints import published_keys as keys
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.published_config import SMALL_FILES, Companions, infer_config, llm_config
from vlv.checkpoints.tensor_files import Progress, Tensors, weight_files, write_safetensors
from vlv.common.files import atomic_folder, link_tree, write_json
from vlv.model.config import FORMAT
from vlv.model.encoder import VLVEncoder


def convert(
    source: Path,
    out: Path,
    florence: str | None = None,
    clip: str | None = None,
    llm: str | None = None,
    t2i: Path | None = None,
    dtype: torch.dtype | None = None,
    image_size: int = 384,
    force: bool = False,
) -> Checkpoint:
    """Convert published weights, a file or a folder, to a checkpoint folder. Raises CheckpointError.

    florence, clip, llm: folders or hub ids of the models it was built from (None: searched beside the
    weights). t2i: a Stable Diffusion folder to link, for reconstruction. dtype: None keeps each tensor's.
    """
    files = weight_files(source)
    beside = Companions.find(source if source.is_dir() else source.parent, florence, clip, llm)
    if t2i and not (t2i / "model_index.json").is_file():
        raise CheckpointError(f"{t2i} has no model_index.json: expected a diffusers folder of Stable Diffusion")
    plan = _Plan(Tensors(files), beside, image_size, dtype)
    parts = (plan.encoder, plan.llm, plan.kept)
    progress = Progress("converted", sum(tensor.nbytes for part in parts for tensor in part.values()))
    with atomic_folder(out, progress.total, force) as folder:
        write_safetensors(folder / "encoder.safetensors", plan.encoder, progress.watch(plan.make))
        if plan.llm:
            _copy_small_files(beside.llm_folder(plan.config.llm_width), folder / "llm")
            write_json(folder / "llm" / "config.json", plan.llm_config)
            make = progress.watch(lambda name: plan.theirs(keys.LLM + name))
            write_safetensors(folder / "llm" / "model.safetensors", plan.llm, make)
        make = progress.watch(plan.theirs)
        write_safetensors(folder / "published.safetensors", plan.kept, make, {"vlv": json.dumps(plan.notes)})
        if t2i:
            link_tree(t2i, folder / "t2i")
        write_json(folder / "vlv.json", {"format": FORMAT, "model": plan.config.to_dict()})
    return Checkpoint.open(out)


class _Plan:
    """Assign every published tensor (as meta tensors by name) to a file. Raises CheckpointError before any write.

    encoder: the encoder's tensors. llm: the language model's. kept: those that neither of them can restore.
    """

    def __init__(self, tensors: Tensors, beside: Companions, image_size: int, dtype: torch.dtype | None):
        self._tensors, self._dtype = tensors, dtype
        # a stage-1 checkpoint's names lack the prefix that they have within stage 2
        nested = any(name.startswith((keys.STAGE1, keys.LLM)) for name in tensors)
        self._actual = {name if nested else keys.STAGE1 + name: name for name in tensors}
        names = {actual: name for name, actual in self._actual.items()}
        metas = {name: self._cast(tensors.metas[actual]) for name, actual in self._actual.items()}
        aliases = {names[a]: names[b] for a, b in tensors.aliases.items()}

        self.config = infer_config(metas, beside, image_size)
        prompt, table = beside.prompt(), next((t for t in keys.TABLES if t in metas), keys.TABLES[0])
        self._layout = keys.layout(self.config, table, prompt)
        with torch.device("meta"):
            ours = VLVEncoder(self.config).state_dict()
        problems = keys.problems(self._layout, ours, metas)
        self.llm: dict[str, Tensor] = {}
        if self.config.llm_width:
            self.llm = {n.removeprefix(keys.LLM): t for n, t in metas.items() if keys.is_llm(n)}
            self.llm_config, lost = llm_config(beside.llm_folder(self.config.llm_width), self.llm, self._same)
            problems += lost
            if self.llm_config.get("tie_word_embeddings") and self.llm.pop("lm_head.weight", None) is not None:
                aliases[f"{keys.LLM}lm_head.weight"] = f"{keys.LLM}model.embed_tokens.weight"
        if problems:
            lines = ["the weights make no VLV checkpoint; nothing is written:", *sorted(problems)]
            raise CheckpointError("\n  ".join(lines))
        self.encoder = {
            name: torch.empty(ours[name].shape, dtype=metas[pieces[0].name].dtype, device="meta")
            for name, pieces in self._layout.items()
        }
        written = {piece.name for pieces in self._layout.values() for piece in pieces if piece.rows is None}
        written |= {keys.LLM + name for name in self.llm} | aliases.keys()
        self.kept = {name: tensor for name, tensor in metas.items() if name not in written}
        self.notes = {"names": self._actual, "aliases": aliases, "table": table, "prompt": prompt}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    def theirs(self, name: str) -> Tensor:
        """Return a published tensor, by its name within stage 2."""
        return self._cast(self._tensors[self._actual[name]])

    def make(self, name: str) -> Tensor:
        """Assemble a tensor of the encoder."""
        return keys.assemble(self._layout[name], self.theirs, self.encoder[name].shape)

    def _same(self, a: str, b: str) -> bool:
        """Return True if two tensors of the language model are equal, bit by bit."""
        first, second = (self._tensors[self._actual[keys.LLM + name]] for name in (a, b))
        return first.dtype == second.dtype and torch.equal(first, second)


def _copy_small_files(source: Path, target: Path) -> None:
    """Copy a transformers folder without its weights: configuration, tokenizer, generation settings."""
    target.mkdir()
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
