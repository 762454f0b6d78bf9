"""Distances of feature sets against closed forms, and LPIPS against torchmetrics' own."""

import math

import pytest
import torch

pytest.importorskip("torchmetrics", reason="pip install --no-deps torchmetrics lightning-utilities")

from vlv.evaluate.metrics import distances
from vlv.evaluate.metrics.lpips import LPIPS, vgg16
from vlv.evaluate.results import EvaluationError


def whitened(count, width, seed):
    """Samples whose mean is 0 and covariance the identity, exactly: the closed forms then hold without noise."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


def test_frechet_of_gaussians():
    """|m|² + tr(A + B - 2 (AB)^½): for covariances I and diag(s²) that is |m|² + sum (1 - s)²."""
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0, 0.5])
    a, b = whitened(500, 4, 0), whitened(500, 4, 1) * scale + shift
    exact = shift.square().sum() + (1 - scale).square().sum()
    # torchmetrics sums x xᵀ in float64 and takes the root of eigenvalues: the root halves the digits that are left
    assert distances.frechet(a, b) == pytest.approx(exact.item(), abs=1e-6)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_by_hand():
    """Two points each, one feature: the cubic kernel (xy + 1)³ over the pairs, without the diagonal."""
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    k = lambda x, y: (x * y + 1) ** 3  # noqa: E731
    exact = k(1, 2) + k(0, 3) - 2 * (k(1, 0) + k(1, 3) + k(2, 0) + k(2, 3)) / 4
    mean, deviation = distances.kernel(a, b)
    assert mean == pytest.approx(exact, rel=1e-6) and deviation == pytest.approx(0, abs=1e-5)


def test_kernel_is_the_same_every_time_and_leaves_the_random_state():
    a, b = torch.randn(40, 3), torch.randn(40, 3) + 1
    state = torch.get_rng_state()
    assert distances.kernel(a, b, subset=10) == distances.kernel(a, b, subset=10)
    assert torch.equal(state, torch.get_rng_state())


def test_cmmd_by_hand(monkeypatch):
    """All of one set at (1, 0), all of the other at (0, 1): squared distance 2, so 1000 * 2 (1 - exp(-2 / 200))."""
    a, b = torch.tensor([[3.0, 0.0]]).repeat(5, 1), torch.tensor([[0.0, 0.1]]).repeat(7, 1)
    exact = 1000 * 2 * (1 - math.exp(-2 / (2 * 10**2)))
    assert distances.cmmd(a, b) == pytest.approx(exact, rel=1e-9)
    monkeypatch.setattr(distances, "ROWS", 2)  # in several parts it is the same
    assert distances.cmmd(a, b) == pytest.approx(exact, rel=1e-9)
    assert distances.cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_all_distances_of_pairs():
    a = torch.eye(4)
    assert distances.distances(a, a)["cosine"] == 1
    assert distances.distances(a, a.roll(1, 0))["cosine"] == 0
    with pytest.raises(ValueError, match="two equal sets"):
        distances.distances(a, a[:3])
    with pytest.raises(ValueError, match="two equal sets"):
        distances.distances(a[:1], a[:1])


def test_the_deviation_over_subsets_needs_more_than_one_subset():
    a = torch.rand(12, 4)
    assert "kernel_std" not in distances.distances(a, a.roll(1, 0), subset=12)
    assert distances.distances(a, a.roll(1, 0), subset=8)["kernel_std"] > 0


def test_lpips_is_torchmetrics_lpips(monkeypatch):
    """The same random VGG16 in both: theirs gets it in the place of torchvision's."""
    import torchmetrics.functional.image.lpips as theirs

    torch.manual_seed(0)
    net = vgg16()
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained: net)
    reference = theirs._LPIPS(net="vgg")
    ours = LPIPS({f"features.{k}": v for k, v in net.state_dict().items()} | {"classifier.0.weight": torch.zeros(1)})
    a, b = torch.randint(0, 256, (2, 2, 3, 48, 40), dtype=torch.uint8)
    expected = reference(a / 127.5 - 1, b / 127.5 - 1).flatten()
    assert (ours(a, b) - expected).abs().max() / expected.abs().max() < 1e-5  # float32 sums over 48x40 maps
    assert ours(a, a).abs().max() == 0


def test_lpips_files(tmp_path):
    from safetensors.torch import save_file

    weights = {f"features.{k}": v for k, v in vgg16().state_dict().items()}
    save_file(weights, tmp_path / "vgg.safetensors")
    torch.save(weights, tmp_path / "vgg.pth")
    a, b = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    assert LPIPS.load(tmp_path / "vgg.safetensors")(a, b) == LPIPS.load(tmp_path / "vgg.pth")(a, b)
    with pytest.raises(EvaluationError, match="takes VGG16's weights"):
        LPIPS.load(tmp_path / "none.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of VGG16"):
        LPIPS.load(tmp_path / "other.pth")
    for name in ("image.pth", "image.safetensors"):
        (tmp_path / name).write_bytes(b"\x89PNG no weights" * 9)
        with pytest.raises(EvaluationError, match=rf"{name}: no weights; --lpips takes VGG16's"):
            LPIPS.load(tmp_path / name)
