"""Read, check and write the artifact folder: manifest.json and the files that it describes.

    {"format": 2, "sampling": {...}, "artifacts": {"encoder": {...}, "encoder@rtx-sm89": {...}}}

Every artifact is checked against its entry (format, source weights, sizes, SHA-256 of every file) before it is
deserialized. An artifact that does not match is refused with the command that rebuilds it. Writes are atomic, and an
entry appears only after its files are in place: an interrupted export leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import kernels
from export.components import COMPONENTS, DTYPES, GGUF_TYPES, PRECISIONS, Batch, Port
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common.command import UserError, one_line
from vlv.common.files import sha256, write_json

FORMAT = 2
NAME = "manifest.json"


class ArtifactError(UserError, ValueError):
    """Raised for an artifact that is missing, damaged or stale; the message gives the remedy."""


@dataclass(frozen=True)
class Artifact:
    """One exported graph or built engine, and everything that decides whether it may be used."""

    component: str
    runtime: str  # onnx, rtx or trt
    target: str  # "" for ONNX, else the compute capability that the engine is for, as "sm89"
    precision: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profile: Batch
    source: str  # hash of the weights
    graph: str  # SHA-256 over the ONNX graph and its external data
    kernels: str  # hash of the ops' source code that was traced
    builder: str  # names and versions of the software that made it
    files: dict[str, dict]  # name -> {"sha256", "bytes"}; a runtime opens the first one
    command: str  # the command that rebuilds it
    blocks: dict[str, str] = field(default_factory=dict)  # module path -> the value of the graph that is its output
    fp32_blocks: tuple[str, ...] = ()  # blocks that compute in float32 although the precision is lower
    excluded_blocks: tuple[str, ...] = ()  # blocks that were not quantized
    verification: dict = field(default_factory=dict)
    refittable: bool = False  # an engine whose weights can be replaced
    calibration: str = ""  # SHA-256 of the images that ranges of activations were measured on

    @property
    def name(self) -> str:
        return name_of(self.component, self.runtime, self.target)

    @property
    def main_file(self) -> str:
        return next(iter(self.files))

    @classmethod
    def from_dict(cls, values: dict) -> Artifact:
        """Rebuild from JSON. Raises TypeError, KeyError or ValueError on what no export writes."""
        ports = {k: tuple(Port(**{**p, "shape": tuple(p["shape"])}) for p in values[k]) for k in ("inputs", "outputs")}
        blocks = {k: tuple(values[k]) for k in ("fp32_blocks", "excluded_blocks")}
        found = cls(**{**values, **ports, **blocks, "profile": Batch(**values["profile"])})
        kinds = {"component": COMPONENTS, "precision": PRECISIONS, "runtime": ("onnx", "trt", "rtx")}
        if found.runtime == "gguf":
            kinds = {"component": ("llm",), "precision": GGUF_TYPES}
        for key, valid in kinds.items():
            if (value := getattr(found, key)) not in valid:
                raise ValueError(f"{key} is {value!r}, expected one of {', '.join(valid)}")
        if found.runtime != "gguf" and not (any(p.batched for p in found.inputs) and found.outputs):
            raise ValueError(f"{found.name} has no inputs or no outputs")
        for port in (*found.inputs, *found.outputs):
            if port.dtype not in DTYPES or not all(type(size) is int for size in port.shape):
                raise ValueError(f"{port.name} is {port.dtype} {port.shape}, expected sizes of {', '.join(DTYPES)}")
        if not found.files or any(entry.keys() != {"sha256", "bytes"} for entry in found.files.values()):
            raise ValueError(f"{found.name} has no files, or one without a hash")
        return found


def name_of(component: str, runtime: str, target: str = "") -> str:
    """Return the manifest's name of an artifact: `encoder`, or `encoder@rtx-sm89`."""
    return component if runtime == "onnx" else f"{component}@{runtime}-{target}"


