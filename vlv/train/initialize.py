"""Build what a stage trains: the start's weights, which of them are trained, and the objective over them.

`build_stage1` and `build_stage2` assemble a stage for a run, and without weights (`weights=False`, under torch's
FakeTensorMode) for the memory plan.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlv.checkpoints import folder as checkpoint
from vlv.checkpoints.folder import Checkpoint
from vlv.checkpoints.published import resolve
from vlv.checkpoints.published_write import carry_published
from vlv.checkpoints.random_weights import llm_plan
from vlv.common.command import Misuse, say
from vlv.common.files import link_tree, write_json
from vlv.data import scene_batches, scenes
from vlv.data.latents import LatentCache
from vlv.data.loader import TrainingImages, batches
from vlv.data.samples import Source
from vlv.data.selection import Limits, Selection, select
from vlv.data.sources import open_sources
from vlv.data.tokenizers import clip_tokenizer, qwen_tokenizer
from vlv.diffusion.t2i import T2I
from vlv.model.captioner import Captioner
from vlv.model.config import PRESETS, VLVConfig
from vlv.model.encoder import VLVEncoder
from vlv.train.config import Inputs, Synthetic, T2IConfig, TrainConfig, TrainError
from vlv.train.objectives import Objective, Stage1, Stage2
from vlv.train.parallel import World
from vlv.train.trainer import Trainer

SD21_UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": 768,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to train."""

    objective: Objective
    model: VLVConfig
    write: Callable[[dict[str, Tensor], Path], None]  # takes the objective's state dict and the folder to write
    t2i: T2I | None = None  # frozen, beside the objective: every process has it whole


def build_stage1(
    config: TrainConfig,
    start: Checkpoint | None,
    t2i_folder: Path | None,
    device: torch.device | None = None,
    cache: LatentCache | None = None,
    weights: bool = True,
) -> Stage:
    """Build stage 1: the encoder of `start`, or a random one, through the frozen text-to-image model of a folder."""
    torch.manual_seed(config.seed)
    toy = config.synthetic
    base = PRESETS[toy.model] if toy else start.config if start else PRESETS["qwen2.5-3b"]
    model = model_config(base, config, llm_width=base.llm_width if toy else 0)
    t2i = _text_to_image(t2i_folder, weights)
    encoder = VLVEncoder(model) if toy or not weights else build_encoder(start, model)
    if weights:
        check_t2i(model, t2i)
        encoder.bottleneck.text.copy_from(t2i.text_encoder)
    unfreeze_stage1(encoder, config)
    scale, readout = 1.0, None
    if toy:
        scale = _match_token_scale(encoder, t2i)
    if config.readout:
        vae = t2i.vae.config
        cells = model.image_size // 2 ** (len(vae.block_out_channels) - 1) // map_side(model)
        readout = nn.Linear(model.width, vae.latent_channels * cells**2)
    t2i.text_encoder = None  # its layers are the encoder's now
    if device:  # FakeTensorMode cannot move a module
        t2i.to(device)
    for p in t2i.unet.parameters():  # through .data: FakeTensorMode cannot cast a module in place
        p.data = p.data.to(torch.bfloat16 if config.bf16 else p.dtype)
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    if config.checkpoint_activations:
        t2i.unet.enable_gradient_checkpointing()
    if config.compile:
        t2i.unet.compile()

    def write(weights: dict[str, Tensor], out: Path) -> None:
        checkpoint.save(out, _encoder_of(model, weights, "encoder."), _dtype(config, torch.float32))
        if start:
            carry_published(start.folder, out)
        share(out)
        _put_t2i(t2i_folder, out)

    objective = Stage1(encoder, t2i, cache, config, readout, scale)
    return Stage(objective.to(device) if device else objective, model, write, t2i)


def build_stage2(
    config: TrainConfig,
    start: Checkpoint | None,
    llm_folder: str | Path | None,
    device: torch.device | None = None,
    weights: bool = True,
) -> Stage:
    """Build stage 2: the encoder of `start`, and a language model from a folder, or a random one."""
    torch.manual_seed(config.seed)
    if config.synthetic:
        llm, tokenizer = build_llm(config.synthetic)
    elif weights:
        llm = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    else:
        about = AutoConfig.from_pretrained(llm_folder) if llm_folder else llm_plan("qwen2.5-3b", torch.float32)[0]
        llm, tokenizer = AutoModelForCausalLM.from_config(about), LongestCaption(config.max_tokens)
    llm.config.use_cache = False
    base = start.config if start else PRESETS["qwen2.5-3b"]
    model = model_config(base, config, llm_width=llm.config.hidden_size)
    encoder = build_encoder(start, model) if weights else VLVEncoder(model)
    captioner = Captioner(encoder, llm, tokenizer)
    unfreeze_stage2(captioner, config)

    def write(weights: dict[str, Tensor], out: Path) -> None:
        dtype = _dtype(config, torch.bfloat16 if config.bf16 else torch.float32)
        checkpoint.save(out, _encoder_of(model, weights, "captioner.encoder."), dtype)
        prefix = "captioner.llm."
        of_llm = {n.removeprefix(prefix): w.to(dtype) for n, w in weights.items() if n.startswith(prefix)}
        llm.config.use_cache, llm.config.dtype = True, dtype
        llm.save_pretrained(out / "llm", state_dict=of_llm)
        tokenizer.save_pretrained(out / "llm")
        settings = json.loads((out / "llm" / "config.json").read_text())
        # transformers writes the dtype of the modules, not of the tensors that it is given
        write_json(out / "llm" / "config.json", settings | {"dtype": str(dtype).removeprefix("torch.")})
        carry_published(start.folder, out)
        share(out)
        if (start.folder / "t2i").is_dir():
            _put_t2i(start.folder / "t2i", out)

    objective = Stage2(captioner, config)
    return Stage(objective.to(device) if device else objective, model, write)


