"""Attention with its gradient, and attention to a short context."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import _describable, attention, attention_op, attention_reference
from kernels.cross_attention import cross_attention, cross_attention_op, cross_attention_reference
from kernels.runtime import tuning
from kernels.runtime.tuning import forced
from tests.kernels.interpreted.checks import DTYPES, compare, far_apart, surrounded


def qkv(b, heads, m, n, d, dtype=torch.float32):
    """Queries, keys, values [B, heads, tokens, d], as views of [B, tokens, heads, d] amid NaN."""
    shapes = [(b, length, heads, d) for length in (m, n, n)]
    return [surrounded(torch.randn(shape).to(dtype)).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 2, 70, 70, 32), (2, 1, 65, 131, 40), (1, 1, 131, 40, 20), (1, 1, 1, 1, 16), (1, 1, 3, 70, 160)]
)
def test_attention(shape, causal, dtype):
    depth = shape[3] + shape[4]
    compare(attention, attention_reference, qkv(*shape, dtype), causal, depth=depth, gradients=True)


@pytest.mark.parametrize("m, n", [(16, 16), (16, 64), (64, 16), (128, 32)])
def test_attention_in_any_tile(m, n):
    config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
    backward = {"BLOCK_OUT": m, "BLOCK_IN": n, "num_warps": 4, "num_stages": 1}
    with forced(attention__forward={**config, "TMA": 0}, attention__backward=backward):
        for causal in (False, True):
            compare(attention, attention_reference, qkv(1, 1, 75, 83, 16), causal, depth=99, gradients=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 37, 83, 40), (1, 1, 70, 16, 64), (1, 2, 3, 1, 16)])
def test_attention_through_tensor_descriptors(shape, causal, dtype):
    b, heads, m, n, d = shape
    inputs = [torch.randn(b, length, heads, d).to(dtype).transpose(1, 2) for length in (m, n, n)]
    # keys and values as a projection leaves them, side by side
    inputs[1:] = torch.randn(b, n, 2, heads, d).to(dtype).permute(2, 0, 3, 1, 4).unbind()
    config = {"BLOCK_M": 64, "BLOCK_N": 32, "TMA": 1, "num_warps": 4, "num_stages": 1}
    assert _describable(*inputs[1:]) and not _describable(*qkv(*shape, dtype)[1:])
    with forced(attention__forward=config), torch.no_grad():
        compare(attention, attention_reference, inputs, causal, depth=n + d)
        compare(attention, attention_reference, qkv(*shape, dtype), causal, depth=n + d)  # which takes pointers


@pytest.mark.parametrize("causal", [False, True])
def test_attention_gradcheck(causal):
    inputs = [x.double().requires_grad_() for x in qkv(1, 1, 5, 7, 16)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, causal), inputs, fast_mode=True)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(0, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.integers(16, 70), st.booleans()
)  # fmt: skip
def test_attention_of_any_shape(b, heads, m, n, d, causal):
    compare(attention, attention_reference, qkv(b, heads, m, n, d), causal, depth=n + d)


def test_scores_that_overflow_without_a_maximum():
    q, k, v = qkv(1, 1, 9, 9, 16)
    compare(attention, attention_reference, [q * 100, k, v], False, depth=25)


def test_fewer_batches_or_heads_of_keys_are_broadcast():
    q, k, v = qkv(2, 4, 5, 9, 32)
    for part in ((slice(0, 1), slice(None)), (slice(None), slice(0, 1))):
        compare(attention, attention_reference, [q, k[part], v[part]], False, depth=41)
        inputs = [x.transpose(1, 2) for x in (q, k[part], v[part])]
        compare(cross_attention, cross_attention_reference, inputs, depth=41)


def context(b, m, n, heads, d, dtype=torch.float32):
    """Queries, keys, values [B, tokens, heads, d] amid NaN."""
    return [surrounded(torch.randn(b, length, heads, d).to(dtype)) for length in (m, n, n)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 77, 2, 40), (3, 33, 20, 1, 64), (1, 1, 1, 1, 16), (1, 5, 160, 1, 32)])
def test_cross_attention(shape, dtype):
    with torch.no_grad():
        compare(cross_attention, cross_attention_reference, context(*shape, dtype), depth=shape[2] + shape[4])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 90), st.integers(1, 160), st.integers(1, 3), st.integers(16, 90))
def test_cross_attention_of_any_shape(b, m, n, heads, d):
    compare(cross_attention, cross_attention_reference, context(b, m, n, heads, d), depth=n + d)


def test_cross_attention_steps_aside_for_training():
    q, k, v = (x.requires_grad_() for x in context(1, 3, 4, 1, 16))
    cross_attention(q, k, v).sum().backward()


@pytest.mark.parametrize("dim", [0, 2])
def test_offsets_beyond_32_bits(dim):
    q, k, v = (far_apart(torch.randn(2, 2, 5, 16).half(), dim) for _ in range(3))
    compare(attention, attention_reference, [q, k, v], True, depth=21)
    compare(cross_attention, cross_attention_reference, [q, k, v], depth=21)


def test_torch_compile_sees_whole_graphs():
    q, k, v = qkv(1, 1, 5, 7, 16)
    # the log-sums are no differentiable output, so the gradients are tested above
    torch.library.opcheck(attention_op, (q, k, v, True))
    torch.library.opcheck(cross_attention_op, (q, k, v))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v, True))


@pytest.mark.parametrize("name, faster", [("measured", False), ("another", True)])
def test_the_faster_attention_is_a_constant_of_the_graph(name, faster, monkeypatch):
    table = {"sm90": {"reference": {"compiled": {"attention": ["*"]}}}, "measured": {"reference": {}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "_names", lambda index: (name, "sm90"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if tuning._listed("attention", "d64", 0, True) else x - 1, fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(())) == (1 if faster else -1)


@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_are_listed_for_eager_and_compiled_pytorch(compiled, monkeypatch):
    listed = {"attention": ["m77n77d64 causal"], "cross_attention": ["*"]}
    table = {"GPU": {"reference": {"compiled" if compiled else "eager": listed}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "_names", lambda index: ("GPU", "sm90"))
    for op, shape, mode, expected in (
        ("attention", "m77n77d64 causal", compiled, True),
        ("attention", "m77n77d64", compiled, False),
        ("attention", "m77n77d64 causal", not compiled, False),
        ("cross_attention", "m256n77d64", compiled, True),
        ("dwconv_norm", "c1024", compiled, False),
    ):
        assert tuning._listed(op, shape, 0, mode) is expected, (op, shape, mode)
