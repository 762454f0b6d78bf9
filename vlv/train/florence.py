"""Write the start of the paper's stage 1: Florence-2's weights, the text-to-image model's CLIP layers, random queries.

    python -m vlv.train.florence --florence Florence-2-large --t2i stable-diffusion-2-1-base --out START
    python -m vlv.train.stage1 --preset paper-stage1 --ckpt START --data ...

Reads Florence-2 as Microsoft released it (names like vision_tower.convs.0.proj.weight). The queries are drawn from a
normal distribution and the projection is PyTorch's untrained one, as in the authors' code (models/VLV_stage1.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from vlv.common.command import Parser, debug_argument, positive, run_command


def write_start(florence: Path, t2i: Path, out: Path, queries: int = 77, seed: int = 0, force: bool = False):
    """Write the checkpoint folder `out`, with a link to `t2i`. Raises CheckpointError on weights of other models."""
    import torch
    from torch import nn

    from vlv.checkpoints.folder import CheckpointError
    from vlv.checkpoints.published_read import convert
    from vlv.checkpoints.tensor_files import Tensors, weight_files, write_safetensors

    vision, clip = Tensors(weight_files(florence)), Tensors(weight_files(t2i / "text_encoder"))
    bias, norm = "language_model.model.decoder.layernorm_embedding.bias", "final_layer_norm.bias"
    prefix = "text_model." if f"text_model.{norm}" in clip else ""
    if bias not in vision or prefix + norm not in clip:
        missing = f"{florence}: {bias}" if bias not in vision else f"{t2i / 'text_encoder'}: {norm}"
        expected = "Florence-2 as Microsoft released it, and Stable Diffusion"
        raise CheckpointError(f"{missing} is missing: expected {expected}")
    width, context = len(vision[bias]), len(clip[prefix + norm])
    torch.manual_seed(seed)
    projection = nn.Sequential(nn.Linear(width, context), nn.GELU(), nn.Linear(context, context))
    new = {"query_embed": torch.randn(1, queries, width)}
    new |= {f"language_proj.{name}": tensor for name, tensor in projection.state_dict().items()}
    sources = {f"model.{name}": (vision, name) for name in vision}
    sources |= {f"text_encoder.text_model.{name.removeprefix(prefix)}": (clip, name) for name in clip}
    plan = {name: tensors.metas[own] for name, (tensors, own) in sources.items()}
    plan |= {name: tensor.to("meta") for name, tensor in new.items()}

    def make(name: str) -> torch.Tensor:
        if name in new:
            return new[name].detach()
        tensors, own = sources[name]
        return tensors[own]

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        write_safetensors(Path(folder) / "model.safetensors", plan, make)
        made = convert(
            Path(folder), out, str(florence), str(t2i / "text_encoder"), t2i=t2i, dtype=torch.float32, force=force
        )
    return made


def parser() -> Parser:
    p = Parser(prog="python -m vlv.train.florence", description=__doc__, parents=[debug_argument()])
    p.add_argument("--florence", type=Path, required=True, metavar="DIR", help="folder of Florence-2")
    p.add_argument("--t2i", type=Path, required=True, metavar="DIR", help="folder of Stable Diffusion")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint folder to write; it appears when it is complete",
    )
    p.add_argument("--queries", type=positive, default=77, help="learned queries (default: 77)")
    p.add_argument("--seed", type=int, default=0, help="seed of queries and projection (default: 0)")
    p.add_argument("--force", action="store_true", help="replace what is at --out")
    return p


def work(args: argparse.Namespace) -> None:
    print(write_start(args.florence, args.t2i, args.out, args.queries, args.seed, args.force).folder)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(work, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
