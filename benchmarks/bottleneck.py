"""The bottleneck at work: what the embeddings hold, by their number and by the number of training images.

    python -m benchmarks.bottleneck --stage1 assets/vlv-tiny --run runs/bottleneck --out benchmarks/bottleneck.json

Stage 1 in small, so that it takes minutes a point on one core: vision tower and BART encoder are the checkpoint's,
frozen; queries, BART decoder and projection start anew for each point and learn from the frozen text-to-image model's
noise error alone, with stage 1's settings but fewer steps. Then a linear probe
(vlv.evaluate.synthetic.attribute_probe) reads objects, places, sizes and background of scenes that no training saw.
Stopped at any moment, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks import machine
from vlv.checkpoints.folder import Checkpoint
from vlv.common.command import command_line
from vlv.data import scene_batches as data
from vlv.data import scenes
from vlv.data.latents import scene_latents
from vlv.diffusion.t2i import T2I
from vlv.evaluate.synthetic import attribute_probe
from vlv.model.encoder import VLVEncoder
from vlv.train.config import STAGE1, TrainConfig
from vlv.train.objectives import Objective
from vlv.train.parallel import World
from vlv.train.trainer import Trainer

PROBE = 2**30  # first scene of the probe's training set: beyond stage 1's pool and below the held-out ones
CHUNK = 256  # images encoded together
NOISE = 512  # held-out scenes that the noise error is measured on


@dataclass(frozen=True)
class Point:
    """One training: how many queries, different images and steps."""

    queries: int
    images: int

    steps: int
    batch: int

    @property
    def name(self) -> str:
        return f"q{self.queries}-n{self.images}-s{self.steps}x{self.batch}"


def memories(encoder: VLVEncoder, seeds: range, cache: Path) -> Tensor:
    """What the frozen part makes of the scenes: BART's memory [len(seeds), M, width], float16, kept in `cache`."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    parts, prompt = [], encoder.bottleneck.prompt
    with torch.inference_mode():
        for i in range(0, len(seeds), CHUNK):
            features = encoder.features(data.images(seeds[i : i + CHUNK]))
            joined = torch.cat([features, prompt.expand(len(features), -1, -1)], dim=1)
            parts.append(encoder.bottleneck.encoder(joined).half())
    temporary = cache.with_suffix(".tmp")
    torch.save(torch.cat(parts), temporary)
    temporary.replace(cache)
    return torch.cat(parts)


def fresh(trained: VLVEncoder, t2i: T2I, queries: int) -> tuple[VLVEncoder, float]:
    """An encoder with new queries, decoder and projection, and the scale that its last layer was given.

    More queries than the text model has positions get positions interpolated between them: this model of 32
    positions cannot take 77 otherwise.
    """
    torch.manual_seed(0)
    encoder = VLVEncoder(replace(trained.config, queries=queries))
    own = {k: v for k, v in trained.state_dict().items() if k.startswith(("vision.", "image.", "bottleneck.encoder."))}
    encoder.load_state_dict(own | {"bottleneck.prompt": trained.bottleneck.prompt}, strict=False)
    text = encoder.bottleneck.text
    known = t2i.text_encoder.get_parameter("embeddings.position_embedding.weight")
    if queries <= len(known):
        text.copy_from(t2i.text_encoder)
    else:
        text.positions.data = known  # so that copy_from fits; stretched below
        text.copy_from(t2i.text_encoder)
        stretched = interpolate(known.T[None], queries, mode="linear", align_corners=True)[0].T
        text.positions.data = stretched.contiguous()
    encoder.requires_grad_(False)
    bottleneck = encoder.bottleneck
    for part in (bottleneck.decoder, bottleneck.projection):
        part.requires_grad_(True)
    bottleneck.queries.requires_grad_(True)
    with torch.no_grad():  # as stage 1 does, and why: see there
        words = t2i.text_encoder.get_input_embeddings().weight.std()
        projected = bottleneck.projection(bottleneck.decode(encoder.features(data.images(range(8)))))
        scale = (words / projected.std()).item()
        bottleneck.projection[2].weight.mul_(scale)
        bottleneck.projection[2].bias.mul_(scale)
    return encoder, scale


def context(encoder: VLVEncoder, memory: Tensor) -> Tensor:
    b = encoder.bottleneck
    return b.text(b.projection(b.decoder(b.queries[None], memory.float())))


class FromMemory(Objective):
    """Stage 1's noise error from the frozen encoder's memory on; `scale` is the last layer's, whose rate is lower."""

    def __init__(self, encoder: VLVEncoder, t2i: T2I, scale: float):
        super().__init__()
        self.bottleneck, self.scale = encoder.bottleneck, scale
        self._beside = (encoder, t2i)  # a tuple, so that they are no parts of the module

    def parameter_groups(self, lr: float) -> list[dict]:
        slow = {id(p) for p in self.bottleneck.projection[2].parameters()}
        learning = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in learning if id(p) not in slow], "lr": lr},
            {"params": [p for p in learning if id(p) in slow], "lr": lr * self.scale},
        ]

    def forward(self, batch: dict) -> dict[str, Tensor]:
        encoder, t2i = self._beside
        return {"loss": t2i.noise_loss(batch["latents"], context(encoder, batch["memory"]), draws=2)}


