"""A linear probe of embeddings: which objects, sizes, places and background of a synthetic scene do they hold?

Judge-free: the scene that was encoded is known exactly. Each quadrant holds one object of a kind and size, or
nothing, so five softmaxes over a linear map of the flattened embeddings say everything about a scene.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlv.data import scenes

QUADRANTS = 4
CONTENTS = 1 + len(scenes.KINDS) * len(scenes.SIZES)  # of a quadrant: 0 is empty


def labels(things: list[scenes.Scene]) -> Tensor:
    """Return int64 [B, 5]: what each quadrant holds (0 or 1 + 2 * kind + size), and the background's number."""
    rows = torch.zeros(len(things), QUADRANTS + 1, dtype=torch.long)
    for row, scene in zip(rows, things, strict=True):
        row[-1] = list(scenes.BACKGROUNDS).index(scene.background)
        for t in scene.things:
            size = list(scenes.SIZES).index(t.size)
            row[2 * t.row + t.column] = 1 + len(scenes.SIZES) * scenes.KINDS.index(t.kind) + size
    return rows


def compare(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the shares of scenes in which a claim is right; both int64 [B, 5] as `labels` gives them.

    objects: exactly the kinds that are there; places: and each in its quadrant; sizes: and each of its size;
    background; everything: all of these at once.
    """
    kinds = lambda rows: (rows[:, :-1] + 1) // len(scenes.SIZES)  # noqa: E731  0 is empty
    objects = (kinds(predicted).sort(1).values == kinds(truth).sort(1).values).all(1)
    places = (kinds(predicted) == kinds(truth)).all(1)
    sizes = (predicted[:, :-1] == truth[:, :-1]).all(1)
    background = predicted[:, -1] == truth[:, -1]
    right = {"objects": objects, "places": places, "sizes": sizes, "background": background}
    right["everything"] = sizes & background
    return {name: flags.float().mean().item() for name, flags in right.items()}


class Probe(nn.Module):
    """A linear map of flattened, standardised embeddings [B, N, C] to five sets of logits."""

    def __init__(self, contexts: Tensor):
        super().__init__()
        flat = contexts.flatten(1)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("scale", 1 / flat.std(0).clamp_min(1e-6))
        self.read = nn.Linear(flat.shape[1], QUADRANTS * CONTENTS + len(scenes.BACKGROUNDS))

    def forward(self, contexts: Tensor) -> list[Tensor]:
        logits = self.read((contexts.flatten(1) - self.mean) * self.scale)
        return list(logits.split([CONTENTS] * QUADRANTS + [len(scenes.BACKGROUNDS)], dim=1))

    @torch.inference_mode()
    def predict(self, contexts: Tensor) -> Tensor:
        """Return the likeliest labels: int64 [B, 5]."""
        return torch.stack([logits.argmax(1) for logits in self(contexts)], dim=1)


def fit(contexts: Tensor, truth: Tensor, epochs: int = 20, batch: int = 256, lr: float = 1e-3) -> Probe:
    """Train a probe on embeddings [B, N, C] and their labels [B, 5]; deterministic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(contexts)
        nn.init.zeros_(probe.read.weight)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.05)
        steps = epochs * -(-len(contexts) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(contexts)).split(batch):
                parts = zip(probe(contexts[chosen]), truth[chosen].T, strict=True)
                loss = sum(cross_entropy(logits, column) for logits, column in parts)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return probe.eval()