@dataclass
class Manifest:
    """The artifacts of a folder. `sampling` holds what a reconstruction needs beside the graphs."""

    folder: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest. Raises ArtifactError."""
        folder = Path(folder)
        file = folder / NAME
        if not file.is_file():
            raise ArtifactError(
                f"no artifacts in {folder}: it has no {NAME}; make them: "
                f"python -m export.onnx --ckpt DIR --out {folder}"
            )
        try:
            values = json.loads(file.read_text())
            if values["format"] != FORMAT:
                raise ArtifactError(
                    f"{file} has format {values['format']}; this version reads {FORMAT}: export again into a new folder"
                )
            artifacts = {name: Artifact.from_dict(entry) for name, entry in values["artifacts"].items()}
            if wrong := [name for name, artifact in artifacts.items() if name != artifact.name]:
                raise ValueError(f"{wrong[0]} holds the entry of {artifacts[wrong[0]].name}")
            return cls(folder, artifacts, values["sampling"])
        except ArtifactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{file} is damaged ({one_line(error)}): delete the folder and export again") from error

    @classmethod
    def open_or_new(cls, folder: Path) -> Manifest:
        """Read a folder's manifest, or return an empty one where there is none. Raises ArtifactError."""
        return cls.open(folder) if (folder / NAME).exists() else cls(folder)

    def save(self) -> None:
        """Write the manifest atomically."""
        content = {
            "format": FORMAT,
            "sampling": self.sampling,
            "artifacts": {name: asdict(self.artifacts[name]) for name in sorted(self.artifacts)},
        }
        write_json(self.folder / NAME, content)

    def find(self, component: str, runtime: str = "onnx", target: str = "") -> Artifact:
        """Return the entry of an artifact without checking its files. Raises ArtifactError."""
        name = name_of(component, runtime, target)
        if name not in self.artifacts:
            module, extra = ("export.onnx", "") if runtime == "onnx" else ("export.trt", f" --target {target}")
            module += f" --runtime {runtime}" if runtime == "trt" else ""
            raise ArtifactError(
                f"{self.folder} has no {name} (it has {', '.join(sorted(self.artifacts)) or 'nothing'}); make it: "
                f"python -m {module} --ckpt DIR --out {self.folder}{extra} --components {component}"
            )
        return self.artifacts[name]

    def checked(self, component: str, runtime: str = "onnx", target: str = "", source: str | None = None) -> Artifact:
        """Return the entry of an artifact after checking its files, source and graph. Raises ArtifactError.

        source: hash of the checkpoint's weights (`source_hash`) that the artifact must have been made from.
        """
        artifact = self.find(component, runtime, target)
        rebuild = f"make it again: {artifact.command}"
        if source is not None and artifact.source != source:
            raise ArtifactError(
                f"{artifact.name} in {self.folder} was made from other weights "
                f"({artifact.source[:12]}, the checkpoint's are {source[:12]}); {rebuild}"
            )
        graph = self.artifacts.get(component)
        if runtime != "onnx" and graph is not None and graph.graph != artifact.graph:
            raise ArtifactError(f"{artifact.name} in {self.folder} is older than its graph {component}; {rebuild}")
        self.require_intact(artifact)
        return artifact

    def require_intact(self, artifact: Artifact) -> None:
        """Raise ArtifactError unless all files of an entry are intact."""
        rebuild = f"make it again: {artifact.command}"
        for name, expected in artifact.files.items():
            file = self.folder / name
            if Path(name).name != name:
                raise ArtifactError(f"{self.folder / NAME} points outside its folder, to {name}: refused")
            if not file.is_file():
                raise ArtifactError(f"{file} is missing; {rebuild}")
            if (size := file.stat().st_size) != expected["bytes"]:
                raise ArtifactError(f"{file} has {size} bytes instead of {expected['bytes']}; {rebuild}")
            if sha256(file) != expected["sha256"]:
                raise ArtifactError(f"{file} is not the file that was exported (its hash differs); {rebuild}")

    def current(self, expected: Artifact) -> Artifact | None:
        """Return the intact artifact that equals `expected` in source, settings and builder; None if there is none."""
        same = ("source", "precision", "opset", "profile", "builder", "kernels", "refittable", "calibration")
        if expected.runtime != "onnx":
            same += ("graph",)
        try:
            found = self.checked(expected.component, expected.runtime, expected.target)
        except ArtifactError:
            return None
        return found if all(getattr(found, key) == getattr(expected, key) for key in same) else None

    def publish(self, artifact: Artifact, work_dir: Path) -> None:
        """Move an artifact's files from `work_dir` into place, and save its entry."""
        old = self.artifacts.get(artifact.name)
        for name in artifact.files:
            os.replace(work_dir / name, self.folder / name)
        self.artifacts[artifact.name] = artifact
        self.save()
        for name in set(old.files if old else ()) - set(artifact.files):
            (self.folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Lock `folder` for one export, and give a folder within it to work in; that is deleted at the end.

    Raises ArtifactError where another export is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    work_dir = folder / ".partial"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(work_dir, ignore_errors=True)  # of a killed export
        work_dir.mkdir()
        try:
            yield work_dir
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)
    except BlockingIOError:
        raise ArtifactError(f"another export is writing into {folder}: wait for it, or choose another --out") from None
    finally:
        os.close(lock)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Return the entries for `Artifact.files`."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def digest(parts: dict[str, str]) -> str:
    """Return one hash over named hashes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_hash(checkpoint: Checkpoint, component: str) -> str:
    """Return the hash of the files that a component is made from: the encoder's, or the text-to-image model's.

    Raises CheckpointError where one is missing.
    """
    if COMPONENTS[component].needs == "encoder":
        files = [checkpoint.folder / "vlv.json", checkpoint.encoder_file]
    else:
        files = sorted(f for f in checkpoint.t2i.rglob("*") if f.suffix in (".json", ".safetensors"))
    absent = [f for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(f"{absent[0]} is missing: copy the checkpoint again")
    return digest({str(f.relative_to(checkpoint.folder)): sha256(f) for f in files})


def kernels_hash(component: str) -> str:
    """Return the hash of the operations' source code, which a trace contains; "" for a component without them.

    An engine with plugin nodes keeps the hash of the kernels instead (`plugins.source_hash`).
    """
    if not COMPONENTS[component].ops:
        return ""
    folder = Path(kernels.__file__).parent
    return digest({f.name: sha256(f) for f in sorted(folder.glob("*.py"))})
