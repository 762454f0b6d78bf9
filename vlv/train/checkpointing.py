"""Checkpoints of a run: torch.distributed.checkpoint folders, written in the background, complete or not at all.

RUN/NAME.saves/00001000/ holds every process's shards and progress.json. `.metadata` is written last, so a folder
without it is what a killed run left behind. A checkpoint loads on any number of processes, by DDP or FSDP2.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import torch.distributed.checkpoint as dcp

from vlv.train.config import TrainError
from vlv.train.parallel import World

MIB = 1 << 20


class Checkpoints:
    """The checkpoints of one stage in a run folder; the newest `keep` stay."""

    def __init__(self, run: Path, name: str, keep: int, world: World):
        self.folder = Path(run) / f"{name}.saves"
        self.keep = keep
        self.world = world
        self._writing: Future | None = None

    @staticmethod
    def find(path: Path) -> Path:
        """Return a run's newest usable checkpoint, or the one that `path` is. Raises TrainError where there is none."""
        path = Path(path)
        found = [path] if (path / ".metadata").is_file() else [f.parent for f in sorted(path.glob("*/.metadata"))]
        if not found:
            raise TrainError(f"{path} has no checkpoint of a run: expected RUN/NAME.saves, or one folder in there")
        return found[-1]

    def complete(self) -> list[Path]:
        """Return the usable checkpoints, the oldest first."""
        return sorted(f.parent for f in self.folder.glob("*/.metadata"))

    def write(self, step: int, tensors: dict, progress: dict) -> None:
        """Copy the tensors, then write them while training goes on; waits for the checkpoint before."""
        self.wait()
        target = self.folder / f"{step:08}"
        if self.world.first:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            (target / "progress.json").write_text(json.dumps(progress))
        self.world.barrier()
        self._writing = dcp.async_save(tensors, checkpoint_id=target, process_group=self.world.background)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk, then delete older ones. Raises what went wrong meanwhile."""
        if self._writing is None:
            return
        self._writing.result()
        self._writing = None
        self.world.barrier()
        if self.world.first:
            for old in self.complete()[: -self.keep]:
                (old / ".metadata").unlink()  # first, so that a kill leaves no part that looks complete
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """Return the newest usable checkpoint; the same on every process."""
        self.world.barrier()
        found = self.complete()
        return found[-1] if found else None

    @staticmethod
    def progress(folder: Path) -> dict:
        """Return what a checkpoint holds beside tensors."""
        return json.loads((folder / "progress.json").read_text())

    def read(self, folder: Path, tensors: dict) -> None:
        """Load into `tensors`, in place. Raises TrainError where the checkpoint is of another model."""
        try:
            dcp.load(tensors, checkpoint_id=folder, process_group=self.world.background)
        except dcp.api.CheckpointException as error:
            reason = str(next(iter(error.failures.values()), error)).splitlines()[0]
            raise TrainError(
                f"{folder} does not fit this run ({reason}): it was written with other flags; "
                "give the same ones, or choose another --run folder"
            ) from error


def fingerprint(*paths: Path) -> str:
    """Return what tells files and folders from others of the same names: names, sizes, first and last MiB."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path.parent)} {size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(MIB))
                stream.seek(max(0, size - MIB))
                digest.update(stream.read(MIB))
    return digest.hexdigest()[:16]
