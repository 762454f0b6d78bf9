"""One epoch of stage 1 from tars behind a server, killed three times, beside one that was never stopped.

    python -m benchmarks.epoch --images 100000 --out benchmarks/epoch.json

The images are small JPEG files in 20 WebDataset tars behind a local HTTP server that serves ranges; the model is a
very small one, trained by `vlv.train.stage1`'s own code. The run that is stopped gets SIGKILL for
all its processes at three random steps and goes on with 1 and 2 processes in turn. Each process writes down the names
of the rows that it was given; from these, and from the step at which each start began, a count that knows nothing of
the loader finds the rows that reached the final weights. The losses of both runs are compared step by step.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil

from benchmarks.data_reading import Server
from vlv.common.command import Parser, UserError, command_line, positive, run_command, say
from vlv.common.files import write_json

SHARDS = 20
BATCH = 200
STARTS = (2, 1, 2, 2)  # processes of the run that is killed after each of its starts but the last
TRAIN = """
import json, sys, time
import torch
from vlv.train import initialize, stage1
real = initialize.training_batches
def journaled(trainer, *args):
    name = f"{journals}/{time.time_ns()}-{trainer.world.rank}-{trainer.step}.jsonl"
    with open(name, "w") as file:
        for batch in real(trainer, *args):
            file.write(json.dumps([batch["position"], batch["id"]]) + "\\n")
            file.flush()
            yield batch
if __name__ == "__main__":  # not in the loader's processes
    journals = sys.argv.pop(1)
    torch.set_num_threads(1)
    initialize.training_batches = journaled
    sys.exit(stage1.main())
