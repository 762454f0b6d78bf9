"""Scores of predicted boxes: intersection over union, and the distance of centres."""

from __future__ import annotations

import torch
from torch import Tensor


def score(predicted: Tensor, placed: Tensor | None = None, *, boxes: Tensor, present: Tensor) -> dict[str, float]:
    """Return the mean IoU over the objects that are present (0 where one is not placed), and the centre error.

    predicted, boxes: [..., 4] as left, top, right, bottom in shares of the image's sides; placed, present: bool [...];
    `placed` None: a box of everything is predicted. The centre error is the mean over the objects that are placed, in
    shares of the side; None where none is.
    """
    placed = torch.ones_like(present) if placed is None else placed
    corner = torch.minimum(predicted[..., 2:], boxes[..., 2:]) - torch.maximum(predicted[..., :2], boxes[..., :2])
    intersection = corner.clamp_min(0).prod(-1)
    area = lambda b: (b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1)  # noqa: E731
    iou = intersection / (area(predicted) + area(boxes) - intersection).clamp_min(1e-9)
    centre = lambda b: (b[..., :2] + b[..., 2:]) / 2  # noqa: E731
    error = (centre(predicted) - centre(boxes)).norm(dim=-1)
    both = present & placed
    return {
        "iou": (iou * placed)[present].mean().item(),
        "centre_error": error[both].mean().item() if both.any() else None,
        "placed": both.sum().item() / present.sum().item(),
        "objects": present.sum().item(),
    }
