"""Score captions and reconstructions of held-out synthetic scenes, whose content is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlv.common.command import say
from vlv.data.scenes import KINDS, Scene, judge
from vlv.diffusion.t2i import T2I
from vlv.evaluate.synthetic.scene_net import presence, train
from vlv.model.captioner import Captioner
from vlv.model.encoder import VLVEncoder


def score_captions(captioner: Captioner, scenes: list[Scene], images: Tensor, batch: int) -> dict:
    """Return the shares of scenes whose greedy, cleaned caption is right in each kind of claim.

    `images`: uint8 [B, 3, S, S], of the scenes.
    """
    texts = []
    for i in range(0, len(scenes), batch):
        texts += captioner.captions(images[i : i + batch], max_new_tokens=96)
    return {**true_claims(texts, scenes), "samples": texts[:8]}


def true_claims(texts: list[str], scenes: list[Scene]) -> dict[str, float]:
    """Return the shares of scenes whose caption is right in each kind of claim; relations of those with several."""
    verdicts = [judge(text, scene) for text, scene in zip(texts, scenes, strict=True)]
    total = len(scenes)
    several = [v for v, s in zip(verdicts, scenes, strict=True) if len(s.things) > 1]
    return {
        "objects": sum(v.objects for v in verdicts) / total,
        "count": sum(v.count for v in verdicts) / total,
        "background": sum(v.background for v in verdicts) / total,
        "sizes": sum(v.sizes for v in verdicts) / total,
        "places": sum(v.places for v in verdicts) / total,
        "relation": sum(v.relations[1] > 0 and v.relations[0] == v.relations[1] for v in several) / len(several),
    }


def classifier() -> nn.Module:
    """Return a small untrained network: float32 [B, 3, 64, 64] -> logits of the kinds present [B, kinds]."""

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    net = nn.Sequential(*layer(3, 32), *layer(32, 64), *layer(64, 128), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    return net.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, len(KINDS))])


def share_named(logits: Tensor, truth: Tensor) -> float:
    """Return the share of objects among the k likeliest kinds, k being the scene's true count; both [B, kinds]."""
    hits = 0
    for row, labels in zip(logits, truth, strict=True):
        top = row.topk(int(labels.sum())).indices
        hits += labels[top].sum().item()
    return hits / truth.sum().item()


def score_reconstructions(encoder: VLVEncoder, t2i: T2I, scenes: list[Scene], images: Tensor, batch: int) -> dict:
    """Return how many objects a classifier finds in the reconstructions, and in those of other scenes' embeddings.

    `images`: uint8 [B, 3, S, S], of the scenes.
    """
    net, truth = train(classifier), presence(scenes)
    parts = []
    for i in range(0, len(scenes), batch):
        with torch.inference_mode():
            context = encoder.context(images[i : i + batch])
        parts.append(t2i.reconstruct(context, steps=50, guidance=2.0, seed=0))
        say(f"reconstructed {min(i + batch, len(scenes))}/{len(scenes)}")
    reconstructions = torch.cat(parts)
    with torch.inference_mode():
        real, found = (net(x / 127.5 - 1) for x in (images, reconstructions))
    return {
        "objects_named": share_named(found, truth),
        "objects_named_shuffled": share_named(found, truth.roll(1, 0)),
        "objects_named_in_real_scenes": share_named(real, truth),
        "pixel_rmse": rmse(reconstructions, images),
        "pixel_rmse_shuffled": rmse(reconstructions, images.roll(1, 0)),
    }


def rmse(images: Tensor, others: Tensor) -> float:
    """Return the root mean square difference of uint8 images in shares of 255."""
    return (images / 255 - others / 255).square().mean().sqrt().item()
