"""The checkpoint folder: vlv.json, encoder.safetensors, llm/ (transformers), t2i/ (diffusers, optional)."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from vlv.common.command import MISUSED, UserError
from vlv.common.files import atomic_write, sha256
from vlv.model.config import FORMAT, VLVConfig
from vlv.model.encoder import VLVEncoder

_TEXT = frozenset({".json", ".txt", ".jinja"})
_LOADED = _TEXT | {".safetensors", ".bin", ".model", ".tiktoken"}


class CheckpointError(UserError, ValueError):
    """Raised for a folder that is no usable checkpoint; the message says what is wrong and what to do."""


class MissingCheckpoint(CheckpointError):
    """Raised for a name at which there is no checkpoint."""

    exit_code = MISUSED


@dataclass(frozen=True)
class Checkpoint:
    """Hold a checkpoint folder whose vlv.json has been read and checked; weights load on demand."""

    folder: Path
    config: VLVConfig

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check a folder's vlv.json. Raises CheckpointError."""
        folder = Path(folder)
        description = folder / "vlv.json"
        if not folder.is_dir():
            raise MissingCheckpoint(f"no checkpoint at {folder}: expected a folder with vlv.json")
        if not description.is_file():
            raise CheckpointError(f"{folder} is no VLV checkpoint: it has no vlv.json")
        try:
            values = json.loads(description.read_text())
            version = values["format"]
            if version != FORMAT:
                raise CheckpointError(f"{description} has format {version!r}; this version reads {FORMAT}: upgrade vlv")
            config = VLVConfig.from_dict(values["model"])
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{description} is not readable: {error}") from error
        try:
            config.check()
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{description} describes no possible encoder: {error}") from error
        return cls(folder, config)

    @property
    def encoder_file(self) -> Path:
        """Return the path of the encoder's weights."""
        return self.folder / "encoder.safetensors"

    @property
    def llm(self) -> Path:
        """Return the language model's folder. Raises CheckpointError where there is none."""
        if not (self.folder / "llm" / "config.json").is_file():
            raise CheckpointError(f"{self.folder} has no llm/: it is a stage-1 checkpoint and writes no captions")
        return self.folder / "llm"

    @property
    def t2i(self) -> Path:
        """Return the text-to-image model's folder. Raises CheckpointError where there is none."""
        if not (self.folder / "t2i" / "model_index.json").is_file():
            raise CheckpointError(f"{self.folder} has no t2i/: it cannot reconstruct images")
        return self.folder / "t2i"

    @property
    def hash(self) -> str:
        """Return the first 12 hex digits of the SHA-256 over what is loaded of the encoder and the language model.

        Files that no loader reads (.DS_Store, README.md, the .bin files beside safetensors), the line ends of text
        files and the layout of vlv.json do not change it.
        """
        digest = hashlib.sha256(b"vlv.json" + hashlib.sha256(_description(self.config).encode()).digest())
        for file in [self.encoder_file, *_loaded_files(self.folder / "llm")]:
            if file.is_file():
                digest.update(file.name.encode() + _content_hash(file))
        return digest.hexdigest()[:12]

    @property
    def can(self) -> list[str]:
        """Return what the folder can be used for: some of caption, reconstruct, to-published."""
        able = {
            "caption": self.config.llm_width > 0 and (self.folder / "llm" / "config.json").is_file(),
            "reconstruct": (self.folder / "t2i" / "model_index.json").is_file(),
            "to-published": (self.folder / "published.safetensors").is_file(),
        }
        return [ability for ability, possible in able.items() if possible]

    def describe(self) -> dict:
        """Return the parts with their sizes, dtypes and hashes, ready for JSON. Reads every byte for the hashes."""
        parts = {"encoder": [self.encoder_file], "published": [self.folder / "published.safetensors"]}
        parts |= {part: sorted((self.folder / part).rglob("*.safetensors")) for part in ("llm", "t2i")}
        return {
            "folder": str(self.folder),
            "hash": self.hash,
            "can": self.can,
            "parts": {
                part: [_describe_file(self.folder, f) for f in files if f.is_file()] for part, files in parts.items()
            },
            "model": self.config.to_dict(),
        }

    def load_encoder(self, dtype: torch.dtype | None = None) -> VLVEncoder:
        """Load the encoder in eval mode, without gradients; `dtype` defaults to float32.

        Raises CheckpointError where the file is missing or damaged, or does not fit vlv.json.
        """
        if not self.encoder_file.is_file():
            raise CheckpointError(f"{self.folder} has no encoder.safetensors")
        try:
            tensors = safetensors.torch.load_file(self.encoder_file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.encoder_file} is damaged ({error}): copy it again") from error
        try:
            with torch.device("meta"):
                encoder = VLVEncoder(self.config)
        except (TypeError, ValueError, KeyError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(f"{self.folder / 'vlv.json'} describes no possible encoder: {error}") from error
        expected = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
        found = {k: tuple(v.shape) for k, v in tensors.items()}
        problems = [f"missing {k}" for k in expected.keys() - found.keys()]
        problems += [f"unexpected {k}" for k in found.keys() - expected.keys()]
        problems += [
            f"{k} is {list(found[k])}, expected {list(expected[k])}"
            for k in expected.keys() & found.keys()
            if found[k] != expected[k]
        ]
        problems += [f"{k} is {v.dtype}, expected floats" for k, v in tensors.items() if not v.is_floating_point()]
        if problems:
            shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointError(f"{self.encoder_file} does not fit vlv.json: {shown}")
        dtype = dtype or torch.float32
        encoder.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)
        encoder.init_buffers()
        return encoder.eval().requires_grad_(False)


