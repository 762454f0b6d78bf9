"""Whether the trainer of this version repeats the losses of the one before it, which had a loop of its own for toys.

    git worktree add ../before edb08ac
    python -m benchmarks.trainer_equivalence --before ../before --out benchmarks/trainer_equivalence.json

Both train the toy recipe's stages for 50 steps on the same seeds: stage 1 through the bundled text-to-image model,
stage 2 from the bundled checkpoint (the encoder joins at step 25), and a narrow autoencoder and UNet, all in float32:
in bfloat16, as the autoencoder's preset has it, differences in the last bits grow within 50 steps. `--batch 4
--scenes 64` gives the losses that tests/vlv/train/test_equivalence.py compares with (--fixture FILE writes them).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from vlv.common.command import Parser, UserError, command_line, positive, run_command
from vlv.common.files import write_json

BUNDLED = Path(__file__).parents[1] / "assets" / "vlv-tiny"
LIMIT = 1e-4  # of the relative difference of any loss
STAGES = ("stage1", "stage2", "vae", "t2i")
BEFORE = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from vlv.diffusion import T2I as Model
from vlv.train import stage1, stage2, t2i
from vlv.train.presets import STAGE1, STAGE2, T2I

s, bundled, run = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
how = dict(steps=s["steps"], batch=s["batch"], warmup=s["warmup"], log_every=1, save_every=10**6)
t2i.latents(Model.load(bundled / "t2i"), s["scenes"], run)  # as in a run of all stages: they are there already
one, two = STAGE1["tiny"], STAGE2["tiny"]
one = replace(one, loop=replace(one.loop, **how), pool=s["scenes"])
stage1.train(one, bundled / "t2i", run, run / "stage1", "cpu")
two = replace(two, loop=replace(two.loop, **how), pool=s["scenes"], encoder_from=s["encoder_from"])
stage2.train(two, bundled, run, run / "stage2", "cpu")
toy = replace(T2I["tiny"], pool=s["scenes"], vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))
toy = replace(toy, vae_loop=replace(toy.vae_loop, bf16=False, **how), unet_loop=replace(toy.unet_loop, **how))
t2i.train(toy, run, run / "t2i", "cpu")
"""


def losses(run: Path, stages: tuple[str, ...] = STAGES) -> dict[str, list[float]]:
    """Return the loss of every step of the stages in a run folder."""
    histories = {name: json.loads((run / f"{name}.json").read_text())["history"] for name in stages}
    return {name: [line["loss"] for line in history] for name, history in histories.items()}


def before(checkout: Path, settings: dict, run: Path) -> dict[str, list[float]]:
    """Train with another checkout's code. Raises UserError where it fails."""
    run.mkdir(parents=True)
    command = [sys.executable, "-c", BEFORE, json.dumps(settings), str(BUNDLED), str(run)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the code in {checkout} failed: {done.stderr.strip().splitlines()[-1]}")
    return losses(run)


def now(settings: dict, run: Path, with_t2i: bool = True) -> dict[str, list[float]]:
    """Train with this code, in one thread; the text-to-image model too if `with_t2i`."""
    import torch

    from vlv.data.latents import scene_latents
    from vlv.diffusion.t2i import T2I as Model
    from vlv.train.config import STAGE1, STAGE2, T2I, Inputs, RunOptions
    from vlv.train.stage1 import train_stage1
    from vlv.train.stage2 import train_stage2
    from vlv.train.t2i import train_t2i

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    how = {n: settings[n] for n in ("steps", "batch", "warmup")}
    how |= {"micro_batch": settings["batch"], "log_every": 1, "save_every": 10**6}
    run.mkdir(parents=True)
    scene_latents(Model.load(BUNDLED / "t2i"), settings["scenes"], run)
    one, two, toy = STAGE1["tiny"], STAGE2["tiny"], T2I["tiny"]
    scenes = replace(one.synthetic, scenes=settings["scenes"])
    train_stage1(replace(one, synthetic=scenes, **how), Inputs(t2i=BUNDLED / "t2i"), RunOptions(run, run / "stage1"))
    two = replace(two, synthetic=scenes, encoder_from=settings["encoder_from"], **how)
    train_stage2(two, Inputs(BUNDLED), RunOptions(run, run / "stage2"))
    if not with_t2i:
        torch.set_num_threads(threads)
        return losses(run, STAGES[:2])
    toy = replace(toy, scenes=settings["scenes"], vae_channels=(8, 8, 16, 16), unet_channels=(16, 32))
    toy = replace(toy, vae=replace(toy.vae, bf16=False, **how), unet=replace(toy.unet, **how))
    train_t2i(toy, RunOptions(run, run / "t2i"))
    torch.set_num_threads(threads)
    return losses(run)


def work(args: argparse.Namespace) -> int:
    settings = {n: getattr(args, n) for n in ("steps", "batch", "scenes")}
    settings |= {"warmup": min(10, args.steps), "encoder_from": args.steps // 2}
    with tempfile.TemporaryDirectory() as folder:
        old = before(args.before, settings, Path(folder) / "before")
        if args.fixture:
            write_json(args.fixture, {"command": command_line("benchmarks.trainer_equivalence"), "settings": settings,
                                      "losses": old}, None)  # fmt: skip
        new = now(settings, Path(folder) / "now")
    apart = {n: max(abs(a - b) / abs(b) for a, b in zip(new[n], old[n], strict=True)) for n in STAGES}
    from benchmarks import machine

    report = {
        "command": command_line("benchmarks.trainer_equivalence"), "kind": "trainer_equivalence",
        "machine": machine.describe(), "settings": settings, "limit": LIMIT, "max_relative_difference": apart,
        "losses": {n: {"before": old[n], "now": new[n]} for n in STAGES},
    }  # fmt: skip
    print(json.dumps(apart))
    if args.out:
        write_json(args.out, report, 1)
    return 0 if max(apart.values()) <= LIMIT else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = Parser(prog="python -m benchmarks.trainer_equivalence", description=__doc__)
    p.add_argument("--before", type=Path, required=True, metavar="DIR", help="checkout of the version before")
    p.add_argument("--steps", type=positive, default=50)
    p.add_argument("--batch", type=positive, default=32)
    p.add_argument("--scenes", type=positive, default=1024, help="scenes to train on (1024)")
    p.add_argument("--out", type=Path, help="JSON file of the comparison")
    p.add_argument("--fixture", type=Path, help="JSON file of the losses before alone")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_command(work, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
