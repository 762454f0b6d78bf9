"""Train a small ResNet that names the kinds of objects in a synthetic scene, as a transformers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits
from transformers import ResNetConfig, ResNetForImageClassification

from vlv.common.command import say
from vlv.data import scene_batches, scenes
from vlv.data.scenes import KINDS, Scene

PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def presence(scenes: list[Scene]) -> Tensor:
    """Return which kinds each scene shows: float32 [B, kinds] of 0 and 1."""
    return torch.tensor([[float(k in s.kinds) for k in KINDS] for s in scenes])


def resnet() -> ResNetForImageClassification:
    """Return a small untrained network."""
    shape = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=len(KINDS)))


def train(build: Callable[[], nn.Module] = resnet, steps: int = 600, batch: int = 128) -> nn.Module:
    """Train the net that `build` makes on real scenes, half of them blurred, with noise, so that it learns shapes.

    The net takes float32 [B, 3, 64, 64] from -1 to 1 and gives logits of the kinds present [B, kinds], or an object
    that has them as `logits`.
    """
    torch.manual_seed(0)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        seeds = scene_batches.seeds(step, batch, 2**30)
        x = scene_batches.images(seeds) / 127.5 - 1
        x = avg_pool2d(x, 3, stride=1, padding=1) if step % 2 else x
        x = x + torch.randn_like(x) * 0.1 * torch.rand(batch, 1, 1, 1)
        output = net(x)
        loss = binary_cross_entropy_with_logits(
            getattr(output, "logits", output), presence([scenes.sample(s) for s in seeds])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"scene net {step}/{steps} loss {loss.item():.4f}")
    return net.eval()


def save(net: nn.Module, folder: Path) -> None:
    """Write a folder that transformers' AutoModel and AutoImageProcessor load."""
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION, indent=1) + "\n")
