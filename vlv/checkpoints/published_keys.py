"""Map the names of a published state dict to ours: which tensors, or which rows of them, make up each of ours.

Published names (models/VLV_stage1.py and VLV_stage2.py of the authors' code, Florence-2's
modeling_florence2.py): `qwen2_model.*`, `VLV_model.{model,language_proj,query_embed,text_encoder}.*`,
`mlp.layers.*`. A stage-1 checkpoint has the second group alone, without its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlv.model.config import VLVConfig

PROMPT = "Describe with a paragraph what is shown in the image."
PROMPT_IDS = (0, 47066, 21700, 19, 10, 17818, 99, 16, 2343, 11, 5, 2274, 4, 2)  # by Florence-2's tokenizer

LLM = "qwen2_model."
STAGE1 = "VLV_model."
TOWER = STAGE1 + "model.vision_tower."
BART = STAGE1 + "model.language_model.model."
CLIP = STAGE1 + "text_encoder.text_model."
# Any of these holds the prompt's embeddings: they are tied, and a safetensors file keeps only one of tied tensors.
TABLES = tuple(f"{BART}{t}.weight" for t in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")) + (
    STAGE1 + "model.language_model.lm_head.weight",
)
_FREQUENCIES = r"qwen2_model\..*rotary_emb\.inv_freq"  # older transformers saved them; they are constants
# Published tensors that our encoder does not use; a conversion keeps them in published.safetensors.
_UNUSED = re.compile(
    "|".join(re.escape(t) for t in TABLES)
    + rf"|{re.escape(STAGE1)}model\.language_model\.final_logits_bias"
    + rf"|{re.escape(CLIP)}embeddings\.(token_embedding\.weight|position_ids)"
    + rf"|{re.escape(STAGE1)}(vae|unet)\..*"
    + rf"|{_FREQUENCIES}"
)


def is_llm(name: str) -> bool:
    """Return True if a published tensor is a weight of the language model."""
    return name.startswith(LLM) and not re.fullmatch(_FREQUENCIES, name)


@dataclass(frozen=True)
class Piece:
    """Describe one published tensor inside one of ours: `rows` of it (None: all), transposed, or with a leading 1."""

    name: str
    rows: slice | tuple[int, ...] | None = None
    transposed: bool = False
    leading: bool = False

    def take(self, theirs: Tensor) -> Tensor:
        """Return the part of the published tensor that belongs to ours."""
        theirs = theirs if self.rows is None else theirs[self.rows if isinstance(self.rows, slice) else list(self.rows)]
        return theirs.T if self.transposed else theirs[0] if self.leading else theirs

    def give(self, ours: Tensor) -> Tensor:
        """Return the published form of our rows, the inverse of `take`."""
        return ours.T if self.transposed else ours[None] if self.leading else ours

    def put(self, ours: Tensor, table: Tensor) -> Tensor:
        """Return a copy of the published table with our rows in it."""
        table = table.clone()
        table[self.rows if isinstance(self.rows, slice) else list(self.rows)] = ours.to(table.dtype).reshape(
            -1, *table.shape[1:]
        )
        return table

    @property
    def last_row(self) -> int:
        """Return the highest of `rows`."""
        return max(self.rows) if isinstance(self.rows, tuple) else self.rows.stop - 1


Layout = dict[str, list[Piece]]  # our tensor -> its pieces, stacked along the first axis


def layout(config: VLVConfig, table: str = TABLES[0], prompt: Sequence[int] = PROMPT_IDS) -> Layout:
    """Return the published tensors of each encoder tensor, for the prompt's ids in the embedding `table`."""
    c, made = config, Layout()

    def pair(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{ours}.{kind}"] = [Piece(f"{t}.{kind}") for t in theirs]

    for stage, depth in enumerate(c.vision.depths):
        pair(f"vision.embeds.{stage}.conv", f"{TOWER}convs.{stage}.proj")
        pair(f"vision.embeds.{stage}.norm", f"{TOWER}convs.{stage}.norm")
        for step in range(depth):
            for kind, (block, attention) in enumerate((("spatial", "window_attn"), ("channel", "channel_attn"))):
                ours, theirs = f"vision.stages.{stage}.{step}.{kind}", f"{TOWER}blocks.{stage}.{step}.{block}_block"
                pair(f"{ours}.dw1.conv", f"{theirs}.conv1.fn.dw")
                pair(f"{ours}.dw1.norm", f"{theirs}.{attention}.norm")
                pair(f"{ours}.attention.qkv", f"{theirs}.{attention}.fn.qkv")
                pair(f"{ours}.attention.proj", f"{theirs}.{attention}.fn.proj")
                pair(f"{ours}.dw2.conv", f"{theirs}.conv2.fn.dw")
                pair(f"{ours}.dw2.norm", f"{theirs}.ffn.norm")
                pair(f"{ours}.fc1", f"{theirs}.ffn.fn.net.fc1")
                pair(f"{ours}.fc2", f"{theirs}.ffn.fn.net.fc2")

    model = STAGE1 + "model."
    made["image.columns"] = [Piece(f"{model}image_pos_embed.column_embeddings.weight")]
    made["image.rows"] = [Piece(f"{model}image_pos_embed.row_embeddings.weight")]
    made["image.temporal"] = [Piece(f"{model}visual_temporal_embed.pos_idx_to_embed", slice(0, 1), leading=True)]
    made["image.projection.weight"] = [Piece(f"{model}image_projection", transposed=True)]
    pair("image.norm", f"{model}image_proj_norm")

    made["bottleneck.prompt"] = [Piece(table, tuple(prompt))]
    made["bottleneck.queries"] = [Piece(f"{STAGE1}query_embed", leading=True)]
    for side, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        ours, theirs = f"bottleneck.{side}", BART + side
        made[f"{ours}.positions"] = [Piece(f"{theirs}.embed_positions.weight", slice(2, c.text_positions + 2))]
        pair(f"{ours}.norm", f"{theirs}.layernorm_embedding")
        for i in range(layers):
            a, b = f"{ours}.layers.{i}", f"{theirs}.layers.{i}"
            pair(f"{a}.attention.qkv", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
            pair(f"{a}.attention.proj", f"{b}.self_attn.out_proj")
            pair(f"{a}.attention_norm", f"{b}.self_attn_layer_norm")
            if side == "decoder":
                pair(f"{a}.cross.q", f"{b}.encoder_attn.q_proj")
                pair(f"{a}.cross.kv", f"{b}.encoder_attn.k_proj", f"{b}.encoder_attn.v_proj")
                pair(f"{a}.cross.proj", f"{b}.encoder_attn.out_proj")
                pair(f"{a}.cross_norm", f"{b}.encoder_attn_layer_norm")
            pair(f"{a}.fc1", f"{b}.fc1")
            pair(f"{a}.fc2", f"{b}.fc2")
            pair(f"{a}.norm", f"{b}.final_layer_norm")

    pair("bottleneck.projection.0", f"{STAGE1}language_proj.0")
    pair("bottleneck.projection.2", f"{STAGE1}language_proj.2")
    made["bottleneck.text.positions"] = [Piece(f"{CLIP}embeddings.position_embedding.weight", slice(0, c.queries))]
    pair("bottleneck.text.norm", f"{CLIP}final_layer_norm")
    for i in range(c.context_layers):
        a, b = f"bottleneck.text.layers.{i}", f"{CLIP}encoder.layers.{i}"
        pair(f"{a}.attention.qkv", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
        pair(f"{a}.attention.proj", f"{b}.self_attn.out_proj")
        for n in "12":
            pair(f"{a}.norm{n}", f"{b}.layer_norm{n}")
            pair(f"{a}.fc{n}", f"{b}.mlp.fc{n}")

    if c.llm_width:
        pair("to_llm.0", "mlp.layers.0")
        pair("to_llm.2", "mlp.layers.2")
    return made


def assemble(pieces: Sequence[Piece], theirs: Callable[[str], Tensor], shape: torch.Size) -> Tensor:
    """Assemble our tensor from its published pieces."""
    taken = [piece.take(theirs(piece.name)) for piece in pieces]
    return (taken[0] if len(taken) == 1 else torch.cat(taken)).reshape(shape)


def disassemble(made: Layout, ours: Mapping[str, Tensor]) -> dict[str, tuple[str, Piece, Callable[[Tensor], Tensor]]]:
    """Return published name -> (our name, piece, function from our tensor to the published tensor or its rows)."""

    def part(piece: Piece, index: int, count: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: piece.give(tensor.chunk(count)[index])

    return {
        piece.name: (name, piece, part(piece, index, len(pieces)))
        for name, pieces in made.items()
        if name in ours
        for index, piece in enumerate(pieces)
    }


def problems(made: Layout, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Return why the encoder cannot be assembled from these tensors (meta tensors suffice), one line each."""
    found = []
    for name, (our_name, piece, part) in disassemble(made, ours).items():
        if name not in theirs:
            found.append(f"missing {name}")
            continue
        expected, shape = list(part(ours[our_name]).shape), list(theirs[name].shape)
        if piece.rows is None and shape != expected:
            found.append(f"{name} is {shape}, expected {expected}")
        elif piece.rows is not None and (shape[1:] != expected[1:] or shape[0] <= piece.last_row):
            found.append(f"{name} is {shape}, expected at least {[piece.last_row + 1, *expected[1:]]}")
    for pieces in made.values():
        dtypes = {p.name: theirs[p.name].dtype for p in pieces if p.name in theirs}
        if len(set(dtypes.values())) > 1:
            shown = ", ".join(f"{n} {str(d).removeprefix('torch.')}" for n, d in dtypes.items())
            found.append(f"{shown}: these become one tensor here and need one dtype (give --dtype)")
    used = {piece.name for pieces in made.values() for piece in pieces}
    found += [f"unexpected {n}" for n in theirs if n not in used and not is_llm(n) and not _UNUSED.fullmatch(n)]
    return found
