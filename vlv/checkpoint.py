"""The checkpoint folder: vlv.json, encoder.safetensors, llm/ (transformers), t2i/ (diffusers, optional)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vlv.config import FORMAT, VLVConfig


class CheckpointError(ValueError):
    """A folder that is no usable checkpoint; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose description has been read and checked; weights load on demand."""

    folder: Path
    config: VLVConfig

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check a folder's vlv.json. Raises CheckpointError."""
        folder = Path(folder)
        description = folder / "vlv.json"
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint at {folder}: expected a folder with vlv.json")
        if not description.is_file():
            raise CheckpointError(f"{folder} is no VLV checkpoint: it has no vlv.json")
        try:
            values = json.loads(description.read_text())
            version = values["format"]
            if version != FORMAT:
                raise CheckpointError(f"{description} has format {version}; this version reads {FORMAT}: upgrade vlv")
            return cls(folder, VLVConfig.from_dict(values["model"]))
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{description} is not readable: {error}") from error

    @property
    def encoder_file(self) -> Path:
        return self.folder / "encoder.safetensors"

    @property
    def llm(self) -> Path:
        """The language model's folder. Raises CheckpointError where there is none."""
        if not (self.folder / "llm" / "config.json").is_file():
            raise CheckpointError(f"{self.folder} has no llm/: it is a stage-1 checkpoint and writes no captions")
        return self.folder / "llm"

    @property
    def t2i(self) -> Path:
        """The text-to-image model's folder. Raises CheckpointError where there is none."""
        if not (self.folder / "t2i" / "model_index.json").is_file():
            raise CheckpointError(f"{self.folder} has no t2i/: it cannot reconstruct pictures")
        return self.folder / "t2i"

    @property
    def hash(self) -> str:
        """The first 12 hex digits of the SHA-256 over the encoder's and the LLM's files."""
        digest = hashlib.sha256()
        files = [self.folder / "vlv.json", self.encoder_file, *sorted((self.folder / "llm").glob("*"))]
        for file in files:
            if file.is_file():
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:12]

    def load_encoder(self, dtype=None):
        """The VLVEncoder in eval mode; `dtype` defaults to float32. Raises CheckpointError on a misfit."""
        import torch
        from safetensors.torch import load_file

        from vlv.encoder import VLVEncoder

        if not self.encoder_file.is_file():
            raise CheckpointError(f"{self.folder} has no encoder.safetensors")
        try:
            tensors = load_file(self.encoder_file)
        except Exception as error:  # safetensors raises its own type for a truncated or foreign file
            raise CheckpointError(f"{self.encoder_file} is damaged ({error}): copy it again") from error
        with torch.device("meta"):
            encoder = VLVEncoder(self.config)
        expected = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
        found = {k: tuple(v.shape) for k, v in tensors.items()}
        problems = [f"missing {k}" for k in expected.keys() - found.keys()]
        problems += [f"unexpected {k}" for k in found.keys() - expected.keys()]
        problems += [
            f"{k} is {list(found[k])}, expected {list(expected[k])}"
            for k in expected.keys() & found.keys()
            if found[k] != expected[k]
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointError(f"{self.encoder_file} does not fit vlv.json: {shown}")
        dtype = dtype or torch.float32
        encoder.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, assign=True)
        encoder.init_buffers()
        return encoder.eval().requires_grad_(False)


def save(folder: str | Path, encoder, dtype=None) -> Checkpoint:
    """Write vlv.json and encoder.safetensors (each atomically); llm/ and t2i/ are saved by their libraries."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.to(dtype) if dtype else v).detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    temporary = folder / "encoder.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "encoder.safetensors")
    description = {"format": FORMAT, "model": encoder.config.to_dict()}
    temporary = folder / "vlv.json.tmp"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(temporary, folder / "vlv.json")
    return Checkpoint(folder, encoder.config)