def open_start(ckpt: str | Path, world: World) -> Checkpoint:
    """Open the start; a published one is converted once, by the first process, while the others wait."""
    found = resolve(ckpt) if world.first else None
    world.barrier()
    return found or resolve(ckpt)


def open_data(inputs: Inputs, limits: Limits, world: World) -> tuple[Source, Selection | None]:
    """Open the data and choose its rows. One process of each machine indexes what is new, while the others wait."""

    def both() -> tuple[Source, Selection | None]:
        source = open_sources(inputs.data, inputs.image_key)
        return source, select(source, limits, say)

    found = both() if world.first_here else None
    if world.first and found:
        for note in [*found[0].notes, *([str(found[1])] if found[1] else [])]:
            say(note)
    world.barrier()
    return found or both()


def training_batches(
    trainer: Trainer, source: Source, selection: Selection | None, limits: Limits, size: int
) -> Iterator[dict]:
    """Return a process's micro-batches from the trainer's position on; crops of `size` pixels. See `batches`."""
    if trainer.world.first and selection:
        trainer.skipped.add([selection.bad])
    c, world = trainer.config, trainer.world
    images = TrainingImages(source, size, c.seed, limits, selection)
    return batches(images, c.micro_batch, trainer.images, c.workers, world.rank, world.size, world.device)


