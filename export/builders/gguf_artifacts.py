"""Write a checkpoint's language model in several GGUF types, verified, as artifacts of a folder."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from export.builders.gguf import source_hash, write_gguf
from export.components import Batch
from export.manifest import Artifact, Manifest, describe_files, workspace
from export.runtimes.llama_library import BUILDER
from export.verification.gguf import Reference
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import say

COMPONENT, RUNTIME = "llm", "gguf"
SHOWN = 4  # tensors that a message names


@dataclass(frozen=True)
class GGUFConfig:
    """What to write, and how it is verified."""

    ckpt: str  # the checkpoint's name on the command line, for the command that makes an artifact again
    out: Path
    types: tuple[str, ...] = ("f16",)
    scenes: int = 256  # held-out scenes whose captions are compared
    allow_drift: bool = False  # keep a file that fails the check
    force: bool = False  # write again what is up to date

    def expected(self, checkpoint: Checkpoint, kind: str) -> Artifact:
        """Return the entry of a type, as far as it is known before it is written."""
        words = ["python", "-m", "export.gguf", "--ckpt", self.ckpt, "--out", str(self.out), "--types", kind]
        words += ["--scenes", str(self.scenes), *["--allow-drift"] * self.allow_drift]
        return Artifact(
            component=COMPONENT,
            runtime=RUNTIME,
            target=kind,
            precision=kind,
            opset=0,
            inputs=(),
            outputs=(),
            profile=Batch(1, 1, 1),
            source=source_hash(checkpoint.llm),
            graph="",
            kernels="",
            builder=f"gguf {version('gguf')}, {BUILDER}",
            files={},
            command=shlex.join(words),
        )


def export_gguf(config: GGUFConfig, checkpoint: Checkpoint) -> tuple[list[Artifact], list[str]]:
    """Write every type that is not up to date; return the artifacts, and why any was refused.

    Raises GGUFError, LlamaError, ArtifactError.
    """
    problems: list[str] = []
    reference = None
    with workspace(config.out) as work_dir:
        manifest = Manifest.open_or_new(config.out)
        for kind in config.types:
            expected, start = config.expected(checkpoint, kind), time.monotonic()
            current = None if config.force else manifest.current(expected)
            if current and (config.allow_drift or not current.verification["problems"]):
                say(f"{kind}: up to date")
                continue
            name = f"{COMPONENT}-{kind}.gguf"
            report = write_gguf(checkpoint.llm, work_dir / name, kind)
            for sentence in sorted(set(report["fallbacks"].values())):
                names = [tensor for tensor, became in report["fallbacks"].items() if became == sentence]
                more = f" and {len(names) - SHOWN} more (all in manifest.json)" if len(names) > SHOWN else ""
                say(f"{kind}: {sentence}: {', '.join(names[:SHOWN])}{more}")
            if reference is None:
                say(f"captioning {config.scenes} held-out scenes with float32 PyTorch, to compare with …")
                reference = Reference.of(checkpoint, config.scenes)
            figures = reference.check(work_dir / name, kind)
            if figures["problems"] and not config.allow_drift:
                problems += [f"{kind}: {problem}" for problem in figures["problems"]]
                problems.append(
                    f"{kind}: refused, and nothing kept: choose another type, or keep it with --allow-drift"
                )
                continue
            figures |= {"tensors": report["tensors"], "fallbacks": report["fallbacks"]}
            files = describe_files(work_dir, [name])
            manifest.publish(replace(expected, files=files, verification=figures), work_dir)
            kept = "kept although it drifts" if figures["problems"] else "verified"
            say(f"{kind}: {kept}, {time.monotonic() - start:.0f} s in all")
        names = [config.expected(checkpoint, kind).name for kind in config.types]
        return [manifest.artifacts[name] for name in names if name in manifest.artifacts], problems
