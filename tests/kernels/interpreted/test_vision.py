"""The vision tower's kernels: window attention, channel attention, depthwise convolution with its norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.channel_attention import channel_attention, channel_attention_op, channel_attention_reference
from kernels.dwconv_norm import (
    add_dwconv_norm_op,
    adds_residual,
    dwconv_norm,
    dwconv_norm_op,
    dwconv_norm_reference,
)
from kernels.runtime.tuning import forced
from kernels.window_attention import window_attention, window_attention_op, window_attention_reference
from tests.kernels.interpreted.checks import DTYPES, compare, far_apart, surrounded

BIG_TILES = {
    f"dwconv_norm__{kernel}": {"TILE": 128, "num_warps": 4, "num_stages": 1}
    for kernel in ("norm_backward", "weight_backward")
}
BIG_TILES["dwconv_norm__forward"] = {"DESIGN": 0, "TILE": 64, "LINES": 1, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def big_tiles():
    """Fewer steps of the interpreter; the sizes below still take several tiles and leave the last one part empty."""
    with forced(**BIG_TILES):
        yield


def window_inputs(b, h, w, heads, d, dtype=torch.float32):
    return [surrounded(torch.randn(b, h, w, 3 * heads * d).to(dtype)), torch.randn(3 * heads * d).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, window", [((1, 13, 12, 1, 32), 12), ((2, 5, 9, 2, 20), 5), ((1, 8, 8, 1, 64), 8), ((1, 3, 2, 1, 128), 7)]
)
def test_window_attention(shape, window, dtype):
    inputs, heads, depth = window_inputs(*shape, dtype), shape[3], shape[4] + window**2
    compare(window_attention, window_attention_reference, inputs, heads, window, depth=depth, gradients=True)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_window_attention_in_any_tile(block):
    config = {"BLOCK_Q": block, "num_warps": 4, "num_stages": 1}
    with forced(window_attention__forward={"DESIGN": 0, "GROUP": 1, **config}, window_attention__backward=config):
        inputs = window_inputs(1, 12, 12, 1, 16)
        compare(window_attention, window_attention_reference, inputs, 1, 12, depth=160, gradients=True)


DESIGNS = [(1, 1, 16), (1, 4, 16), (1, 2, 32), (2, 4, 64), (2, 2, 128), (3, 1, 64), (3, 1, 16)]


@pytest.mark.parametrize("design, group, block", DESIGNS)
@pytest.mark.parametrize(
    "shape, window, dtype",
    [
        ((1, 13, 12, 3, 16), 12, torch.float32),
        ((2, 5, 9, 2, 20), 5, torch.bfloat16),
        ((1, 7, 8, 1, 32), 7, torch.float16),
    ],
)
def test_every_design_of_window_attention(shape, window, design, group, block, dtype):
    """On maps that are no multiple of the window, with heads that do not fill a group."""
    config = {"DESIGN": design, "GROUP": group, "BLOCK_Q": block, "num_warps": group, "num_stages": 1}
    inputs, heads, depth = window_inputs(*shape, dtype), shape[3], shape[4] + window**2
    with forced(window_attention__forward=config):
        compare(window_attention, window_attention_reference, inputs, heads, window, depth=depth)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("design, group, block", [(1, 2, 16), (2, 2, 16), (3, 1, 16)])
def test_designs_with_offsets_beyond_32_bits(design, group, block, dim):
    x, bias = far_apart(torch.randn(2, 3, 5, 96).half(), dim), torch.randn(96).half()
    config = {"DESIGN": design, "GROUP": group, "BLOCK_Q": block, "num_warps": group, "num_stages": 1}
    with forced(window_attention__forward=config):
        compare(window_attention, window_attention_reference, [x, bias], 2, 4, depth=32)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from(DESIGNS),
    st.integers(0, 2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(16, 40),
    st.integers(4, 7),
)
def test_every_design_of_any_shape(design, b, h, w, heads, d, window):
    names = ("DESIGN", "GROUP", "BLOCK_Q")
    with forced(window_attention__forward={**dict(zip(names, design, strict=True)), "num_warps": 4, "num_stages": 1}):
        inputs, depth = window_inputs(b, h, w, heads, d), d + window**2
        compare(window_attention, window_attention_reference, inputs, heads, window, depth=depth)


def test_window_attention_gradcheck():
    inputs = [x.double().requires_grad_() for x in window_inputs(1, 5, 4, 1, 16)]
    assert torch.autograd.gradcheck(lambda x, y: window_attention(x, y, 1, 4), inputs, fast_mode=True)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(0, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 2), st.integers(16, 40), st.integers(4, 7)
)
def test_window_attention_of_any_shape(b, h, w, heads, d, window):
    compare(
        window_attention, window_attention_reference, window_inputs(b, h, w, heads, d), heads, window,
        depth=d + window**2,
    )  # fmt: skip


def channel_inputs(b, n, groups, d, dtype=torch.float32):
    return [surrounded(torch.randn(b, n, 3 * groups * d).to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 600, 1, 32), (2, 49, 2, 24), (1, 1, 1, 16)])
def test_channel_attention(shape, dtype):
    inputs = channel_inputs(*shape, dtype)
    compare(channel_attention, channel_attention_reference, inputs, shape[2], depth=shape[1] + shape[3], gradients=True)


def test_channel_attention_gradcheck():
    inputs = [x.double().requires_grad_() for x in channel_inputs(1, 19, 1, 8)]
    assert torch.autograd.gradcheck(lambda x: channel_attention(x, 1), inputs, fast_mode=True)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 300), st.integers(1, 3), st.integers(1, 40))
def test_channel_attention_of_any_shape(b, n, groups, d):
    inputs = channel_inputs(b, n, groups, d)
    compare(channel_attention, channel_attention_reference, inputs, groups, depth=n + d)


def dwconv_inputs(b, h, w, c, dtype=torch.float32):
    vectors = [torch.randn(c).to(dtype) for _ in range(3)]
    return [surrounded(torch.randn(b, h, w, c).to(dtype)), torch.randn(c, 1, 3, 3).to(dtype), *vectors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 11, 24), (2, 2, 3, 16), (1, 1, 1, 33)])
def test_dwconv_norm(shape, dtype):
    pixels = shape[0] * shape[1] * shape[2]
    compare(dwconv_norm, dwconv_norm_reference, dwconv_inputs(*shape, dtype), 1e-5, depth=pixels + 9, gradients=True)


WALKS = [(1, 4, 3), (1, 1, 24), (2, 4, 3), (2, 2, 5)]


@pytest.mark.parametrize("design, tile, lines", WALKS)
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 6, 7, 24), torch.float32),
        ((2, 2, 3, 16), torch.bfloat16),
        ((1, 1, 1, 33), torch.float16),
        ((2, 5, 1, 18), torch.bfloat16),
    ],
)
def test_every_design_of_dwconv_norm(shape, design, tile, lines, dtype):
    config = {"DESIGN": design, "TILE": tile, "LINES": lines, "num_warps": 4, "num_stages": 1}
    pixels = shape[0] * shape[1] * shape[2]
    with forced(**{**BIG_TILES, "dwconv_norm__forward": config}):
        inputs = dwconv_inputs(*shape, dtype)
        compare(dwconv_norm, dwconv_norm_reference, inputs, 1e-5, depth=pixels + 9, gradients=True)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from(WALKS), st.integers(0, 2), st.integers(1, 7), st.integers(1, 7), st.integers(2, 70))
def test_every_design_of_dwconv_norm_of_any_shape(walk, b, h, w, c):
    config = dict(zip(("DESIGN", "TILE", "LINES"), walk, strict=True))
    with forced(dwconv_norm__forward={**config, "num_warps": 4, "num_stages": 1}):
        compare(dwconv_norm, dwconv_norm_reference, dwconv_inputs(b, h, w, c), depth=9 + c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, design, tile, lines", [((1, 5, 7, 24), 0, 8, 1), ((2, 3, 1, 33), 1, 2, 4), ((1, 5, 4, 18), 2, 4, 3)]
)
def test_dwconv_norm_adds_a_residual(shape, design, tile, lines, dtype):
    config = {"DESIGN": design, "TILE": tile, "LINES": lines, "num_warps": 4, "num_stages": 1}
    x, *weights = dwconv_inputs(*shape, dtype)
    inputs = [x.contiguous(), torch.randn(shape).to(dtype), *weights]
    assert adds_residual(*inputs[:2])

    def ours(x, residual, *weights):
        return dwconv_norm(x, *weights, residual=residual)

    def reference(x, residual, *weights):
        return dwconv_norm_reference(x + residual, *weights)

    with forced(dwconv_norm__forward=config), torch.no_grad():
        compare(ours, reference, inputs, depth=9 + shape[3])
    compare(ours, reference, inputs, depth=9 + shape[3], gradients=True)
    strided = [dwconv_inputs(*shape, dtype)[0], *inputs[1:]]
    assert not adds_residual(*strided[:2])
    compare(ours, reference, strided, depth=9 + shape[3])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("design", [1, 2])
def test_walks_with_offsets_beyond_32_bits(design, dim):
    x, vector = far_apart(torch.randn(2, 3, 5, 48).half(), dim), torch.randn(48).half()
    inputs = [x, torch.randn(48, 1, 3, 3).half(), vector, vector, vector]
    config = {"DESIGN": design, "TILE": 2, "LINES": 2, "num_warps": 4, "num_stages": 1}
    with forced(dwconv_norm__forward=config):
        compare(dwconv_norm, dwconv_norm_reference, inputs, depth=57)


def test_dwconv_norm_over_several_chunks():
    compare(dwconv_norm, dwconv_norm_reference, dwconv_inputs(1, 17, 18, 16), 1e-5, depth=315, gradients=True)


def test_dwconv_norm_gradcheck():
    inputs = [x.double().requires_grad_() for x in dwconv_inputs(1, 3, 2, 8)]
    assert torch.autograd.gradcheck(dwconv_norm, inputs, fast_mode=True)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(2, 70))
def test_dwconv_norm_of_any_shape(b, h, w, c):
    compare(dwconv_norm, dwconv_norm_reference, dwconv_inputs(b, h, w, c), depth=9 + c)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(dim):
    x, bias = far_apart(torch.randn(2, 3, 5, 48).half(), dim), torch.randn(48).half()
    compare(window_attention, window_attention_reference, [x, bias], 1, 4, depth=32)
    compare(dwconv_norm, dwconv_norm_reference, [x, torch.randn(48, 1, 3, 3).half(), bias, bias, bias], depth=57)
    if dim < 2:
        x = far_apart(torch.randn(2, 5, 48).half(), dim)
        compare(channel_attention, channel_attention_reference, [x], 1, depth=21)


def test_torch_compile_sees_whole_graphs():
    """No graph break, and fake tensors of the right shape, dtype and strides."""
    qkv, bias = window_inputs(1, 5, 4, 1, 16)
    convolution = dwconv_inputs(1, 3, 2, 16)
    torch.library.opcheck(window_attention_op, (qkv.requires_grad_(), bias.requires_grad_(), 1, 4))
    torch.library.opcheck(channel_attention_op, (qkv.detach().flatten(1, 2).requires_grad_(), 1))
    torch.library.opcheck(dwconv_norm_op, (*(x.requires_grad_() for x in convolution), 1e-5))
    x, *weights = (x.detach() for x in convolution)
    torch.library.opcheck(add_dwconv_norm_op, (x, x, *weights, 1e-5))

    def everything(qkv, bias, *convolution):
        return window_attention(qkv, bias, 1, 4), channel_attention(qkv.flatten(1, 2), 1), dwconv_norm(*convolution)

    with torch.no_grad():
        compiled = torch.compile(everything, fullgraph=True, backend="eager")(qkv, bias, *convolution)
        plain = everything(qkv, bias, *convolution)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)
