"""A feature net of the synthetic world: a small ResNet that names the kinds in a scene, as a transformers folder.

    python -m vlv.evaluate.scene_net runs/scene-net        # a minute on two cores
    python -m vlv.evaluate images SCENES --ckpt assets/vlv-tiny --net scenes=runs/scene-net

No Inception, CLIP or DINO knows these emoji as photographs; this net does, and takes the same road as they do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from vlv.common.command import Parser, positive
from vlv.evaluate import cli

PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def presence(scenes: list):
    """Which kinds each scene shows: float32 [B, kinds] of 0 and 1."""
    import torch

    from vlv.data.scenes import KINDS

    return torch.tensor([[float(k in s.kinds) for k in KINDS] for s in scenes])


def resnet():
    """A small untrained ResNetForImageClassification of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from vlv.data.scenes import KINDS

    shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=len(KINDS)))


def train(build: Callable = resnet, steps: int = 600, batch: int = 128):
    """Train the net that `build` makes on real scenes, blurred and noised a little so that it reads shapes not edges.

    The net takes float32 [B, 3, 64, 64] from -1 to 1 and gives logits of the kinds present [B, kinds], or an object
    that has them as `logits`.
    """
    import torch
    from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits

    from vlv.data import scene_batches as data
    from vlv.data import scenes

    torch.manual_seed(0)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        seeds = data.seeds(step, batch, 2**30)
        x = data.images(seeds) / 127.5 - 1
        x = avg_pool2d(x, 3, stride=1, padding=1) if step % 2 else x
        x = x + torch.randn_like(x) * 0.1 * torch.rand(batch, 1, 1, 1)
        said = net(x)
        loss = binary_cross_entropy_with_logits(
            getattr(said, "logits", said), presence([scenes.sample(s) for s in seeds])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"scene net {step}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return net.eval()


def save(net, folder: Path) -> None:
    """Write a folder that transformers' AutoModel and AutoImageProcessor load."""
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(prog="python -m vlv.evaluate.scene_net", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return cli.run(parser, _make, argv)


def _make(args: argparse.Namespace) -> int:
    args.folder.mkdir(parents=True, exist_ok=True)  # before the training
    save(train(steps=args.steps), args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
