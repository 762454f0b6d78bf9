"""The upsampling and normalisation inside the encoder against Pillow's bicubic and the published processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.upsample_normalize import bicubic_matrix, upsample_normalize
from vlv.model.encoder import IMAGENET_MEAN, IMAGENET_STD

PHOTOS = Path(__file__).parents[4] / "shared" / "images"


def through_pillow(crop: np.ndarray, target: int) -> torch.Tensor:
    """uint8 [S, S, 3] -> float32 [T, T, 3]: Pillow's bicubic, then rescale and normalise as the processor does."""
    big = np.asarray(Image.fromarray(crop).resize((target, target), Image.Resampling.BICUBIC))
    scaled = big.astype(np.float64) / 255
    return torch.from_numpy((scaled - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)).float()


def through_ours(crop: np.ndarray, target: int) -> torch.Tensor:
    pixels = torch.from_numpy(crop.transpose(2, 0, 1).copy())[None]
    resize = bicubic_matrix(crop.shape[0], target)
    return upsample_normalize(pixels, resize, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))[0]


def assert_equal(crop: np.ndarray, target: int) -> None:
    difference = (through_ours(crop, target) - through_pillow(crop, target)).abs()
    assert difference.max() < 1e-6  # the same grey levels; a level is 0.017


def scene(size: int) -> np.ndarray:
    """A synthetic image with what photos have: smooth shades, hard edges, noise, clipped whites and blacks."""
    random = np.random.default_rng(size)
    y, x = np.mgrid[:size, :size] / size
    shades = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], -1) * 255
    shades[size // 4 : size // 2, size // 3 : size // 2] = [255, 0, 255]
    shades += random.normal(0, 20, shades.shape) * (y > 0.7)[..., None]
    return shades.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size,target", [(384, 768), (64, 128), (64, 192), (50, 200), (96, 96), (37, 74), (33, 165)])
def test_equals_pillow_on_synthetic_images(size: int, target: int):
    assert_equal(scene(size), target)


@pytest.mark.parametrize("size,target", [(48, 80), (100, 64)])
def test_equals_pillow_between_unrelated_sizes(size: int, target: int):
    assert_equal(scene(size), target)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no ../shared/images beside the repository")
@pytest.mark.parametrize("name", ["sample1.jpg", "sample6.jpg", "sample9.jpg"])
def test_equals_pillow_on_photos(name: str):
    photo = Image.open(PHOTOS / name).convert("RGB").resize((384, 384), Image.Resampling.BILINEAR)
    assert_equal(np.asarray(photo), 768)


def test_worst_case_overshoot_is_clipped_between_the_passes():
    """A checkerboard of 0 and 255: bicubic overshoots most here, and Pillow clips after each pass."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    assert_equal(np.repeat(board[..., None], 3, -1), 128)


def border_contents(size: int) -> dict[str, np.ndarray]:
    """Images uint8 [size, size, 3] whose content lies at the borders."""
    black = np.zeros((size, size, 3), np.uint8)
    images = {name: black.copy() for name in ("frame", "corners", "top row", "last column", "rows beside the border")}
    images["frame"][[0, -1]] = images["frame"][:, [0, -1]] = 255
    images["corners"][[0, 0, -1, -1], [0, -1, 0, -1]] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    images["top row"][0] = 255
    images["last column"][:, -1] = [255, 128, 1]
    images["rows beside the border"][[1, -2]] = 255
    images["dark frame"] = 255 - images["frame"]
    images["checkerboard"] = np.repeat((np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    return images


@pytest.mark.parametrize("size,target", [(64, 128), (384, 768), (50, 200), (7, 21), (33, 165), (3, 5), (100, 64)])
def test_equals_pillow_at_the_borders(size: int, target: int):
    """Taps beyond the border are dropped, neither black nor the border repeated; each edge within 1/255, and equal."""
    for name, image in border_contents(size).items():
        ours, pillows = through_ours(image, target), through_pillow(image, target)
        for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
            difference = (ours[edge] - pillows[edge]) * torch.tensor(IMAGENET_STD)
            assert difference.abs().max() < 1 / 255, (name, edge)
        assert_equal(image, target)
