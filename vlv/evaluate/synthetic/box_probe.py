"""A small probe that reads boxes out of embeddings: one question a kind, one look at the embeddings, one linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Probe(nn.Module):
    """Embeddings [B, N, C] -> a box for each of K kinds [B, K, 4]: left, top, right, bottom, as shares of the side.

    Each kind asks the embeddings, by a single head of attention, where it is. It answers for every kind, also for one
    that is not there; whether it is, the probe is not asked.
    """

    def __init__(self, contexts: Tensor, kinds: int, width: int = 64):
        super().__init__()
        channels = contexts.shape[2]
        self.register_buffer("mean", contexts.mean((0, 1)))
        self.register_buffer("scale", 1 / contexts.std((0, 1)).clamp_min(1e-6))
        self.places = nn.Parameter(torch.zeros(contexts.shape[1], channels))
        self.questions = nn.Parameter(torch.randn(kinds, width))
        self.keys, self.values = nn.Linear(channels, width), nn.Linear(channels, kinds * 8)
        self.read = nn.Linear(8, 4)
        self.kinds = kinds

    def forward(self, contexts: Tensor) -> Tensor:
        x = (contexts - self.mean) * self.scale + self.places
        look = (self.questions @ self.keys(x).transpose(1, 2) / self.questions.shape[1] ** 0.5).softmax(-1)  # [B, K, N]
        values = self.values(x).unflatten(2, (self.kinds, 8))  # [B, N, K, 8]
        box = self.read(torch.einsum("bkn,bnkc->bkc", look, values)).sigmoid()
        centre, half = box[..., :2], box[..., 2:] / 2
        return torch.cat([centre - half, centre + half], dim=-1)


def fit(
    contexts: Tensor, boxes: Tensor, present: Tensor, steps: int = 600, batch: int = 128, lr: float = 3e-3
) -> Probe:
    """Train a probe on embeddings [B, N, C], boxes [B, K, 4] and which kinds are present [B, K]; deterministic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(contexts, boxes.shape[1])
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(contexts), (batch,))
            error = (probe(contexts[chosen]) - boxes[chosen]).abs().sum(-1)
            loss = error[present[chosen]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()
