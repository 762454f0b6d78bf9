"""Pictures from pictures, through the embeddings alone: how much does the bottleneck carry?

    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out            # out/cat.png, out/dog.png, out/grid.png
    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --interpolate 7
    python -m vlv.reconstruct cat.jpg dog.jpg --ckpt DIR -o out --mix 0.5
    python -m vlv.reconstruct --captions captions.jsonl --t2i SD_DIR -o out

The frozen text-to-image model draws from the encoder's context (50 steps, guidance 2.0, as published).
With --captions it draws from captions, the way the paper judges them: any diffusers folder will do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.checkpoints.folder import CheckpointError
from vlv.common.command import Parser, hush
from vlv.data.image import EXTENSIONS, ImageError, load_crop, png
from vlv.diffusion.reconstruction import CaptionReconstructor, Reconstructor, TorchReconstructor
from vlv.diffusion.samplers import SAMPLERS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vlv.checkpoints.folder import Checkpoint

COLUMNS = 8  # pictures a row of a grid without originals


def open_torch(args: argparse.Namespace, checkpoint: Checkpoint) -> Reconstructor:
    """PyTorch's drawer for --t2i (default: the checkpoint's own) and --device."""
    return TorchReconstructor(checkpoint.load_encoder(), args.t2i or checkpoint.t2i, args.device)


Open = Callable[[argparse.Namespace, "Checkpoint"], Reconstructor]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(arguments(parser(), argv))


def run(args: argparse.Namespace, open_drawer: Open = open_torch) -> int:
    """Run the command on parsed flags, with another drawer than PyTorch's if need be; returns its exit code."""
    try:
        hush()
        args.output.mkdir(parents=True, exist_ok=True)
        pictures, originals = _from_captions(args) if args.captions else _from_images(args, open_drawer)
        for name, picture in {**pictures, "grid": grid(list(pictures.values()), originals)}.items():
            (args.output / f"{name}.png").write_bytes(png(picture))
    except (CheckpointError, ImageError, OSError, ValueError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output / "grid.png")
    return 0


def parser(prog: str = "python -m vlv.reconstruct", doc: str = __doc__) -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    p = Parser(prog=prog, description=doc)
    p.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files, or folders of them")
    p.add_argument("--ckpt", metavar="DIR", help="checkpoint folder, published weights, or a hub id")
    p.add_argument("--captions", type=Path, metavar="JSONL", help="draw from these captions instead of images")
    p.add_argument("--t2i", type=Path, metavar="DIR", help="diffusers folder to draw with (default: the checkpoint's)")
    p.add_argument("-o", "--output", type=Path, default=Path("reconstructions"), metavar="DIR")
    p.add_argument("--sampler", choices=list(SAMPLERS), default="ddim")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance; 1 turns it off")
    p.add_argument("--seed", type=int, default=0, help="of the initial noise, the same for every picture")
    p.add_argument("--batch", type=int, default=8, help="pictures drawn together")
    p.add_argument("--interpolate", type=int, metavar="N", help="N pictures from the first image to the second")
    p.add_argument("--mix", type=float, metavar="SHARE", help="this share of the first's embeddings, then the second's")
    p.add_argument("--device", default="cpu", help="torch device (cpu)")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def arguments(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parsed and found to go together; ends the process with code 2 where they do not."""
    args = p.parse_args(argv)
    if bool(args.captions) == bool(args.images):
        p.error("give either images or --captions")
    if not args.ckpt and (args.images or not args.t2i):
        p.error("--ckpt is needed (with --captions, --t2i will do)")
    if args.interpolate is not None and args.mix is not None:
        p.error("--interpolate and --mix exclude each other")
    if (args.interpolate is not None or args.mix is not None) and len(args.images) != 2:
        p.error(f"--interpolate and --mix take two image files, not {len(args.images)}")
    if args.interpolate is not None and args.interpolate < 2:
        p.error(f"--interpolate {args.interpolate}: at least 2, the two ends")
    if args.mix is not None and not 0 <= args.mix <= 1:
        p.error(f"--mix {args.mix}: a share from 0 to 1")
    if args.steps < 1 or args.batch < 1:
        p.error(f"--steps {args.steps} --batch {args.batch}: at least 1 each")
    return args


def interpolate(first: Tensor, second: Tensor, count: int) -> Tensor:
    """`count` contexts on the straight line between two [N, C]: [count, N, C], both ends included."""
    import torch

    weights = torch.linspace(0, 1, count, device=first.device, dtype=first.dtype)[:, None, None]
    return torch.lerp(first[None], second[None], weights)


def mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The first `share` of one context's tokens, then the second context's remaining ones: [N, C].

    The paper composes two images' embeddings so (compositional generation); the length stays what the
    unconditional context has.
    """
    import torch

    cut = round(share * len(first))
    return torch.cat([first[:cut], second[cut:]])


def grid(pictures: list[np.ndarray], originals: list[np.ndarray]) -> np.ndarray:
    """uint8 [3, H, W]: each original above its picture; pictures alone in rows of COLUMNS."""
    import numpy as np

    if len(originals) == len(pictures):
        return np.concatenate([np.concatenate(originals, 2), np.concatenate(pictures, 2)], 1)
    strip = [*originals[:1], *pictures, *originals[1:]]
    blank = np.full_like(strip[0], 255)
    columns = min(COLUMNS, len(strip)) if not originals else len(strip)
    strip += [blank] * (-len(strip) % columns)
    return np.concatenate([np.concatenate(strip[i : i + columns], 2) for i in range(0, len(strip), columns)], 1)


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in EXTENSIONS)
        if not found:
            raise ValueError(f"no images in {path}: looked for {' '.join(sorted(EXTENSIONS))}")
        yield from found


