"""Write a Qwen2 language model as GGUF, llama.cpp's file format, tensor by tensor: neither torch nor transformers.

    report = write_gguf(Path("ckpt/llm"), Path("llm-q4_k_m.gguf"), "q4_k_m")

Quantized types are computed by llama.cpp's own code (export.runtimes.llama_library), with the mixture of types that its
`llama-quantize` uses under the same name: `q4_k_m` keeps the values and half of the down projections in Q6_K. A type
with blocks of 256 does not fit a tensor whose width 256 does not divide; that tensor gets the next larger type with
blocks of 32, as llama-quantize does, and the report names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from export.runtimes.llama_library import BUILDER, quantize
from vlv.common.command import UserError, say
from vlv.common.files import atomic_write, require_space, sha256

# kind: the file's type, and that of its matrices
KINDS = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
}
NARROWER = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}  # instead of one with blocks of 256, one with blocks of 32
FORMAT = 1  # changes when another content is written from the same folder
SOURCE, ENDS = "vlv.source", "vlv.end_token_ids"  # keys of the file's metadata
CHUNK = 1 << 22  # numbers that one thread quantizes at a time

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class GGUFError(UserError, ValueError):
    """Raised for a language model that cannot be written as GGUF; the message says why."""


def write_gguf(llm: Path, file: Path, kind: str) -> dict:
    """Write the language model of a transformers folder into a GGUF file, atomically.

    kind: one of KINDS. Returns {"kind", "source", "builder", "sha256", "bytes", "tensors", "fallbacks"}: `tensors`
    counts them by type, `fallbacks` tells by tensor what its width forbade and what it became. Raises GGUFError for a
    model that llama.cpp would run otherwise than transformers, LlamaError where its quantizer is missing.
    """
    if kind not in KINDS:
        raise GGUFError(f"expected a GGUF type of {', '.join(KINDS)}, got {kind!r}")
    config = _Config.read(llm)
    tensors = _tensors(llm, config)
    types, fallbacks = _types(tensors, config, kind)
    need = sum(_bytes(tensor.shape, types[name]) for name, tensor in tensors.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    require_space(file.parent, need)
    source = source_hash(llm)
    with atomic_write(file, shared=True) as temporary:
        writer = gguf.GGUFWriter(temporary, "qwen2")
        _describe(writer, llm, config, KINDS[kind][0], source)
        for name, tensor in tensors.items():
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), _bytes(tensor.shape, types[name]), raw_dtype=types[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for name, tensor in tensors.items():
                writer.write_tensor_data(_converted(name, tensor, types[name], pool))
        writer.close()
    counts: dict[str, int] = {}
    for one in types.values():
        counts[one.name] = counts.get(one.name, 0) + 1
    quantized = any(one not in (Type.F32, Type.F16) for one in types.values())
    return {
        "kind": kind,
        "source": source,
        "builder": f"gguf {version('gguf')}" + (f", {BUILDER}" if quantized else ""),
        "sha256": sha256(file),
        "bytes": file.stat().st_size,
        "tensors": counts,
        "fallbacks": fallbacks,
    }


def cached_gguf(llm: Path, kind: str) -> Path:
    """Return the language model of a folder as GGUF, written on first use. Raises GGUFError, LlamaError.

    The cache is $XDG_CACHE_HOME/vlv/gguf (default ~/.cache); its key is the content of the folder, and the type.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlv" / "gguf"
    file = cache / f"{source_hash(llm)[:16]}-{kind}.gguf"
    if not file.is_file():
        say(f"writing the language model once as GGUF, {kind}, to {file}")
        write_gguf(llm, file, kind)
    return file


