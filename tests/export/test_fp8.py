"""FP8 in PyTorch: which layers it takes, how far off it is, and the devices that it is refused on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export.components import tolerance
from export.graphs import load
from export.quantize.fp8 import exact_blocks, to_fp8
from export.runtimes.base import RuntimeUnavailable
from export.runtimes.factory import open_runtime
from export.runtimes.torch import TorchRuntime
from export.verification.captions import Captions
from export.verification.inputs import scene_images
from export.verification.verifier import compare
from kernels.fp8_linear import Fp8Linear


def layers(graph, kind: type) -> set[str]:
    return {path for path, module in graph.named_modules() if isinstance(module, kind)}


def test_the_linear_layers_of_the_vision_stages_and_no_others(checkpoint):
    graph = load(checkpoint, "encoder")
    plain = layers(graph, nn.Linear)
    to_fp8(graph)
    inside = {path for path in plain if path.startswith("encoder.vision.stages.")}
    assert layers(graph, Fp8Linear) == inside and layers(graph, nn.Linear) == plain - inside and len(inside) == 24
    assert {block for block in graph.blocks if not block.startswith("encoder.vision.stages")} == {*exact_blocks(graph)}
    assert layers(to_fp8(load(checkpoint, "encoder"), ()), nn.Linear) == set(), "without exact blocks every one"


def test_gelu_moves_into_the_kernel_that_quantizes(checkpoint):
    graph = to_fp8(load(checkpoint, "encoder"), ())
    parents = [m for m in graph.modules() if isinstance(getattr(m, "fc1", None), Fp8Linear)]
    assert len(parents) == 6 + 4 + 3 and not any(m.fc1.gelu for m in parents)
    assert all(m.fc2.gelu_before and not m.fc1.gelu_before for m in parents)


def test_the_error_is_that_of_three_bits_and_captions_stay(checkpoint):
    plain, rounded = TorchRuntime(checkpoint, "cpu"), TorchRuntime(checkpoint, "cpu", precision="fp8-emulated")
    images = scene_images(checkpoint.config.image_size, 7, 0, 16)
    figures = compare(rounded.encode(images), plain.encode(images))
    graph = plain.session("encoder").graph
    assert 1e-3 < figures["rms"] < 0.01 < tolerance("fp8", len(graph.blocks), graph.longest_sum)
    assert rounded.dtype == "fp8"
    agreement = Captions(checkpoint, plain, images, seed=7).agreement(rounded.encode, 0.99, more=False)
    assert agreement.images == 16 and agreement.agreement > 0.97  # 512 scenes: benchmarks/fp8_captions.json


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_cpu_is_refused_with_the_remedy(checkpoint):
    with pytest.raises(RuntimeUnavailable, match=r"8\.9 or higher, and a CPU has none: use bf16 or fp32, or"):
        open_runtime("torch", checkpoint=checkpoint, precision="fp8")


def test_words_that_do_not_fit(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no precision 'int8' in PyTorch; there are fp32, bf16, fp8, fp8-emulated"):
        open_runtime("torch", checkpoint=checkpoint, precision="int8")
    with pytest.raises(ValueError, match="the runtime onnx has the precision of its artifacts, not fp8"):
        open_runtime("onnx", tmp_path, checkpoint, precision="fp8")
    assert TorchRuntime(checkpoint, "cpu", precision="bf16").dtype == "bfloat16"