def _from_images(args: argparse.Namespace, open_drawer: Open) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    import numpy as np
    import torch

    from vlv.checkpoints.published import resolve

    checkpoint = resolve(args.ckpt)
    files, crops = list(_files(args.images)), []
    if args.interpolate:
        names = [f"between-{i}" for i in range(args.interpolate)]
    else:
        names = ["mix"] if args.mix is not None else _unique([file.stem for file in files])
    given = {file.resolve() for file in files}
    if any((args.output / f"{name}.png").resolve() in given for name in [*names, "grid"]):
        raise ValueError(f"--output {args.output} would overwrite the images themselves: choose another folder")
    for file in files:
        try:
            crops.append(load_crop(file, checkpoint.config.image_size))
        except ImageError as error:
            raise ImageError(error.kind, f"{file}: {error}") from error
    drawer = open_drawer(args, checkpoint)
    stacks = [np.stack(crops[i : i + args.batch]) for i in range(0, len(crops), args.batch)]
    contexts = torch.cat([drawer.context(torch.from_numpy(stack)) for stack in stacks])
    if args.interpolate:
        contexts = interpolate(*contexts, args.interpolate)
    elif args.mix is not None:
        contexts = mix(*contexts, args.mix)[None]
    pictures = []
    for i in range(0, len(contexts), args.batch):
        print(f"drawing {i} of {len(contexts)}", file=sys.stderr, flush=True)
        batch = contexts[i : i + args.batch]
        pictures.extend(drawer.reconstruct(batch, args.steps, args.guidance, args.seed, args.sampler).cpu().numpy())
    return dict(zip(names, pictures, strict=True)), crops


def _from_captions(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], list]:
    from vlv.checkpoints.published import resolve

    with args.captions.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    if not records or not all("id" in r and "caption" in r for r in records):
        raise ValueError(
            f"{args.captions} holds no records with an id and a caption, as serve.vllm_caption writes them"
        )
    drawer = CaptionReconstructor(Path(args.t2i or resolve(args.ckpt).t2i), args.device)
    pictures = []
    for i in range(0, len(records), args.batch):
        print(f"drawing {i} of {len(records)}", file=sys.stderr, flush=True)
        captions = [r["caption"] for r in records[i : i + args.batch]]
        pictures.extend(drawer.draw(captions, args.steps, args.guidance, args.seed, args.sampler).numpy())
    names = _unique([Path(r["id"]).stem for r in records])
    return dict(zip(names, pictures, strict=True)), []


def _unique(names: list[str]) -> list[str]:
    """The names, later ones of the same name numbered; "grid" is the overview's."""
    made = {"grid": None}
    for name in names:
        numbered = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        made[next(n for n in numbered if n not in made)] = None
    return list(made)[1:]


if __name__ == "__main__":
    sys.exit(main())
