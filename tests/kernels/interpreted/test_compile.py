"""Custom ops under torch.compile and torch.export: a compiled graph has them, an exported graph has the references."""

import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from kernels.attention import attention
from kernels.runtime import dispatch
from vlv.model.config import PRESETS, DaViTConfig
from vlv.model.encoder import VLVEncoder

SMALL = replace(
    PRESETS["tiny"],
    image_size=8,
    encoder_layers=1,
    decoder_layers=1,
    context_layers=2,
    vision=DaViTConfig((32, 32), (1, 1), (1, 1), (1, 1), (8, 2), (8, 2), (0, 0), (False, True), 4),
)
OPERATIONS = {"attention", "window_attention", "channel_attention", "dwconv_norm", "add_dwconv_norm", "add_norm"}
# aten's operators that are views, products, or norms: all others read or write a map once more
NO_PASS = {"addmm", "convolution", "detach", "expand", "mm", "permute", "select", "slice", "t", "transpose", "unbind"}
NO_PASS |= {"_unsafe_view", "native_layer_norm", "unsqueeze", "view"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VLVEncoder(SMALL).eval().requires_grad_(False)


def ops(graph: torch.fx.Graph) -> set[str]:
    """Return the names of our custom ops in a graph."""
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return {name.split(".")[1] for name in names if name.startswith("vlv.")}


def test_a_compiled_encoder_has_the_custom_ops(encoder):
    torch._dynamo.reset()
    found, pixels = set(), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)

    def backend(module, inputs):
        found.update(ops(module.graph))
        return module.forward

    compiled = torch.compile(encoder, fullgraph=True, backend=backend)(pixels)
    assert found == {"upsample_normalize", *OPERATIONS}
    torch.testing.assert_close(compiled, encoder(pixels), rtol=0, atol=1e-5)  # the eager linear layers are oneDNN's


def passes(encoder, pixels) -> Counter:
    """Count the passes over a map that PyTorch's own operators make, by the repeated block that they are in.

    They come from the graph that a compiler would get: aten's operators and ours, before anything is fused.
    """
    torch._dynamo.reset()
    counts = Counter()

    def compiler(module, inputs):
        for node in module.graph.nodes:
            namespace, _, name = str(node.target).partition(".")
            if node.op == "call_function" and namespace == "aten" and name.split(".")[0] not in NO_PASS:
                path = [module[0] for module in node.meta.get("nn_module_stack", {}).values()]
                block = re.search(r"(vision|encoder|decoder|text)\.(?:stages|layers)", path[-1] if path else "")
                counts[block[1] if block else "between", name.split(".")[0]] += 1
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
    with torch.no_grad():
        torch.compile(encoder, fullgraph=True, backend=backend)(pixels)
    return counts


def test_gelu_is_the_only_elementwise_operator_left_in_a_block(encoder):
    """Of PyTorch's own; GELU is in the epilogue of the product where kernels/tuned.json says so (kernels/linear.py)."""
    counts = passes(encoder, torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    expected = {(block, "gelu"): count for block, count in {"vision": 4, "encoder": 1, "decoder": 1, "text": 2}.items()}
    # between the blocks: the tower's last sum, the positions of its result, the mean token, concatenations, two MLPs
    expected |= {("between", name): count for name, count in {"add": 3, "mean": 1, "cat": 3, "gelu": 2}.items()}
    assert counts == expected


def test_the_encoder_agrees_with_its_references(encoder):
    """Also where a block's last sum is left to the kernel of the next block."""
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    found = encoder(pixels)
    with dispatch.references():
        torch.testing.assert_close(found, encoder(pixels), rtol=0, atol=1e-5)


def test_an_exported_encoder_has_the_references(encoder):
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for strict in (False, True):
        program = torch.export.export(encoder, (pixels,), strict=strict)
        assert not ops(program.graph)
    with dispatch.as_nodes():
        program = torch.export.export(encoder, (pixels,))
        assert {"window_attention", "channel_attention", "dwconv_norm", "attention"} <= ops(program.graph)


def test_references_inside_a_compiled_graph(encoder):
    torch._dynamo.reset()
    found = set()

    def backend(module, inputs):
        found.update(ops(module.graph))
        return module.forward

    with dispatch.references():
        torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend=backend)(torch.randn(1, 1, 4, 16))
    assert not found


class OnGPU:
    """What `fused` asks a tensor for, with the answers of one on a GPU."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, index: int = 0):
        self.dtype, self.device = dtype, torch.device("cuda", index)


@pytest.mark.parametrize(
    "tensors, options, environment, reason",
    [
        ([OnGPU(torch.float64)], {}, {}, "no kernel computes in torch.float64"),
        ([OnGPU(), OnGPU(index=1)], {}, {}, "several devices, expected all on cuda:0"),
        ([OnGPU()], {"fits": False}, {}, "no kernel takes these sizes"),
        ([OnGPU()], {}, {"MODE": "reference"}, "VLV_KERNELS=reference"),
        ([OnGPU()], {}, {"_HAS_TRITON": False}, "pip install triton"),
    ],
)
def test_a_reference_on_a_gpu_warns_once(tensors, options, environment, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    for name, value in environment.items():
        monkeypatch.setattr(dispatch, name, value)
    with pytest.warns(RuntimeWarning, match=f"window_attention runs on its slower PyTorch reference.*{reason}"):
        assert not dispatch.fused("window_attention", *tensors, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.fused("window_attention", *tensors, **options)
        assert dispatch.fused("window_attention", OnGPU(), OnGPU()) is not bool(environment)
        with dispatch.references():  # asked for in code
            monkeypatch.setattr(dispatch, "_warned", set())
            assert not dispatch.fused("window_attention", *tensors, **options)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_one_kernel_writes_8_bit_floats_and_none_reads_them(dtype):
    """Triton's interpreter makes finite numbers of FP8's overflow and NaN (findings/triton_interpreter_fp8.sh).

    kernels/triton/interpreter.py takes PyTorch's cast in its place. Another kernel that casts to FP8 needs a test
    against torch's cast with NaN, infinity and values out of range, as test_pointwise.py has it, and an entry here.
    """
    assert not dispatch.fused("attention", torch.zeros(2, 4).to(dtype))
    assert dispatch.fused("attention", torch.zeros(2, 4))
    sources = sorted((Path(dispatch.__file__).parents[1] / "triton").glob("*.py"))
    assert len(sources) > 5
    casting = [file.name for file in sources if re.search("float8|fp8|e4m3|e5m2", file.read_text(), re.IGNORECASE)]
    assert casting == ["fp8_linear.py", "interpreter.py"]
