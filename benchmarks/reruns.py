"""Is the output true after any history? Kills, and images replaced, renamed, deleted and added between the runs.

    python -m benchmarks.reruns                                   # into benchmarks/reruns.json
    python -m benchmarks.reruns --images 500 --kills 3 --engine transformers -o /tmp/try.json

The batch command captions generated scenes of 64 px, and is killed (SIGKILL) at random moments: after a random number
of records, and every third time after a random number of seconds, which hits the start as well. In between, images
change, and the folder is spelled differently; every second run compares files by a hash (--verify), the others by size
and time. A last run comes to its end. Then a process of its own, which reads only the output and the folder
(benchmarks/reruns_check.py), looks for one record an image, each of the image that is there now. Some images are
captioned again into an output without a history, for the same captions.

By default the captions are hashes of the pixels (benchmarks/reruns_engine.py): what is examined is the bookkeeping.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.machine import describe
from vlv.common.command import command_line, say
from vlv.data import scenes

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "benchmarks" / "reruns_engine.py"
FOLDERS = 10  # that the images are in
TIMEOUT = 300  # seconds without a new record
LATEST = 25  # seconds from its start within which a run is killed that is killed at a time


class History:
    """A folder of scenes that changes, each scene with a number of its own."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder = folder
        self.draw = draw
        self.count = 0  # scenes so far
        self.changes: dict[str, int] = {"replaced": 0, "renamed": 0, "deleted": 0, "added": 0}

    def write(self, path: Path) -> None:
        """Write the next scene, as another process might: beside its place, then renamed."""
        stream = io.BytesIO()
        Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + self.count))).save(
            stream, "png", compress_level=1
        )
        self.count += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        partial.write_bytes(stream.getvalue())
        partial.replace(path)

    def change(self, number: int) -> None:
        """Change `number` random images in each way."""
        images = self.draw.sample(sorted(self.folder.rglob("*.png")), 3 * number)
        for path in images[:number]:
            self.write(path)
        for path in images[number : 2 * number]:
            path.rename(path.with_name(f"renamed-{self.count}-{path.name[-20:]}"))
        for path in images[2 * number :]:
            path.unlink()
        for _ in range(number):
            self.write(self.folder / f"{self.draw.randrange(FOLDERS)}" / f"added-{self.count:07}.png")
        for kind in self.changes:
            self.changes[kind] += number


def lines(output: Path) -> int:
    """Return how many records an output has."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


def start(args: argparse.Namespace, paths: list[str], output: Path, *flags: str) -> subprocess.Popen:
    """Start the command in a process group of its own."""
    hashes = args.engine == "pixels"
    command = [sys.executable, *(["-P", str(ENGINE)] if hashes else ["-m", "serve.vllm_caption"]), *paths, *flags]
    command += ["-o", str(output), "--ckpt", args.ckpt, "--max-tokens", str(args.max_tokens)]
    command += ["--engine", "transformers" if hashes else args.engine]
    log = open(output.with_suffix(".log"), "ab")  # noqa: SIM115
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=output.parent, env=environment, stderr=log, start_new_session=True)


def wait_for(output: Path, more: int, run: subprocess.Popen) -> None:
    """Return once the output has `more` further records, or the run has ended."""
    before, last, since = lines(output), 0, time.monotonic()
    while run.poll() is None and (now := lines(output)) < before + more:
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            raise SystemExit(f"no record in {TIMEOUT} s: see {output.with_suffix('.log')}")
        time.sleep(0.3)


def measure(args: argparse.Namespace, work: Path) -> dict:
    """Run the history and the checks; return the figures."""
    draw = random.Random(args.seed)
    folder, output = work / "images", work / "captions.jsonl"
    history = History(folder, draw)
    for number in range(args.images):
        history.write(folder / f"{number % FOLDERS}" / f"{number:07}.png")
    spellings = ["images", str(folder), "./images/../images", f"{folder}/*"]
    began = time.monotonic()
    ends = []
    for kill in range(args.kills):
        run = start(args, [spellings[kill % len(spellings)]], output, *["--verify"] * (kill % 2))
        if kill % 3 == 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(draw.uniform(0, LATEST))
        else:
            wait_for(output, draw.randrange(1, max(2, 2 * args.images // (args.kills + 1))), run)
        ended = run.poll()
        if ended is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        ends.append({"ended": "killed" if ended is None else ended, "records": lines(output)})
        say(f"run {kill + 1}: {ends[-1]}")
        history.change(args.changes)
    last = start(args, [spellings[args.kills % len(spellings)]], output, "--verify", "--prune")
    last.wait()
    seconds = time.monotonic() - began
    check = [sys.executable, str(ROOT / "benchmarks" / "reruns_check.py"), str(output), str(folder)]
    found = json.loads(subprocess.run(check, capture_output=True, text=True, check=True).stdout)
    images = sorted(map(str, folder.rglob("*.png")))
    some, fresh = draw.sample(images, min(args.sample, len(images))), work / "fresh.jsonl"
    (work / "some.txt").write_text("\n".join(some))
    start(args, [str(work / "some.txt")], fresh).wait()
    texts = [{r["path"]: r["caption"] for r in map(json.loads, file.open())} for file in (output, fresh)]
    return {
        "images_at_first": args.images,
        "scenes_written": history.count,
        "runs_before_the_last": ends,
        "changes_between": history.changes,
        "spellings": [s.replace(str(work), "DIR") for s in spellings],
        "last_exit_code": last.returncode,
        "seconds": round(seconds, 1),
        "check": found,
        "captioned_again_without_history": len(texts[1]),
        "same_caption": sum(texts[0].get(path) == caption for path, caption in texts[1].items()),
    }


def main() -> None:
    """Measure and write."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", default=str(ROOT / "assets" / "vlv-tiny"), metavar="DIR")
    p.add_argument("--engine", default="pixels", help="pixels (default): captions are hashes; or a real engine")
    p.add_argument("--images", type=int, default=100_000, help="scenes at first (100000)")
    p.add_argument("--kills", type=int, default=20, help="runs that are killed (20)")
    p.add_argument(
        "--changes", type=int, default=250, help="images replaced, renamed, deleted and added after each (250)"
    )
    p.add_argument("--sample", type=int, default=500, help="images captioned again without a history (500)")
    p.add_argument("--max-tokens", type=int, default=12)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-o", "--output", default=str(ROOT / "benchmarks" / "reruns.json"), metavar="JSON")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="reruns-") as work:
        report = {"command": command_line("benchmarks.reruns"), **describe(), **measure(args, Path(work).resolve())}
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