def build_t2i(config: T2IConfig) -> T2I:
    """Return the untrained text-to-image model of a configuration, with a tokenizer for the scenes' prompts."""
    rng = np.random.default_rng(0)
    texts = [scenes.prompt(scenes.sample(s), rng) for s in range(4000)]
    tokenizer = clip_tokenizer(texts, config.context_length)
    vae = AutoencoderKL(
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.vae_channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.image_size,
        mid_block_add_attention=False,
    )
    # the text is read at the coarser levels only: at the finest one it would take half the time
    coarser = len(config.unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=config.image_size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=1,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * coarser,
        up_block_types=("CrossAttnUpBlock2D",) * coarser + ("UpBlock2D",),
        cross_attention_dim=config.context_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.context_width,
            intermediate_size=4 * config.context_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.context_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Without noise that hides everything at the last step, a map this small shows its background there, and the
    # model never learns to take it from the text (Lin et al. 2023, arXiv 2305.08891)
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return T2I(vae, unet, text_encoder, tokenizer, scheduler)


def build_llm(toy: Synthetic):
    """Return a small untrained Qwen2 and a tokenizer for the scenes' captions: (model, tokenizer)."""
    rng = np.random.default_rng(0)
    tokenizer = qwen_tokenizer(scenes.caption(scenes.sample(s), rng) for s in range(4000))
    width = 64 * toy.llm_heads
    end = tokenizer.eos_token_id
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=toy.llm_layers,
            num_attention_heads=toy.llm_heads,
            num_key_value_heads=toy.llm_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    return llm, tokenizer


def model_config(base: VLVConfig, config: TrainConfig, llm_width: int) -> VLVConfig:
    """Return the start's sizes with what the flags change. Raises TrainError where its positions do not reach."""
    made = replace(
        base,
        queries=config.queries or base.queries,
        context_layers=base.context_layers if config.clip_layers else 0,
        image_size=config.image_size or base.image_size,
        llm_width=llm_width,
    )
    if (side := map_side(made)) > made.image_positions:
        raise TrainError(
            f"--image-size {made.image_size} gives a map of {side} x {side}, but the start has "
            f"{made.image_positions} positions a side: choose a smaller size"
        )
    if made.queries > made.text_positions:
        raise TrainError(f"--queries {made.queries}: the decoder has {made.text_positions} positions")
    return made


def map_side(model: VLVConfig) -> int:
    """Return the side of the image features' map."""
    side = model.image_size * model.upsample
    for stride in model.vision.strides:
        side = -(-side // stride)
    return side


def build_encoder(start: Checkpoint, model: VLVConfig) -> VLVEncoder:
    """Return an encoder of these sizes with the start's weights; what it lacks (more queries) is random."""
    encoder, old = VLVEncoder(model), start.load_encoder().state_dict()
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name in old and old[name].shape[1:] == tensor.shape[1:]:
                rows = min(len(tensor), len(old[name]))
                tensor[:rows] = old[name][:rows]
    return encoder


def check_t2i(model: VLVConfig, t2i: T2I) -> None:
    """Raise TrainError where the text-to-image model does not take this encoder's context."""
    text, width = t2i.text_encoder.config, t2i.unet.config.cross_attention_dim
    theirs = {"width": text.hidden_size, "heads": text.num_attention_heads, "activation": text.hidden_act}
    ours = {"width": model.context_width, "heads": model.context_heads, "activation": model.context_activation}
    if model.context_layers:
        theirs["layers"], ours["layers"] = text.num_hidden_layers, model.context_layers
    if theirs != ours or width != model.context_width:
        raise TrainError(f"the text-to-image model's text encoder has {theirs}, the start's CLIP layers {ours}")
    if model.queries > text.max_position_embeddings:
        raise TrainError(f"--queries {model.queries}: CLIP's text layers have {text.max_position_embeddings} positions")


def unfreeze_encoder(encoder: VLVEncoder, part: str) -> None:
    """Let a part of Florence-2 be trained, as the authors' code does (models/build.py); all else is frozen.

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
    """Let the part of Florence-2, the queries and the projection be trained; CLIP's layers stay frozen."""
    unfreeze_encoder(encoder, config.encoder_part)
    encoder.bottleneck.queries.requires_grad_(True)
    encoder.bottleneck.projection.requires_grad_(True)


def unfreeze_stage2(captioner: Captioner, config: TrainConfig) -> None:
    """Let the projection to the language model be trained; with it the LLM; with both the encoder's part.

    The paper's progressive unfreezing. Queries, projection and CLIP's layers stay as stage 1 left them.
    """
    unfreeze_encoder(captioner.encoder, config.encoder_part if config.unfreeze == "encoder" else "none")
    captioner.encoder.to_llm.requires_grad_(True)
    captioner.llm.requires_grad_(config.unfreeze in ("llm", "encoder"))


class LongestCaption:
    """In place of a tokenizer, for the memory plan: every caption has as many tokens as a caption may have."""

    eos_token_id = 0

    def __init__(self, length: int):
        self.input_ids = [0] * length

    def __call__(self, text: str, add_special_tokens: bool = False) -> LongestCaption:
        return self


def _text_to_image(folder: Path | None, weights: bool) -> T2I:
    """Return the frozen model of a diffusers folder; without weights by its sizes, Stable Diffusion 2.1's if None."""
    if folder and not (folder / "unet").is_dir():
        raise Misuse(
            f"{folder} is no diffusers text-to-image folder: it has no unet/; give another as --t2i, "
            "or for the toy presets run vlv.train.t2i first"
        )
    if weights:
        return T2I.load(folder)
    unet = UNet2DConditionModel.load_config(folder / "unet") if folder else SD21_UNET
    vae = AutoencoderKL.load_config(folder / "vae") if folder else SD21_VAE
    t2i = T2I(AutoencoderKL.from_config(vae), UNet2DConditionModel.from_config(unet), None, None, DDPMScheduler())
    return t2i.eval().requires_grad_(False)


@torch.no_grad()
def _match_token_scale(encoder: VLVEncoder, t2i: T2I) -> float:
    """Scale a random projection's last layer, so that CLIP's text layers see the scale of token embeddings.

    At another scale their attention hardly counts. Returns the factor, which its learning rate needs too: Adam's steps
    do not shrink with the weights, and at the full rate the layer leaves that scale within a few steps, the text layers
    lose sight of their positions, and all queries become one.
    """
    bottleneck, last = encoder.bottleneck, encoder.bottleneck.projection[2]
    words = t2i.text_encoder.get_input_embeddings().weight.std()
    features = encoder.features(scene_batches.images(range(8)))
    scale = (words / bottleneck.projection(bottleneck.decode(features)).std()).item()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
    return scale


def share(folder: Path) -> None:
    """Give files that were written for their owner alone (safetensors does) the modes that the umask leaves."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()):
        if file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~umask)


def _dtype(config: TrainConfig, automatic: torch.dtype) -> torch.dtype:
    return automatic if config.dtype == "auto" else getattr(torch, config.dtype)


def _put_t2i(folder: Path, out: Path) -> None:
    """Link the text-to-image model into the checkpoint folder, in place of another that may lie there."""
    target = out / "t2i"
    if target.resolve() != folder.resolve():
        shutil.rmtree(target, ignore_errors=True)
        link_tree(folder, target)


def _encoder_of(model: VLVConfig, weights: dict[str, Tensor], prefix: str) -> VLVEncoder:
    """Return a plain encoder with the weights of an objective's state dict."""
    with torch.device("meta"):
        encoder = VLVEncoder(model)
    encoder.load_state_dict(
        {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}, assign=True
    )
    return encoder
