"""The artifact folder: manifest.json, and the files that it vouches for.

    {"format": 1, "sampling": {...}, "artifacts": {"encoder": {...}, "encoder@rtx-sm89": {...}}}

Every artifact is checked against its entry (format, source weights, sizes, SHA-256 of every file) before anything
of it is deserialized. What does not fit is refused with the command that rebuilds it. Writes are atomic, and an
entry appears only when its files are in place, so an interrupted export leaves the old state or the new one.
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

from export.components import COMPONENTS, Batch, Port
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common.command import UserError

FORMAT = 1
NAME = "manifest.json"


class ArtifactError(UserError, ValueError):
    """An artifact that is missing, damaged, or made from something else; the message gives the remedy."""


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
    source: str  # hash of the weights that it was made from
    graph: str  # SHA-256 over the ONNX graph and its external data
    kernels: str  # hash of the ops' source code that was traced
    builder: str  # names and versions of what made it
    files: dict[str, dict]  # name -> {"sha256", "bytes"}; the first one is what a runtime opens
    command: str  # makes it again
    blocks: dict[str, str] = field(default_factory=dict)  # module path -> value of the graph that it ends with
    exact: tuple[str, ...] = ()  # blocks that stayed in float32 (in float16 with "int8-trt" and "fp8")
    verification: dict = field(default_factory=dict)
    refittable: bool = False  # an engine that takes other weights
    calibration: str = ""  # SHA-256 of the pictures that ranges of activations were taken from

    @property
    def name(self) -> str:
        return name_of(self.component, self.runtime, self.target)

    @property
    def main_file(self) -> str:
        return next(iter(self.files))

    @classmethod
    def from_dict(cls, values: dict) -> Artifact:
        """Rebuild from JSON. Raises TypeError or KeyError on another shape."""
        ports = {k: tuple(Port(**{**p, "shape": tuple(p["shape"])}) for p in values[k]) for k in ("inputs", "outputs")}
        profile, exact = Batch(**values["profile"]), tuple(values["exact"])
        return cls(**{**values, **ports, "profile": profile, "exact": exact})


def name_of(component: str, runtime: str, target: str = "") -> str:
    """The manifest's name of an artifact: `encoder`, or `encoder@rtx-sm89`."""
    return component if runtime == "onnx" else f"{component}@{runtime}-{target}"


@dataclass
class Manifest:
    """A folder's artifacts. `sampling` is what a reconstruction needs beside the graphs."""

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
            return cls(folder, artifacts, values["sampling"])
        except ArtifactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{file} is damaged ({error!r}): delete the folder and export again") from error

    @classmethod
    def open_or_new(cls, folder: Path) -> Manifest:
        return cls.open(folder) if (folder / NAME).exists() else cls(folder)

    def save(self) -> None:
        """Write the manifest, at once or not at all."""
        content = {
            "format": FORMAT,
            "sampling": self.sampling,
            "artifacts": {name: asdict(self.artifacts[name]) for name in sorted(self.artifacts)},
        }
        partial = self.folder / f".{NAME}.partial"
        with partial.open("w") as stream:
            json.dump(content, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, self.folder / NAME)

    def find(self, component: str, runtime: str = "onnx", target: str = "") -> Artifact:
        """The entry of an artifact; its files are not looked at. Raises ArtifactError."""
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
        """The same, all its files read and found to be what was written. Raises ArtifactError.

        source: hash of the checkpoint's weights (`source_hash`), where the artifact has to belong to one.
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
        """Raise ArtifactError unless all files of an entry are what was written."""
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

    def current(self, wanted: Artifact) -> Artifact | None:
        """The intact artifact, if there is one, that is made from the same, by the same and as `wanted`."""
        same = ("source", "precision", "opset", "profile", "builder", "kernels", "refittable", "calibration")
        if wanted.runtime != "onnx":
            same += ("graph",)
        try:
            there = self.checked(wanted.component, wanted.runtime, wanted.target)
        except ArtifactError:
            return None
        return there if all(getattr(there, key) == getattr(wanted, key) for key in same) else None

    def publish(self, artifact: Artifact, made: Path) -> None:
        """Move an artifact's files from the folder `made` into place, and enter it."""
        old = self.artifacts.get(artifact.name)
        for name in artifact.files:
            os.replace(made / name, self.folder / name)
        self.artifacts[artifact.name] = artifact
        self.save()
        for name in set(old.files if old else ()) - set(artifact.files):
            (self.folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder within `folder` to make files in, for one export at a time; removed in the end, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    made = folder / ".partial"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(made, ignore_errors=True)  # of a killed one
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except BlockingIOError:
        raise ArtifactError(f"another export is writing into {folder}: wait for it, or choose another --out") from None
    finally:
        os.close(lock)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Entries for `Artifact.files`."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def digest(parts: dict[str, str]) -> str:
    """One hash over named hashes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_hash(checkpoint: Checkpoint, component: str) -> str:
    """The hash of what a component is made from: the encoder's files, or the text-to-image model's."""
    if COMPONENTS[component].needs == "encoder":
        files = [checkpoint.folder / "vlv.json", checkpoint.encoder_file]
    else:
        files = sorted(f for f in checkpoint.t2i.rglob("*") if f.suffix in (".json", ".safetensors"))
    absent = [f for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(f"{absent[0]} is missing: copy the checkpoint again")
    return digest({str(f.relative_to(checkpoint.folder)): sha256(f) for f in files})


def kernels_hash(component: str) -> str:
    """The hash of the ops' source code, which a trace turns into graph nodes; "" where none of ours are in it.

    An engine whose graph has plugin nodes keeps the hash of the kernels instead (`plugins.source_hash`).
    """
    if not COMPONENTS[component].ops:
        return ""
    import kernels

    folder = Path(kernels.__file__).parent
    return digest({f.name: sha256(f) for f in sorted(folder.glob("*.py"))})
