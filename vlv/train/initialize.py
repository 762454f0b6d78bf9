"""What a run at scale starts from, and which of its weights learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlv.checkpoints.folder import Checkpoint
from vlv.model.config import VLVConfig
from vlv.model.encoder import VLVEncoder
from vlv.train.config import TrainConfig


def model_config(base: VLVConfig, config: TrainConfig, llm_width: int) -> VLVConfig:
    """The start's sizes with what the flags change. Raises ValueError where its positions do not reach."""
    made = replace(
        base,
        queries=config.queries or base.queries,
        context_layers=base.context_layers if config.clip_layers else 0,
        image_size=config.image_size or base.image_size,
        llm_width=llm_width,
    )
    side = made.image_size * made.upsample
    for stride in made.vision.strides:
        side = -(-side // stride)
    if side > made.image_positions:
        raise ValueError(
            f"--image-size {made.image_size} gives a map of {side} x {side}, but the start has "
            f"{made.image_positions} positions a side: choose a smaller size"
        )
    if made.queries > made.text_positions:
        raise ValueError(f"--queries {made.queries}: the decoder has {made.text_positions} positions")
    return made


def build_encoder(checkpoint: Checkpoint, model: VLVConfig) -> VLVEncoder:
    """An encoder of these sizes with the checkpoint's weights; what the checkpoint lacks (more queries) is random."""
    encoder, old = VLVEncoder(model), checkpoint.load_encoder().state_dict()
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name in old and old[name].shape[1:] == tensor.shape[1:]:
                rows = min(len(tensor), len(old[name]))
                tensor[:rows] = old[name][:rows]
    return encoder


def check_t2i(model: VLVConfig, t2i) -> None:
    """Raises ValueError where the text-to-image model does not take this encoder's context."""
    text, width = t2i.text_encoder.config, t2i.unet.config.cross_attention_dim
    theirs = {"width": text.hidden_size, "heads": text.num_attention_heads, "activation": text.hidden_act}
    ours = {"width": model.context_width, "heads": model.context_heads, "activation": model.context_activation}
    if model.context_layers:
        theirs["layers"], ours["layers"] = text.num_hidden_layers, model.context_layers
    if theirs != ours or width != model.context_width:
        raise ValueError(f"the text-to-image model's text encoder has {theirs}, the start's CLIP layers {ours}")
    if model.queries > text.max_position_embeddings:
        raise ValueError(f"--queries {model.queries}: CLIP's text layers have {text.max_position_embeddings} positions")


def unfreeze_encoder(encoder: VLVEncoder, part: str) -> None:
    """Let a part of Florence-2 learn, as the authors' code does (models/build.py); all else is frozen.

    all: vision tower, image projection and language model; language-model: BART and the prompt's embeddings;
    decoder: BART's decoder.
    """
    encoder.requires_grad_(False)
    bottleneck = encoder.bottleneck
    parts = {"none": [], "decoder": [bottleneck.decoder]}
    parts["language-model"] = [bottleneck.encoder, bottleneck.decoder]
    parts["all"] = [*parts["language-model"], encoder.vision, encoder.image]
    for module in parts[part]:
        module.requires_grad_(True)
    bottleneck.prompt.requires_grad_(part in ("language-model", "all"))


def unfreeze_stage1(encoder: VLVEncoder, config: TrainConfig) -> None:
    """The part of Florence-2, the queries and the projection; CLIP's layers stay frozen."""
    unfreeze_encoder(encoder, config.encoder_part)
    encoder.bottleneck.queries.requires_grad_(True)
    encoder.bottleneck.projection.requires_grad_(True)


def unfreeze_stage2(captioner, config: TrainConfig) -> None:
    """The projection to the language model; with it the language model; with both the encoder's part.

    The paper's progressive unfreezing. Queries, projection and CLIP's layers stay as stage 1 left them.
    """
    unfreeze_encoder(captioner.encoder, config.encoder_part if config.unfreeze == "encoder" else "none")
    captioner.encoder.to_llm.requires_grad_(True)
    captioner.llm.requires_grad_(config.unfreeze in ("llm", "encoder"))
