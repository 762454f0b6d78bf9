"""Pictures drawn from embeddings or captions against the originals: FID, KID, CMMD, similarity, LPIPS.

    python -m vlv.evaluate images PHOTOS --ckpt DIR --guidance 1 2 4 --net inception=inception-2015-12-05.pt \\
        --net clip=CLIP_DIR --net dino=DINOV2_DIR --lpips vgg16.safetensors --work drawn -o images.json
    python -m vlv.evaluate images PHOTOS --captions captions.jsonl --t2i SD_DIR --net clip=CLIP_DIR -o captions.json
    python -m vlv.evaluate images PHOTOS --drawn FOLDER --net clip=CLIP_DIR

Every --net NAME=PATH gives, of its features: `frechet` (FID with Inception), `kernel` (KID), `cmmd` (CMMD with CLIP)
and `cosine`. --shuffled adds two controls: the same pictures beside other originals (the distances of sets stay the
same, those of pairs do not), and pictures drawn from embeddings whose every token is another image's.
Pictures are kept in --work; a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.common import command
from vlv.diffusion.samplers import SAMPLERS
from vlv.evaluate import caption_files, cli

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = 8  # pictures that the report shows of each set


def parser() -> cli.Parser:
    p = cli.Parser("images", __doc__)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="originals: files, or folders of them")
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint whose embeddings are drawn from")
    p.add_argument("--captions", type=Path, metavar="FILE", help="draw from these captions instead")
    p.add_argument("--drawn", type=Path, metavar="DIR", help="pictures that are drawn already, named as the originals")
    p.add_argument("--t2i", type=Path, metavar="DIR", help="diffusers folder that draws (default: the checkpoint's)")
    p.add_argument("--net", type=cli.named, action="append", default=[], metavar="NAME=PATH", help="a feature net")
    p.add_argument("--lpips", type=Path, metavar="FILE", help="VGG16's weights, for LPIPS")
    p.add_argument("--guidance", type=float, nargs="+", default=[2.0], metavar="G", help="the sweep (2.0)")
    p.add_argument("--shuffled", action="store_true", help="controls, at the first guidance: see below")
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    p.add_argument("--steps", type=command.positive, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the first picture's noise; the next one's is 1 higher")
    p.add_argument("--batch", type=command.positive, default=32, help="pictures drawn together")
    p.add_argument("--limit", type=command.positive, metavar="N", help="only the first N originals")
    p.add_argument("--work", type=Path, default=Path("drawn"), metavar="DIR", help="folder of drawn pictures")
    p.add_argument("--device", default="cpu", help="torch device (cpu)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(parser(), lambda args: _evaluate(args, argv), argv)


def _evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    _check(args)
    command.hush()
    originals = _originals(args)
    results = cli.results("images", argv) | {"pictures": len(originals)}
    measure = Measure(args, originals)
    rows, examples = [], [{"label": "original", "files": [str(f) for f in list(originals.values())[:EXAMPLES]]}]
    for label, folder in _sets(args, originals):
        files = [folder / f"{name}.png" for name in originals]
        rows.append(label | measure(files))
        cli.say(json.dumps(rows[-1]))
        title = "drawn" if label["guidance"] is None else f"guidance {label['guidance']:g} {label['control']}".strip()
        examples.append({"label": title, "files": list(map(str, files[:EXAMPLES]))})
        if args.shuffled and label == {"guidance": args.guidance[0], "control": ""}:
            rows.append(label | {"control": "another image's embeddings"} | measure(files[-1:] + files[:-1]))
        cli.write(results | {"rows": rows, "examples": examples}, args.out, show=False)
    cli.write(results | {"rows": rows, "examples": examples}, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    if sum(map(bool, (args.captions, args.drawn))) > 1 or not (args.ckpt or args.drawn or args.captions):
        raise cli.Misuse("give one of --ckpt (its embeddings draw), --captions with --t2i, or --drawn")
    if args.captions and not (args.t2i or args.ckpt):
        raise cli.Misuse("--captions needs --t2i, the diffusers folder that draws from them (or --ckpt, for its own)")
    if args.shuffled and (args.captions or args.drawn):
        raise cli.Misuse("--shuffled mixes embeddings: it goes with --ckpt alone")
    if not args.net and not args.lpips:
        raise cli.Misuse("give a feature net (--net clip=DIR ...) or --lpips FILE: nothing would be measured")
    if len({name for name, _ in args.net}) < len(args.net):
        raise cli.Misuse("two --net have the same name")


def _originals(args: argparse.Namespace) -> dict[str, Path]:
    """Files by key, sorted; with captions only those that have one."""
    found = caption_files.pictures(args.images)
    if args.captions:
        captions = caption_files.read(args.captions)
        found = {name: found[name] for name in caption_files.common({str(args.captions): captions}, set(found))}
    return dict(list(found.items())[: args.limit])


def _crops(files: list[Path], size: int) -> Tensor:
    """uint8 [B, 3, size, size]. Raises ImageError."""
    import numpy as np
    import torch

    from vlv.data.image import ImageError, load_crop

    crops = []
    for file in files:
        try:
            crops.append(load_crop(file, size))
        except ImageError as error:
            raise ImageError(error.kind, f"{file}: {error}") from error
    return torch.from_numpy(np.stack(crops))


def _sets(args: argparse.Namespace, originals: dict[str, Path]):
    """Labels and folders of the pictures that are to be compared with the originals, each when it is complete."""
    from vlv.checkpoints.published import resolve
    from vlv.evaluate import reconstructions as drawing

    names, files = list(originals), list(originals.values())
    if args.drawn:
        yield {"guidance": None, "control": ""}, args.drawn
        return
    checkpoint = resolve(args.ckpt) if args.ckpt else None
    t2i = args.t2i or checkpoint.t2i
    settings = {
        "model": checkpoint.hash if checkpoint else None,
        "t2i": str(t2i),
        "sampler": args.sampler,
        "steps": args.steps,
        "seeds from": args.seed,
        "batch": args.batch,
        "names": names,
    }
    if args.captions:
        texts = caption_files.read(args.captions)
        captions = [texts[name] for name in names]
        # what they say, not the file's name: it may hold others by now
        settings["captions"] = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:12]
        draw = drawing.from_captions(t2i, captions, args.device)
    else:
        size = checkpoint.config.image_size
        draw = drawing.from_images(t2i, checkpoint.load_encoder(), lambda part: _crops(files[part], size), args.device)
    for guidance in args.guidance:
        options = {"steps": args.steps, "guidance": guidance, "seed": args.seed, "sampler": args.sampler}
        for control in ["", "mixed embeddings"] if args.shuffled and guidance == args.guidance[0] else [""]:
            folder = args.work / f"{'mixed' if control else 'drawn'}-{guidance:g}"
            part = functools.partial(draw, mixed=bool(control), **options)
            drawing.draw_all(folder, names, args.batch, settings | {"guidance": guidance}, part)
            yield {"guidance": guidance, "control": control}, folder


class Measure:
    """The distances that were asked for, of picture sets to the originals; holds features, and a batch of pictures."""

    def __init__(self, args: argparse.Namespace, originals: dict[str, Path]):
        from vlv.evaluate.metrics.features import FeatureNet
        from vlv.evaluate.metrics.lpips import LPIPS

        self.nets = {name: FeatureNet(path, args.device) for name, path in args.net}
        self.lpips = LPIPS.load(args.lpips) if args.lpips else None
        self.originals, self.batch, self.size = list(originals.values()), args.batch, None

    def __call__(self, files: list[Path]) -> dict:
        """All figures of drawn pictures, in the originals' order."""
        from vlv.evaluate import reconstructions as drawing
        from vlv.evaluate.metrics.distances import distances

        if self.size is None:
            self.size = drawing.read(files[:1]).shape[-1]
            self.real, _ = self._walk(lambda part: _crops(self.originals[part], self.size))
            for name, features in self.real.items():
                if len(features) <= features.shape[1]:
                    cli.say(f"{name}: {len(features)} pictures for {features.shape[1]} features: `frechet` is biased")
        drawn, lpips = self._walk(lambda part: drawing.read(files[part], self.size), compare=self.lpips is not None)
        found = {name: distances(self.real[name], drawn[name]) for name in self.nets}
        return found | ({"lpips": sum(lpips) / len(lpips)} if lpips else {})

    def _walk(self, pictures: Callable[[slice], Tensor], compare: bool = False) -> tuple[dict, list[float]]:
        """Features [N, D] by net, and LPIPS to each original, of pictures that come a batch at a time."""
        import torch

        features, lpips = {name: [] for name in self.nets}, []
        for i in range(0, len(self.originals), self.batch):
            part = slice(i, i + self.batch)
            batch = pictures(part)
            for name, net in self.nets.items():
                features[name].append(net(batch))
            if compare:
                lpips += self.lpips(_crops(self.originals[part], self.size), batch).tolist()
        return {name: torch.cat(parts) for name, parts in features.items()}, lpips