def save(folder: str | Path, encoder: VLVEncoder, dtype: torch.dtype | None = None) -> Checkpoint:
    """Write encoder.safetensors, then vlv.json, each atomically; llm/ and t2i/ are saved by their libraries.

    `dtype`: convert the weights; None keeps each tensor's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.to(dtype) if dtype else v).detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    with atomic_write(folder / "encoder.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_write(folder / "vlv.json") as temporary:
        temporary.write_text(_description(encoder.config), encoding="utf-8", newline="\n")
    return Checkpoint(folder, encoder.config)


def _description(config: VLVConfig) -> str:
    """Return the content of vlv.json."""
    return json.dumps({"format": FORMAT, "model": config.to_dict()}, indent=2) + "\n"


def _loaded_files(llm: Path) -> list[Path]:
    """Return the files of a language model's folder that transformers and vLLM read, sorted by name."""
    files = [f for f in sorted(llm.glob("*")) if f.suffix in _LOADED and not f.name.startswith(".")]
    has_safetensors = any(f.suffix == ".safetensors" for f in files)
    return [f for f in files if not (has_safetensors and f.suffix == ".bin")]


def _content_hash(file: Path) -> bytes:
    """Return the SHA-256 of a file, of a text file with line feeds as its line ends."""
    if file.suffix in _TEXT and b"\r\n" in (content := file.read_bytes()):
        return hashlib.sha256(content.replace(b"\r\n", b"\n")).digest()
    return bytes.fromhex(sha256(file))


def read_json(file: Path) -> dict:
    """Return a JSON file's content, {} where there is no such file. Raises CheckpointError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: copy it again")
    return content


def safetensors_header(file: Path) -> dict[str, dict]:
    """Return name -> {"dtype", "shape", "data_offsets"} of a safetensors file. Raises CheckpointError where damaged.

    Reads the header only, and checks that the file is as long as the header says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the file is shorter than its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if any(not {"dtype", "shape"} <= tensor.keys() for tensor in header.values()):
            raise ValueError("a tensor has no dtype or shape")
        if file.stat().st_size != 8 + length + end:
            raise ValueError("the file is not as long as its header says")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}): copy it again") from error
    return header


def _describe_file(folder: Path, file: Path) -> dict:
    """Return a safetensors file's size, parameters by dtype, and SHA-256. Raises CheckpointError."""
    counts: dict[str, int] = {}
    for tensor in safetensors_header(file).values():
        counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    name = str(file.relative_to(folder))
    return {"file": name, "bytes": file.stat().st_size, "parameters": counts, "sha256": sha256(file)}
