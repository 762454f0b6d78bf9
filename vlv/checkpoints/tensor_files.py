"""Read and write weight files tensor by tensor, so that a model need not fit in memory.

Formats read: safetensors and torch's zip format, single or sharded with an index. Nothing executable is unpickled.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlv.checkpoints.folder import CheckpointError
from vlv.common.command import say

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "model.pt", "pytorch_model.bin")
_WRAPPERS = ("model_state_dict", "state_dict", "module", "model")  # training checkpoints keep the weights under one
_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DistributedDataParallel and torch.compile
_MAPPED = 1 << 30  # bytes read before mappings are dropped: mapped pages count as resident memory
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def weight_files(source: Path) -> list[Path]:
    """Return the weight files: `source`, or what a folder's index or a usual name shows. Raises CheckpointError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CheckpointError(f"no weights at {source}: expected a weight file or a folder with one")
    for name in _INDEXES:
        if (source / name).is_file():
            return shards(source / name)
    for name in _SINGLES:
        if (source / name).exists():
            return weight_files(source / name)  # newer DeepSpeed makes a folder named pytorch_model.bin
    steps = {int(m[1]): f for f in source.iterdir() if (m := re.fullmatch(r"checkpoint_(\d+)\.pt", f.name))}
    if steps:
        return [steps[max(steps)]]
    found = sorted(f for f in source.iterdir() if f.suffix in (".safetensors", ".pt", ".pth", ".bin"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{source} holds several weight files ({', '.join(f.name for f in found)}): name one")
    if (source / "zero_to_fp32.py").is_file():
        raise CheckpointError(f"{source} is an unconsolidated DeepSpeed checkpoint: run its zero_to_fp32.py first")
    raise CheckpointError(f"{source} holds no weights: expected one of {', '.join((*_INDEXES, *_SINGLES))}")


def shards(index: Path) -> list[Path]:
    """Return the files that an index of shards names. Raises CheckpointError where one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}): copy it again") from error
    if outside := [n for n in names if Path(n).name != n]:
        raise CheckpointError(f"{index} points outside its folder, to {outside[0]}: refused")
    if absent := [n for n in names if not (index.parent / n).is_file()]:
        raise CheckpointError(f"{index.parent} lacks {len(absent)} of {len(names)} shards: {', '.join(absent)}")
    return [index.parent / n for n in names]


class Tensors(Mapping[str, Tensor]):
    """Map weight files to tensors by name, read on demand; keep no result for long, it holds the file's mapping.

    metas: name -> meta tensor (shape and dtype). aliases: name -> an earlier name with the same storage.
    """

    def __init__(self, files: Sequence[Path]):
        self.metas: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._read = 0
        for file in files:
            first: dict[tuple, str] = {}
            for name, tensor in _open(file).items():
                self.metas[name], self._file[name] = tensor.to("meta"), file
                if tensor.numel():
                    original = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
                    if original != name:
                        self.aliases[name] = original

    def __getitem__(self, name: str) -> Tensor:
        self._read += self.metas[name].nbytes
        if self._read > _MAPPED:
            self._mapped, self._read = {}, 0
        file = self._file[name]
        if file not in self._mapped:
            self._mapped[file] = _open(file)
        return self._mapped[file][name]

    def __iter__(self):
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)


def _open(file: Path) -> dict[str, Tensor]:
    tensors = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
    return {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}): copy it again") from error


def _open_torch(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"{file} is not in torch's zip format (torch >= 1.6): load it where it was made and save it again"
        )
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|class)[: ]+([\w.]+\.\w+)", str(error))
        what = f"a reference to {named[1]}" if named else "more than tensors"
        raise CheckpointError(
            f"{file} is refused: its pickle holds {what}, and loading that could run code; "
            "save its state dict as safetensors instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: copy it again") from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no state dict: expected tensors by name, or a dict with {_WRAPPERS[0]!r}")
    return content


def metadata(file: Path) -> dict[str, str]:
    """Return the free-form metadata in a safetensors file's header."""
    with safe_open(file, "pt") as reader:
        return reader.metadata() or {}


Produce = Callable[[str], Tensor]


def write_safetensors(
    file: Path, plan: Mapping[str, Tensor], produce: Produce, notes: Mapping[str, str] | None = None
) -> None:
    """Write the tensors of `plan` (name -> meta tensor), each computed by `produce(name)` just before it is written.

    The format is 8 bytes of header length, a JSON header, and the raw data; wide types first keeps it aligned.
    """
    order = sorted(plan, key=lambda name: -plan[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(notes or {})}}
    end = 0
    for name in order:
        begin, end = end, end + plan[name].nbytes
        header[name] = {
            "dtype": _DTYPES[plan[name].dtype], "shape": list(plan[name].shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(_checked(name, produce(name), plan).contiguous().reshape(-1).view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())


def write_state_dict(
    file: Path, names: Sequence[str], plan: Mapping[str, Tensor], produce: Produce, aliases: Mapping[str, str]
) -> None:
    """Write a torch file, its dict ordered as `names`; an alias (name -> name in `plan`) shares storage.

    torch writes the file with empty tensors, which are then filled through shared mappings, so the zip's
    checksums are stale: torch.load does not check them, unzip would report them.
    """
    with torch.serialization.skip_data():
        empty = {name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in plan.items()}
        torch.save({name: empty[aliases.get(name, name)] for name in names}, file)
    with file.open("r+b") as stream:  # without space, filling a hole later would crash instead of raising OSError
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    filled, written = None, 0
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        for name in plan:
            if filled is None or written > _MAPPED:
                filled, written = torch.load(file, mmap=True, weights_only=True), 0
            filled[name].copy_(_checked(name, produce(name), plan))
            written += plan[name].nbytes
    del filled
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _checked(name: str, tensor: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
    if (tensor.dtype, tensor.shape) != (plan[name].dtype, plan[name].shape):
        raise RuntimeError(
            f"{name} was planned as {plan[name].dtype} {list(plan[name].shape)} "
            f"and became {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


class Progress:
    """Show bytes done, rate and time left on stderr every two seconds."""

    def __init__(self, verb: str, total: int):
        self.verb, self.total, self.done = verb, total, 0
        self.start = self.shown = time.monotonic()

    def watch(self, produce: Produce) -> Produce:
        """Return `produce` with its results counted."""

        def counted(name: str) -> Tensor:
            tensor = produce(name)
            self.done += tensor.nbytes
            now = time.monotonic()
            if now - self.shown > 2:
                self.shown, rate = now, self.done / (now - self.start)
                say(
                    f"{self.verb} {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, "
                    f"{(self.total - self.done) / rate:.0f} s left"
                )
            return tensor

        return counted
