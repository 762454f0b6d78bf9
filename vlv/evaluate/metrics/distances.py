"""How far drawn pictures are from the originals: distances of feature sets, and of pairs.

Fréchet and polynomial-kernel distances are torchmetrics'; they get ready-made features, so that nothing here needs
torchvision. The Gaussian-kernel distance of CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is not among them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper's reference
ROWS = 1024  # of a kernel matrix at a time


class _Ready(nn.Identity):
    """In the place of torchmetrics' Inception: what comes in are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width


def distances(real: Tensor, drawn: Tensor, subset: int = 1000) -> dict[str, float]:
    """All distances of feature sets [N, D] whose rows are pairs.

    frechet: FID where the features are Inception's. kernel, kernel_std: KID, over 100 subsets. cmmd: CMMD where they
    are CLIP's. cosine: the mean similarity of a picture and its original.
    """
    if real.shape != drawn.shape or len(real) < 2:
        raise ValueError(f"{list(real.shape)} and {list(drawn.shape)}: not two equal sets of at least 2 pictures")
    mean, deviation = kernel(real, drawn, subset)
    return {
        "frechet": frechet(real, drawn),
        "kernel": mean,
        "kernel_std": deviation,
        "cmmd": cmmd(real, drawn),
        "cosine": cosine_similarity(real, drawn, dim=1).mean().item(),
    }


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets [N, D] (Heusel et al. 2017), in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Ready(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return metric.compute().item()


def kernel(real: Tensor, drawn: Tensor, subset: int = 1000) -> tuple[float, float]:
    """Mean and deviation over subsets of the unbiased MMD² with a cubic kernel (Bińkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset, len(real), len(drawn))
    with warnings.catch_warnings(action="ignore"):  # it says that it keeps all features: they are here anyway
        metric = KernelInceptionDistance(_Ready(real.shape[1]), subsets=100, subset_size=size, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def cmmd(real: Tensor, drawn: Tensor) -> float:
    """CMMD of two feature sets [N, D]: MMD² of unit vectors with a Gaussian kernel, times 1000, as published."""
    real, drawn = normalize(real.double(), dim=1), normalize(drawn.double(), dim=1)
    means = [_gaussian(a, b) for a, b in ((real, real), (drawn, drawn), (real, drawn))]
    return CMMD_SCALE * (means[0] + means[1] - 2 * means[2])


def _gaussian(a: Tensor, b: Tensor) -> float:
    """The mean of the kernel over all pairs of rows."""
    total = 0.0
    for part in a.split(ROWS):
        squares = part.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * part @ b.T
        total += torch.exp(-squares / (2 * CMMD_SIGMA**2)).sum().item()
    return total / (len(a) * len(b))
