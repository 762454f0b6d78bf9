"""Distances of generated images to the originals: of feature sets, and of pairs.

Fréchet and polynomial-kernel distances are torchmetrics'; they get finished features, so that nothing here needs
torchvision. The Gaussian-kernel distance of CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is computed here.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from vlv.evaluate.results import EvaluationError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper's reference
ROWS = 1024  # of a kernel matrix at a time


class _Features(nn.Identity):
    """Takes the place of torchmetrics' Inception: its inputs are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width


def distances(real: Tensor, generated: Tensor, subset: int = 1000) -> dict[str, float]:
    """Return all distances of feature sets [N, D] whose rows are pairs.

    frechet: FID where the features are Inception's. kernel: KID, over 100 subsets; kernel_std: its deviation over them,
    only if a subset is not the whole set. cmmd: CMMD where the features are CLIP's. cosine: the mean similarity of an
    image and its original. Raises EvaluationError.
    """
    if real.shape != generated.shape or len(real) < 2:
        raise EvaluationError(
            f"{list(real.shape)} and {list(generated.shape)}: not two equal sets of at least 2 images"
        )
    mean, deviation = kernel(real, generated, subset)
    return {
        "frechet": frechet(real, generated),
        "kernel": mean,
        **({"kernel_std": deviation} if len(real) > subset else {}),
        "cmmd": cmmd(real, generated),
        "cosine": cosine_similarity(real, generated, dim=1).mean().item(),
    }


def frechet(real: Tensor, generated: Tensor) -> float:
    """Return the Fréchet distance of Gaussians fitted to two feature sets [N, D] (Heusel et al. 2017); in float64."""
    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel(real: Tensor, generated: Tensor, subset: int = 1000) -> tuple[float, float]:
    """Return mean and deviation over subsets of the unbiased MMD² with a cubic kernel (Bińkowski et al. 2018)."""
    size = min(subset, len(real), len(generated))
    with warnings.catch_warnings(action="ignore"):  # it warns that it keeps all features in memory
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=100, subset_size=size, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def cmmd(real: Tensor, generated: Tensor) -> float:
    """Return the CMMD of two feature sets [N, D]: MMD² of unit vectors, Gaussian kernel, times 1000, as published."""
    real, generated = normalize(real.double(), dim=1), normalize(generated.double(), dim=1)
    means = [_gaussian(a, b) for a, b in ((real, real), (generated, generated), (real, generated))]
    return CMMD_SCALE * (means[0] + means[1] - 2 * means[2])


def _gaussian(a: Tensor, b: Tensor) -> float:
    """Return the mean of the kernel over all pairs of rows."""
    total = 0.0
    for part in a.split(ROWS):
        squares = part.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * part @ b.T
        total += torch.exp(-squares / (2 * CMMD_SIGMA**2)).sum().item()
    return total / (len(a) * len(b))