def train(
    point: Point, encoder: VLVEncoder, scale: float, t2i: T2I, memory: Tensor, cache: Tensor, settings: TrainConfig,
    run: Path,
) -> Trainer:  # fmt: skip
    """Teach the new parts to draw the first `point.images` scenes; resumes."""
    with World.start("cpu") as world:
        trainer = Trainer(point.name, run, settings, FromMemory(encoder, t2i, scale), world)
        trainer.fit(
            {"memory": memory[p.seeds], "latents": cache[p.seeds].float(), "position": p.position}
            for p in data.passes(trainer.images, settings.batch, settings.batch, point.images)
        )
        trainer.weights()
    return trainer


@torch.inference_mode()
def noise(t2i: T2I, cache: Tensor, contexts: Tensor) -> float:
    """The noise error of the first held-out scenes, over the same noises and time steps for every point."""
    torch.manual_seed(1)
    parts = zip(cache.split(CHUNK), contexts[: len(cache)].split(CHUNK), strict=True)
    losses = [t2i.noise_loss(x.float(), c).item() * len(x) for x, c in parts]
    return sum(losses) / len(cache)


@torch.inference_mode()
def contexts_of(encoder: VLVEncoder, memory: Tensor) -> Tensor:
    return torch.cat([context(encoder, part) for part in memory.split(CHUNK)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bottleneck", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage1", required=True, help="checkpoint folder with t2i/")
    parser.add_argument("--run", type=Path, required=True, help="folder of caches and saves; resumed")
    parser.add_argument("--out", type=Path, help="JSON file of the results (also printed)")
    parser.add_argument("--queries", type=int, nargs="+", default=[8, 32, 2, 16, 77], metavar="N")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 512, 4096], metavar="N", help="data sizes")
    parser.add_argument("--pool", type=int, default=16_384, help="different images for the curve over queries")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="images a step, each with two noises")
    parser.add_argument("--probe", type=int, default=8000, help="scenes that the probe learns from")
    parser.add_argument("--held-out", type=int, default=1000)
    args = parser.parse_args()

    checkpoint = Checkpoint.open(args.stage1)
    run = args.run / checkpoint.hash  # what one checkpoint's features gave is no other's
    run.mkdir(parents=True, exist_ok=True)
    trained, t2i = checkpoint.load_encoder(), T2I.load(checkpoint.t2i)
    t2i.unet.to(memory_format=torch.channels_last)
    width = trained.config.queries
    settings = replace(
        STAGE1["tiny"], steps=args.steps, batch=args.batch, micro_batch=args.batch, warmup=50, save_every=50
    )
    points = [Point(q, args.pool, args.steps, args.batch) for q in args.queries]
    points += [Point(width, n, args.steps, args.batch) for n in args.images]
    ranges = {
        "train": range(args.pool),
        "probe": range(PROBE, PROBE + args.probe),
        "held-out": range(scenes.HELD_OUT, scenes.HELD_OUT + args.held_out),
    }
    memory = {name: memories(trained, seeds, run / f"memory-{name}-{len(seeds)}.pt") for name, seeds in ranges.items()}
    truth = {name: attribute_probe.labels([scenes.sample(s) for s in ranges[name]]) for name in ("probe", "held-out")}
    cache = scene_latents(t2i, args.pool, run)
    with torch.inference_mode():
        held_out = torch.cat(
            [t2i.encode_images(data.images(ranges["held-out"][:NOISE][i : i + CHUNK]), sample=False)
             for i in range(0, min(NOISE, args.held_out), CHUNK)]
        )  # fmt: skip
    results = {
        "command": command_line("benchmarks.bottleneck"),
        "kind": "bottleneck",
        "model": checkpoint.hash,
        "machine": machine.describe() | {"threads": torch.get_num_threads()},
        "what": __doc__.split("\n\n")[2].replace("\n", " "),
        "settings": {"steps": args.steps, "batch": settings.batch, "noise_draws": 2, "lr": settings.lr}
        | {"probe_scenes": args.probe, "held_out_scenes": args.held_out, "noise_scenes": len(held_out)}
        | {"text_positions": width},
        "points": [],
    }
    for point in points:
        file = run / f"{point.name}.result.json"
        if not file.exists():
            encoder, scale = fresh(trained, t2i, point.queries)
            trainer = train(point, encoder, scale, t2i, memory["train"], cache, settings, run)
            read = {name: contexts_of(encoder, memory[name]) for name in ("probe", "held-out")}
            probe = attribute_probe.fit(read["probe"], truth["probe"])
            found = {
                "queries": point.queries,
                "images": point.images,
                "noise_error": noise(t2i, held_out, read["held-out"]),
                "noise_error_shuffled": noise(t2i, held_out, read["held-out"].roll(1, 0)),
                "training_noise_error": json.loads((run / f"{point.name}.json").read_text())["history"][-1]["loss"],
                "right": attribute_probe.compare(probe.predict(read["held-out"]), truth["held-out"]),
                "interpolated_positions": point.queries > width,
                "training_seconds": round(trainer.seconds, 1),
            }
            file.write_text(json.dumps(found))
        results["points"] = sorted(
            [*results["points"], json.loads(file.read_text())], key=lambda p: (p["queries"], p["images"])
        )
        if args.out:  # as far as it has come
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["points"]), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
