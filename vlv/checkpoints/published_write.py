"""Write a converted checkpoint back to the published layout, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from vlv.checkpoints import published_keys as keys
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.tensor_files import Progress, Tensors, metadata, write_safetensors, write_state_dict
from vlv.common.files import OutputExists, atomic_folder, atomic_write, link_file, require_space

PUBLISHED = "published.safetensors"  # in a checkpoint folder: what the encoder and the language model do not have


def carry_published(source: Path, target: Path) -> None:
    """Link published.safetensors of a checkpoint folder into one that was trained from it, if there is one.

    It has the word tables and names that the published layout needs, and nothing that training changes.
    """
    file = target / PUBLISHED
    if (source / PUBLISHED).is_file() and not file.exists():
        with atomic_write(file) as temporary:
            link_file(source / PUBLISHED, temporary)


def to_published(folder: Path, out: Path, force: bool = False) -> Path:
    """Write the published state dict: a torch file if `out` ends in .pt or .bin, else a folder with model.safetensors.

    Weights trained since the conversion replace those that were read; a language model that was added to a stage-1
    checkpoint since makes it a stage-2 one. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(folder)
    beside = folder / PUBLISHED
    if not beside.is_file():
        raise CheckpointError(
            f"{folder} has no {PUBLISHED}: neither it nor the checkpoint that it was trained from was converted from "
            "published weights, or the file was deleted; convert the published ones again, and copy the file"
        )
    notes = json.loads(metadata(beside)["vlv"])
    layout = keys.layout(checkpoint.config, notes["table"], notes["prompt"])
    ours, kept = Tensors([checkpoint.encoder_file]), Tensors([beside])
    llm = Tensors(sorted((folder / "llm").glob("*.safetensors")))
    parts = keys.disassemble(layout, ours)
    names, aliases = _names(notes["names"], notes["aliases"], parts, llm)

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


def _names(
    names: dict[str, str], aliases: dict[str, str], parts: Iterable[str], llm: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return name within stage 2 -> name in the file, and name -> name of tied tensors, for what there is now.

    names, aliases: as of the conversion; they are returned as they are where the tensors are still the same ones.
    """
    language = [keys.LLM + name for name in llm]
    added = [name for name in (*language, *parts) if name not in names]
    gone = [name for name in names if keys.is_llm(name) and name not in aliases and name not in language]
    if not added and not gone:
        return names, aliases
    aliases = {name: original for name, original in aliases.items() if not keys.is_llm(name)}
    head, table = f"{keys.LLM}lm_head.weight", f"{keys.LLM}model.embed_tokens.weight"
    if language and head not in language:
        aliases[head] = table
    everything = [*language, *([head] if head in aliases else []), *names, *added]
    kept = [name for name in everything if not keys.is_llm(name) or name in language or name in aliases]
    return {name: name for name in kept}, aliases
