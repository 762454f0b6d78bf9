"""Checkpoints of a run: torch.distributed.checkpoint folders, written in the background, complete or not at all.

RUN/NAME.saves/00001000/ holds every process's shards and progress.json. `.metadata` is written last, so a folder
without it is what a killed run left behind. A checkpoint loads on any number of processes, by DDP or FSDP2.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import torch.distributed.checkpoint as dcp

from vlv.train.config import TrainError
from vlv.train.parallel import World


class Checkpoints:
    """The checkpoints of one stage in a run folder; the newest `keep` stay."""

    def __init__(self, run: Path, name: str, keep: int, world: World):
        self.folder = Path(run) / f"{name}.saves"
        self.keep = keep
        self.world = world
        self._writing: Future | None = None

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

    def latest(self) -> tuple[Path, dict] | None:
        """Return the newest usable checkpoint and its progress; the same on every process."""
        self.world.barrier()
        if not (found := self.complete()):
            return None
        return found[-1], json.loads((found[-1] / "progress.json").read_text())

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