"""


def make_tars(folder: Path, images: int) -> set[str]:
    """Write JPEG files of 64 x 64 pixels into SHARDS tars; return the rows' keys."""
    import numpy as np
    from PIL import Image

    keys, draw = set(), np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i in range(shard, images, SHARDS):
                coarse = draw.integers(256, size=(4, 4, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG")
                info = tarfile.TarInfo(f"{i:07}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
                keys.add(f"{i:07}")
    return keys


def make_start(folder: Path) -> Path:
    """Write the narrow text-to-image model and the stage-1 checkpoint that the runs start from."""
    from vlv.model.config import PRESETS
    from vlv.train.config import STAGE1, T2I, Inputs, RunOptions
    from vlv.train.stage1 import train_stage1
    from vlv.train.t2i import train_t2i

    model = PRESETS["tiny"]
    vision = replace(model.vision, dims=(16, 32, 32), heads=(1, 2, 2), groups=(1, 2, 2))
    narrow = replace(
        model, vision=vision, width=32, heads=2, ffn=64, encoder_layers=1, decoder_layers=1, context_width=32,
        context_heads=4, context_ffn=128, context_layers=1,
    )  # fmt: skip
    t2i = replace(
        T2I["smoke"], vae_channels=(8, 8, 16, 16), unet_channels=(16, 32), context_width=32, text_layers=1
    )  # fmt: skip
    with patch.dict(PRESETS, {"tiny": narrow}):
        train_t2i(t2i, RunOptions(folder, folder / "t2i"))
        train_stage1(STAGE1["smoke"], Inputs(), RunOptions(folder, folder / "stage1"))
    return folder / "stage1"


class Run:
    """A run folder, its starts and what they wrote down."""

    def __init__(self, folder: Path, program: Path, flags: list[str]):
        self.folder, self.program, self.flags = folder, program, flags
        self.journals = folder / "journals"
        self.journals.mkdir(parents=True)
        self.log = folder / "run" / "stage1.log.jsonl"

    def start(self, processes: int, stop_at: int | None = None) -> None:
        """Train to the end, or until the log holds step `stop_at`; then kill every process of the run."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else ()), self.program, self.journals, *self.flags]
        command += ["--run-folder", self.folder / "run"]
        with (self.folder / "stderr.txt").open("ab") as err:
            process = subprocess.Popen(
                list(map(str, command)), stdout=err, stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        while process.poll() is None:
            time.sleep(0.2)
            if stop_at is not None and self.step() >= stop_at:
                agent = psutil.Process(process.pid)
                for member in [*agent.children(recursive=True), agent]:  # torchrun's workers have sessions of their own
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                process.wait()
                return
        if process.returncode or stop_at is not None:
            lines = [line for line in (self.folder / "stderr.txt").read_text().splitlines() if "rror: " in line]
            raise UserError(f"the run in {self.folder} ended with {process.returncode}: {(lines or ['no message'])[0]}")

    def step(self) -> int:
        """Return the last step in the log."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except ValueError:  # a line that is being written
            return 0

    def losses(self) -> dict[int, float]:
        """Return the loss of each step."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {line["step"]: line["loss"] for line in found}

    def rows(self) -> collections.Counter[str]:
        """Count the rows whose gradients are in the final weights: of each start those before the next one began."""
        starts: dict[int, list[Path]] = {}
        for file in sorted(self.journals.iterdir()):
            starts.setdefault(int(file.stem.rpartition("-")[2]), []).append(file)
        first_steps = sorted(starts)
        counted: collections.Counter[str] = collections.Counter()
        for first, end in zip(first_steps, [*first_steps[1:], sys.maxsize], strict=True):
            latest = max(int(file.stem.split("-")[0]) for file in starts[first])
            for file in starts[first]:
                if latest - int(file.stem.split("-")[0]) > 60e9:
                    continue  # an earlier start at the same step, which was killed before its first save
                for line in file.read_text().splitlines():
                    try:
                        position, ids = json.loads(line)
                    except ValueError:  # torn by the kill
                        continue
                    if first <= position // BATCH < end:
                        counted.update(id.rpartition("/")[2].rpartition(":")[2] for id in ids)
        return counted


def work(args: argparse.Namespace) -> int:
    from benchmarks import machine

    if args.images % (SHARDS * BATCH):
        raise UserError(
            f"--images {args.images}: expected a multiple of {SHARDS * BATCH}, for {SHARDS} tars and whole steps"
        )
    steps = args.images // BATCH
    report = {"command": command_line("benchmarks.epoch"), "kind": "epoch", "machine": machine.describe()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tars").mkdir()
        keys = make_tars(folder / "tars", args.images)
        start = make_start(folder / "start")
        server = Server(folder / "tars")
        program = folder / "train.py"
        program.write_text(TRAIN)
        flags = [
            "--preset", "paper-stage1", "--ckpt", start, "--steps", steps, "--batch", BATCH,
            "--micro-batch", BATCH // 2, "--workers", "1", "--no-bf16", "--device", "cpu", "--lr", "1e-4",
            "--log-every", "1", "--save-every", max(1, steps // 40), "--spike", "0",
            "--data", *(f"{server.url}/{shard:02}.tar" for shard in range(SHARDS)),
        ]  # fmt: skip
        began = time.monotonic()
        whole = Run(folder / "whole", program, flags)
        whole.start(2)
        seconds = time.monotonic() - began
        say(f"the run without a stop took {seconds:.0f} s")
        draw, stops = random.Random(args.seed), []
        killed = Run(folder / "killed", program, flags)
        for i, processes in enumerate(STARTS):
            last = i + 1 == len(STARTS)
            stop = None if last else draw.randrange(steps * (4 * i + 1) // 16, steps * (4 * i + 5) // 16)
            killed.start(processes, stop)
            if not last:
                stops.append({"processes": processes, "killed_at_step": killed.step()})
                say(f"killed {processes} processes at step {killed.step()}")
        runs = {}
        for word, run in (("whole", whole), ("killed", killed)):
            counted = run.rows()
            runs[word] = {
                "rows": sum(counted.values()), "different_rows": len(counted), "every_row_once": counted
                == collections.Counter(keys),
            }  # fmt: skip
        losses, others = whole.losses(), killed.losses()
        difference = max(abs(others[step] - loss) / abs(loss) for step, loss in losses.items())
    report |= {
        "images": args.images, "tars": SHARDS, "batch": BATCH, "steps": steps, "kills": stops,
        "last_start_processes": STARTS[-1], "runs": runs,
        "images_per_second": round(args.images / seconds, 1),
        "loss": {"first": losses[1], "last": losses[steps], "steps_logged": [len(losses), len(others)]},
        "max_relative_difference_of_losses": difference,
    }  # fmt: skip
    met = all(r["every_row_once"] for r in runs.values()) and len(losses) == len(others) == steps and difference < 1e-4
    report["met"] = met
    if args.out:
        write_json(args.out, report, 1)
    print(json.dumps({"runs": runs, "kills": stops, "difference": difference, "met": met}))
    return 0 if met else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    p = Parser(prog="python -m benchmarks.epoch", description=__doc__)
    p.add_argument("--images", type=positive, default=100_000, help="rows of the epoch (100000)")
    p.add_argument("--seed", type=int, default=0, help="chooses the steps of the kills (0)")
    p.add_argument("--out", type=Path, help="JSON file of the figures")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(work, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
