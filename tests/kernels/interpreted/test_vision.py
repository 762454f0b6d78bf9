"""The vision tower's kernels: window attention, channel attention, depthwise convolution with its norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.channel_attention import channel_attention, channel_attention_op, channel_attention_reference
from kernels.dwconv_norm import dwconv_norm, dwconv_norm_op, dwconv_norm_reference
from kernels.runtime.tuning import forced
from kernels.window_attention import window_attention, window_attention_op, window_attention_reference
from tests.kernels.interpreted.checks import DTYPES, compare, far_apart, surrounded

BIG_TILES = {
    f"dwconv_norm__{kernel}": {"TILE": 64, "num_warps": 4, "num_stages": 1}
    for kernel in ("forward", "norm_backward", "weight_backward")
}


@pytest.fixture(autouse=True)
def big_tiles():
    """Fewer steps of the interpreter; the sizes below still take several tiles and leave the last one part empty."""
    with forced(**BIG_TILES):
        yield


def window_inputs(b, h, w, heads, d, dtype=torch.float32):
    return [surrounded(torch.randn(b, h, w, 3 * heads * d).to(dtype)), torch.randn(3 * heads * d).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, window", [((1, 13, 12, 1, 32), 12), ((3, 5, 9, 2, 20), 5), ((1, 8, 8, 1, 64), 8), ((1, 3, 2, 1, 128), 7)]
)
def test_window_attention(shape, window, dtype):
    inputs, heads, depth = window_inputs(*shape, dtype), shape[3], shape[4] + window**2
    compare(window_attention, window_attention_reference, inputs, heads, window, depth=depth, gradients=True)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_window_attention_in_any_tile(block):
    config = {"BLOCK_Q": block, "num_warps": 4, "num_stages": 1}
    with forced(window_attention__forward=config, window_attention__backward=config):
        inputs = window_inputs(1, 12, 12, 1, 16)
        compare(window_attention, window_attention_reference, inputs, 1, 12, depth=160, gradients=True)


def test_window_attention_gradcheck():
    inputs = [x.double().requires_grad_() for x in window_inputs(1, 5, 4, 1, 16)]
    assert torch.autograd.gradcheck(lambda x, y: window_attention(x, y, 1, 4), inputs, fast_mode=True)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(0, 3), st.integers(1, 11), st.integers(1, 11), st.integers(1, 2), st.integers(16, 40), st.integers(4, 7)
)
def test_window_attention_of_any_shape(b, h, w, heads, d, window):
    compare(
        window_attention, window_attention_reference, window_inputs(b, h, w, heads, d), heads, window,
        depth=d + window**2,
    )  # fmt: skip


def channel_inputs(b, n, groups, d, dtype=torch.float32):
    return [surrounded(torch.randn(b, n, 3 * groups * d).to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 600, 1, 32), (3, 49, 2, 24), (1, 1, 1, 16)])
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
@pytest.mark.parametrize("shape", [(1, 9, 11, 24), (3, 2, 3, 16), (1, 1, 1, 33)])
def test_dwconv_norm(shape, dtype):
    pixels = shape[0] * shape[1] * shape[2]
    compare(dwconv_norm, dwconv_norm_reference, dwconv_inputs(*shape, dtype), 1e-5, depth=pixels + 9, gradients=True)


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

    def everything(qkv, bias, *convolution):
        return window_attention(qkv, bias, 1, 4), channel_attention(qkv.flatten(1, 2), 1), dwconv_norm(*convolution)

    with torch.no_grad():
        compiled = torch.compile(everything, fullgraph=True, backend="eager")(qkv, bias, *convolution)
        plain = everything(qkv, bias, *convolution)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)
