"""The upsampling inside the exported encoder at an image's borders: Pillow's, without pixels beyond them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image

from export.manifest import Manifest
from export.runtimes.onnxruntime import OrtSession
from export.verification.inputs import border_images
from export.verification.verifier import Verifier
from kernels.upsample_normalize import bicubic_matrix
from vlv.model.encoder import IMAGENET_MEAN, IMAGENET_STD


def test_the_export_is_verified_there(artifacts):
    figures = Manifest.open(artifacts).artifacts["encoder"].verification
    assert set(figures["borders"]) == set(figures["outputs"])
    for errors in figures["borders"].values():
        assert 0 < errors["rms"] <= figures["allowed"]["rms"] < 1e-4 and errors["max"] <= figures["allowed"]["max"]


def test_the_exported_upsampling_is_that_of_pillow(artifacts, checkpoint):
    """The tower's input, inside the exported graph: the grey levels are Pillow's, up to 1/255, to the last pixel."""
    model = onnx.load(artifacts / "encoder.onnx")
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    std = [name for name, value in constants.items() if value.size == 3 and np.allclose(value.ravel(), IMAGENET_STD)]
    (divided,) = [node for node in model.graph.node if node.op_type == "Div" and node.input[1] in std]
    model.graph.output.append(helper.make_empty_tensor_value_info(divided.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    size, target = checkpoint.config.image_size, checkpoint.config.image_size * checkpoint.config.upsample
    images = border_images(size).numpy()
    (found,) = session.run([divided.output[0]], {"pixels": images})
    assert found.shape == (len(images), target, target, 3)
    levels = found * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    for image, level in zip(images, levels, strict=True):
        big = Image.fromarray(image.transpose(1, 2, 0)).resize((target, target), Image.Resampling.BICUBIC)
        assert np.abs(level - np.asarray(big) / 255).max() < 1 / 255


def test_no_graph_resizes_with_weights_at_the_borders(artifacts):
    """The encoder upsamples by matrix products; the other graphs repeat pixels, which needs none from beyond."""
    resizes = {}
    for name, artifact in Manifest.open(artifacts).artifacts.items():
        if artifact.runtime != "onnx":  # an engine that another test has built there
            continue
        nodes = onnx.load(artifacts / artifact.main_file, load_external_data=False).graph.node
        resizes[name] = [node for node in nodes if node.op_type in ("Resize", "Upsample")]
    assert not resizes["encoder"]
    for node in chain.from_iterable(resizes.values()):
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        assert attributes["mode"] == b"nearest" and not attributes.get("antialias")


def repeated_matrix(size: int, target: int) -> torch.Tensor:
    """The matrix [target, size] of the same bicubic resampling where the border's pixels are repeated beyond it."""
    distance = (torch.arange(-4, size + 4) + 0.5 - (torch.arange(target)[:, None] + 0.5) * size / target).abs().double()
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    extended = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    extended[:, 4] += extended[:, :4].sum(1)
    extended[:, -5] += extended[:, -4:].sum(1)
    return (extended[:, 4:-4] * 2**22).round().div(2**22).float()


def parts(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The two constants [size, target] that a graph holds of a matrix: multiples of 2**-11, and the rest."""
    coarse = (matrix * 2**11).round() / 2**11
    return coarse.T.numpy(), (matrix - coarse).T.numpy()


@pytest.fixture
def repeating(copied, checkpoint):
    """The folder of an encoder whose upsampling repeats the border's pixels beyond it, as Resize does by default."""
    size, target = checkpoint.config.image_size, checkpoint.config.image_size * checkpoint.config.upsample
    model, replaced = onnx.load(copied / "encoder.onnx"), 0
    pairs = list(zip(parts(bicubic_matrix(size, target)), parts(repeated_matrix(size, target)), strict=True))
    for constant in model.graph.initializer:
        for ours, other in pairs:
            if np.array_equal(numpy_helper.to_array(constant), ours):
                constant.CopyFrom(numpy_helper.from_array(other, constant.name))
                replaced += 1
    assert replaced == 4  # both parts, for rows and for columns
    onnx.save(model, copied / "encoder.onnx")
    return copied


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pixels_repeated_beyond_the_border_are_found(precision, repeating, probes, checkpoint):
    """By photos and noise as well in float32, and in float16's tolerance by nothing but content at the borders."""
    artifact = replace(Manifest.open(repeating).artifacts["encoder"], precision=precision)
    session = OrtSession.on_cpu(artifact, repeating)
    figures = Verifier(checkpoint, probes, captions=False).check(artifact, session, repeating)
    at_borders = [problem for problem in figures["problems"] if "content at the borders is off by" in problem]
    assert at_borders and all("does a resize read pixels beyond the border?" in problem for problem in at_borders)
    others = [problem for problem in figures["problems"] if problem not in at_borders]
    assert others.pop() == "the first block that drifts is encoder.vision.embeds.0"
    assert bool(others) == (precision == "fp32")
