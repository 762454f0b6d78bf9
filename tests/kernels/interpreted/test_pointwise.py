"""GroupNorm with SiLU, gated GELU, and the preparation of images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.geglu import geglu, geglu_op, geglu_reference
from kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_op, groupnorm_silu_reference
from kernels.upsample_normalize import (
    bicubic_matrix,
    upsample_normalize,
    upsample_normalize_op,
    upsample_normalize_reference,
)
from tests.kernels.interpreted.checks import DTYPES, compare, far_apart, surrounded

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def norm(x, weight, bias, groups, activation=True):
    return groupnorm_silu(x, groups, weight, bias, 1e-5, activation)


def norm_reference(x, weight, bias, groups, activation=True):
    return groupnorm_silu_reference(x, groups, weight, bias, 1e-5, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "channels last", "strided"])
@pytest.mark.parametrize("shape, groups", [((1, 12, 5, 7), 4), ((3, 6, 3, 2), 1), ((1, 4, 65, 67), 2)])
def test_groupnorm_silu(shape, groups, layout, dtype):
    x = (torch.randn(shape) * 2 + 3).to(dtype)  # a mean that a difference of squares would drown in
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = surrounded(x)
    inputs = [x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)]
    depth = shape[1] * shape[2] * shape[3] // groups
    compare(norm, norm_reference, inputs, groups, depth=depth)
    assert norm(*inputs, groups).stride() == norm_reference(*inputs, groups).stride() or layout == "strided"


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_groupnorm_silu_of_any_shape(b, groups, per_group, h, w, activation):
    c = groups * per_group
    inputs = [torch.randn(b, c, h, w + 1), torch.randn(c), torch.randn(c)]  # the reference refuses a single value
    compare(norm, norm_reference, inputs, groups, activation, depth=per_group * h * (w + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 90), (0, 8), (1, 2), (5, 4200)])
def test_geglu(shape, dtype):
    compare(geglu, geglu_reference, [surrounded(torch.randn(shape).to(dtype))], depth=2)


def levels(size, batch=1):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def prepared(operation, pixels, size, target, dtype=torch.float32):
    return operation(pixels, bicubic_matrix(size, target), MEAN, STD, dtype)


@pytest.mark.parametrize(
    "batch, size, target", [(1, 24, 48), (3, 7, 14), (1, 20, 33), (1, 5, 5), (0, 4, 8), (1, 9, 31)]
)
def test_upsample_normalize_is_the_reference_bit_by_bit(batch, size, target):
    pixels = levels(size, batch)
    exact = prepared(upsample_normalize_reference, pixels, size, target)
    assert torch.equal(prepared(upsample_normalize, pixels, size, target), exact)
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(prepared(upsample_normalize, strided, size, target, torch.float16), exact.half())
    # as TensorRT's plugin gets them, which takes no 8-bit tensors
    assert torch.equal(prepared(upsample_normalize, pixels.half(), size, target), exact)


def test_offsets_beyond_32_bits():
    pixels = far_apart(levels(4, 2), 0)
    exact = prepared(upsample_normalize_reference, pixels, 4, 8)
    assert torch.equal(prepared(upsample_normalize, pixels, 4, 8), exact)
    compare(geglu, geglu_reference, [far_apart(torch.randn(2, 40).half(), 0)], depth=2)


def test_torch_compile_sees_whole_graphs():
    x, w = torch.randn(1, 4, 3, 5), torch.randn(4)
    torch.library.opcheck(groupnorm_silu_op, (x, 2, w, w, 1e-5, True))
    torch.library.opcheck(groupnorm_silu_op, (x.contiguous(memory_format=torch.channels_last), 2, w, w, 1e-5, True))
    torch.library.opcheck(geglu_op, (torch.randn(2, 3, 10),))
    torch.library.opcheck(upsample_normalize_op, (levels(4), bicubic_matrix(4, 8), MEAN, STD, torch.float32))
    matrix = bicubic_matrix(4, 8)

    def everything(x, w, pixels):
        return groupnorm_silu(x, 2, w, w), geglu(x), upsample_normalize(pixels, matrix, MEAN, STD)

    x = torch.randn(1, 4, 3, 6)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")(x, w, pixels := levels(4))
    torch.testing.assert_close(compiled, everything(x, w, pixels), rtol=0, atol=0)
