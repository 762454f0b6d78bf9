"""Saves of a run: torch.distributed.checkpoint folders, written in the background, whole or not at all.

RUN/NAME.saves/00001000/ holds every process's shards and progress.json. `.metadata` is written last, so a folder
without it is what a killed run left behind. A save loads on any number of processes, by DDP or FSDP2.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import torch.distributed.checkpoint as dcp

from vlv.train.parallel import World


class Saves:
    """The saves of one stage in a run folder."""

    def __init__(self, run: Path, name: str, keep: int, world: World):
        self.folder, self.keep, self.world = Path(run) / f"{name}.saves", keep, world
        self._writing: Future | None = None

    def complete(self) -> list[Path]:
        """Usable saves, the oldest first."""
        return sorted(f.parent for f in self.folder.glob("*/.metadata"))

    def write(self, step: int, tensors: dict, progress: dict) -> None:
        """Copy the tensors, then write them while training goes on; the save before is waited for."""
        self.wait()
        target = self.folder / f"{step:08}"
        if self.world.first:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            (target / "progress.json").write_text(json.dumps(progress))
        self.world.barrier()
        self._writing = dcp.async_save(tensors, checkpoint_id=target, process_group=self.world.background)

    def wait(self) -> None:
        """Until the last save is on the disk; then older ones go. Raises what went wrong in the background."""
        if self._writing is None:
            return
        self._writing.result()
        self._writing = None
        self.world.barrier()
        if self.world.first:
            for old in self.complete()[: -self.keep]:
                (old / ".metadata").unlink()  # first, so that a kill leaves no half save that looks whole
                shutil.rmtree(old)

    def latest(self) -> tuple[Path, dict] | None:
        """The newest usable save and its progress; the same on every process."""
        self.world.barrier()
        if not (found := self.complete()):
            return None
        return found[-1], json.loads((found[-1] / "progress.json").read_text())

    def read(self, folder: Path, tensors: dict) -> None:
        """Load into `tensors`, in place. Raises ValueError where the save is of another model."""
        try:
            dcp.load(tensors, checkpoint_id=folder, process_group=self.world.background)
        except dcp.api.CheckpointException as error:
            reason = str(next(iter(error.failures.values()), error)).splitlines()[0]
            raise ValueError(
                f"{folder} does not fit this run ({reason}): it was written with other flags; "
                "give the same ones, or choose another --run folder"
            ) from error