def source_hash(llm: Path) -> str:
    """Return the SHA-256 over what decides the content of a GGUF: the folder's files, FORMAT. Raises GGUFError."""
    files = [*(llm / name for name in _DESCRIPTIONS if (llm / name).is_file()), *_weight_files(llm)]
    parts = {"format": str(FORMAT)} | {file.name: sha256(file) for file in files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Config:
    """What config.json says of a Qwen2 model."""

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    positions: int
    vocabulary: int
    epsilon: float
    rope_theta: float
    tied: bool

    @classmethod
    def read(cls, llm: Path) -> _Config:
        """Read and check config.json. Raises GGUFError for what llama.cpp would compute otherwise."""
        file = llm / "config.json"
        values = _json(file)
        if (llm / "adapter_config.json").is_file():
            raise GGUFError(f"{llm} is a LoRA adapter: merge it (merge_and_unload()) and save the whole model")
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or {}
        unusual = {
            "model_type": (values.get("model_type"), "qwen2"),
            "quantization_config": (values.get("quantization_config"), None),
            "hidden_act": (values.get("hidden_act", "silu"), "silu"),
            "use_sliding_window": (bool(values.get("use_sliding_window")), False),
            "layer_types": (
                next((kind for kind in values.get("layer_types") or () if kind != "full_attention"), "full_attention"),
                "full_attention",
            ),
            "rope_type": (
                rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type", "default"),
                "default",
            ),
        }
        for key, (found, expected) in unusual.items():
            if found != expected:
                raise GGUFError(f"{file}: {key} is {found!r}; only models with {expected!r} can be written as GGUF")
        try:
            heads = int(values["num_attention_heads"])
            found = cls(
                width=int(values["hidden_size"]),
                ffn=int(values["intermediate_size"]),
                layers=int(values["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(values.get("num_key_value_heads") or heads),
                head=int(values.get("head_dim") or values["hidden_size"] // heads),
                positions=int(values["max_position_embeddings"]),
                vocabulary=int(values["vocab_size"]),
                epsilon=float(values["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
                tied=bool(values.get("tie_word_embeddings")),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise GGUFError(f"{file} does not describe a Qwen2 model: {error!r}") from error
        for field in fields(found):  # llama.cpp ends the process where one is 0
            if field.name != "tied" and getattr(found, field.name) <= 0:
                raise GGUFError(f"{file}: {field.name} is {getattr(found, field.name)}, expected a number above 0")
        if found.heads * found.head != found.width:
            raise GGUFError(
                f"{file}: {heads} heads of {found.head} numbers and a hidden size of {found.width}; llama.cpp runs "
                "only Qwen2 models whose heads make up the hidden size"
            )
        return found

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return, by the name in the transformers folder, the name in GGUF and the shape of every tensor."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        matrices = {
            "self_attn.q_proj": ("attn_q", (q, self.width)),
            "self_attn.k_proj": ("attn_k", (kv, self.width)),
            "self_attn.v_proj": ("attn_v", (kv, self.width)),
            "self_attn.o_proj": ("attn_output", (self.width, q)),
            "mlp.gate_proj": ("ffn_gate", (self.ffn, self.width)),
            "mlp.up_proj": ("ffn_up", (self.ffn, self.width)),
            "mlp.down_proj": ("ffn_down", (self.width, self.ffn)),
        }
        found = {"model.embed_tokens.weight": ("token_embd.weight", (self.vocabulary, self.width))}
        for i in range(self.layers):
            ours, theirs = f"model.layers.{i}", f"blk.{i}"
            for norm, name in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
                found[f"{ours}.{norm}.weight"] = (f"{theirs}.{name}.weight", (self.width,))
            for matrix, (name, shape) in matrices.items():
                found[f"{ours}.{matrix}.weight"] = (f"{theirs}.{name}.weight", shape)
                if name in ("attn_q", "attn_k", "attn_v"):
                    found[f"{ours}.{matrix}.bias"] = (f"{theirs}.{name}.bias", shape[:1])
        found["model.norm.weight"] = ("output_norm.weight", (self.width,))
        if not self.tied:
            found["lm_head.weight"] = ("output.weight", (self.vocabulary, self.width))
        return found


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file, read when its rows are asked for."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def rows(self, step: int) -> Iterator[np.ndarray]:
        """Yield the values as float32, `step` rows at a time. Raises GGUFError where one is not finite."""
        stored = np.memmap(self.file, _DTYPES[self.dtype], "r", self.offset, self.shape)
        for start in range(0, self.shape[0], step):
            part = stored[start : start + step]
            if self.dtype == "BF16":  # the upper half of a float32
                part = (part.astype(np.uint32) << 16).view(np.float32)
            part = part.astype(np.float32)
            if not np.isfinite(part).all():
                raise GGUFError(f"{self.file} has weights that are not finite")
            yield part


def _tensors(llm: Path, config: _Config) -> dict[str, _Tensor]:
    """Return the tensors by their GGUF names. Raises GGUFError unless they are those that config.json describes."""
    found: dict[str, _Tensor] = {}
    for file in _weight_files(llm):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                place = 8 + length + tensor["data_offsets"][0]
                found[name] = _Tensor(file, place, tensor["dtype"], tuple(tensor["shape"]))
    expected = config.shapes
    more = {name for name in found.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        more.discard("lm_head.weight")  # the same values as the embeddings, whatever is stored
    if lora := sorted(name for name in more if "lora_" in name):
        raise GGUFError(f"{llm} has LoRA tensors ({lora[0]}): merge them (merge_and_unload()) and save the model again")
    if wrapped := sorted(name for name in more if name.endswith(tuple(f".{name}" for name in expected))):
        raise GGUFError(f"{llm} has a tensor {wrapped[0]!r}, so it was saved from a wrapper: save the model inside it")
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in more]
    for name in expected.keys() & found.keys():
        if found[name].shape != expected[name][1]:
            problems.append(f"{name} is {list(found[name].shape)}, expected {list(expected[name][1])}")
        if found[name].dtype not in _DTYPES:
            problems.append(f"{name} is {found[name].dtype}, expected {', '.join(_DTYPES)}")
    if problems:
        raise GGUFError(f"{llm} does not fit its config.json: {'; '.join(sorted(problems)[:5])}")
    return {theirs: found[ours] for ours, (theirs, _) in expected.items()}


def _types(tensors: dict[str, _Tensor], config: _Config, kind: str) -> tuple[dict[str, Type], dict[str, str]]:
    """Return each tensor's type, and what became of those whose width the chosen type does not divide."""
    main = KINDS[kind][1]
    types, fallbacks = {}, {}
    for name, tensor in tensors.items():
        chosen = main
        if len(tensor.shape) == 1:
            chosen = Type.F32
        elif main in (Type.Q4_0, Type.Q4_K) and name == ("token_embd.weight" if config.tied else "output.weight"):
            chosen = Type.Q6_K
        elif kind == "q4_k_m" and name.endswith(("attn_v.weight", "ffn_down.weight")):
            chosen = Type.Q6_K if _more_bits(int(name.split(".")[1]), config.layers) else main
        kept, width = chosen, tensor.shape[-1]
        if width % _block(kept):
            kept = NARROWER.get(kept, Type.F16)
        if width % _block(kept):
            kept = Type.F16
        if kept != chosen:
            fallbacks[name] = (
                f"{kept.name} instead of {chosen.name}, whose blocks of {_block(chosen)} do not fit a width of {width}"
            )
        types[name] = kept
    return types, fallbacks


def _more_bits(layer: int, layers: int) -> bool:
    """Return True for the first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _block(kind: Type) -> int:
    return gguf.GGML_QUANT_SIZES[kind][0]


def _bytes(shape: tuple[int, ...], kind: Type) -> int:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // values * size


def _converted(name: str, tensor: _Tensor, kind: Type, pool: ThreadPoolExecutor) -> np.ndarray:
    """Return a tensor's content in its type. Raises GGUFError, LlamaError."""
    parts = tensor.rows(max(1, CHUNK // tensor.shape[-1]))
    if kind in (Type.F32, Type.F16):
        with np.errstate(over="ignore"):
            values = np.concatenate([part.astype(np.float32 if kind == Type.F32 else np.float16) for part in parts])
        if not np.isfinite(values).all():
            raise GGUFError(f"{name} has weights above 65,504, where float16 ends: write f32")
        return values
    return np.concatenate(list(pool.map(lambda part: quantize(part, int(kind)), parts)))


def _describe(writer: gguf.GGUFWriter, llm: Path, config: _Config, file_type: LlamaFileType, source: str) -> None:
    """Add the metadata: sizes, tokenizer, and where the weights come from."""
    writer.add_name("VLV language model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(SOURCE, source)
    writer.add_context_length(config.positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head)
    writer.add_value_length(config.head)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    tokenizer = _json(llm / "tokenizer.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or not model.get("merges"):
        raise GGUFError(
            f"{llm / 'tokenizer.json'} is no byte-pair tokenizer with merges: llama.cpp does not load others"
        )
    ids = model["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if max(ids.values()) >= config.vocabulary:
        raise GGUFError(f"{llm / 'tokenizer.json'} has token {max(ids.values())}, the model {config.vocabulary} tokens")
    tokens = [f"[PAD{i}]" for i in range(config.vocabulary)]
    types = [gguf.TokenType.UNUSED] * config.vocabulary
    for token, i in ids.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level byte pairs
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    ends = end_token_ids(llm, ids)
    writer.add_array(ENDS, ends)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_add_bos_token(False)


def end_token_ids(llm: Path, ids: dict[str, int]) -> list[int]:
    """Return the tokens that end a text, as vlv.checkpoints.llm_folder.end_token_ids does; `ids` by token.

    Raises GGUFError where there is none.
    """
    token = _json(llm / "tokenizer_config.json", {}).get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    files = (_json(llm / name, {}).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    of_model = next((found for found in files if found is not None), [])
    found = [ids[token]] * (token in ids) + (of_model if isinstance(of_model, list) else [of_model])
    if not found:
        raise GGUFError(
            f"{llm} names no end token, so captions would never end: set eos_token in tokenizer_config.json"
        )
    return list(dict.fromkeys(found))


def _weight_files(llm: Path) -> list[Path]:
    """Return the safetensors files that an index names, or all. Raises GGUFError where there is none."""
    index = llm / "model.safetensors.index.json"
    names = {"model.safetensors"} if (llm / "model.safetensors").is_file() else set()
    names = names or set(_json(index, {}).get("weight_map", {}).values())
    files = [llm / Path(name).name for name in sorted(names)] or sorted(llm.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise GGUFError(f"{missing[0] if missing else llm / 'model.safetensors'} is missing: GGUF is written from it")
    return files


def _json(file: Path, default: dict | None = None) -> dict:
    if default is not None and not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GGUFError(f"{file} is not readable: {error}") from error
