"""Write a converted checkpoint back to the published layout, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlv.checkpoints import published_keys as keys
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.tensor_files import Progress, Tensors, metadata, write_safetensors, write_state_dict
from vlv.common.files import OutputExists, atomic_folder, atomic_write, require_space


def to_published(folder: Path, out: Path, force: bool = False) -> Path:
    """Write the published state dict: a torch file if `out` ends in .pt or .bin, else a folder with model.safetensors.

    Weights trained since the conversion replace those that were read. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(folder)
    beside = folder / "published.safetensors"
    if not beside.is_file():
        raise CheckpointError(
            f"{folder} has no published.safetensors: it was not converted from a published checkpoint, "
            "or the file was deleted; convert the published one again"
        )
    notes = json.loads(metadata(beside)["vlv"])
    names, aliases = notes["names"], notes["aliases"]  # name within stage 2 -> name in the file; name -> name
    layout = keys.layout(checkpoint.config, notes["table"], notes["prompt"])
    ours, kept = Tensors([checkpoint.encoder_file]), Tensors([beside])
    llm = Tensors(sorted((folder / "llm").glob("*.safetensors")))
    parts = keys.disassemble(layout, ours)

    def make(name: str, ours: Mapping[str, Tensor], llm: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        if keys.is_llm(name):
            return llm[name.removeprefix(keys.LLM)]
        if name not in parts:
            return kept[name]
        our_name, piece, part = parts[name]
        rows = part(ours[our_name])
        return rows if piece.rows is None else piece.put(rows, kept[name])

    try:
        plan = {names[n]: make(n, ours.metas, llm.metas, kept.metas) for n in names if n not in aliases}
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks {error}: it was changed since its conversion") from error
    back = {actual: name for name, actual in names.items()}
    shared = {names[a]: names[b] for a, b in aliases.items()}
    progress = Progress("written", sum(tensor.nbytes for tensor in plan.values()))
    produce = progress.watch(lambda name: make(back[name], ours, llm, kept))
    if out.suffix not in (".pt", ".bin"):
        everything = {name: plan[shared.get(name, name)] for name in back}
        size = sum(tensor.nbytes for tensor in everything.values())
        with atomic_folder(out, size, force) as made:
            write_safetensors(made / "model.safetensors", everything, lambda name: produce(shared.get(name, name)))
        return out
    if out.exists() and not force:
        raise OutputExists(f"{out} exists: choose another --out, or replace it with --force")
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, progress.total)
    with atomic_write(out) as temporary:
        write_state_dict(temporary, list(back), plan, produce, shared)
    return out
