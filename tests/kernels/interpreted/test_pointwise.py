"""Residual sum with its norm, rows in 8-bit floats, and the preparation of images."""

import pytest
import torch

from kernels.add_norm import add_norm, add_norm_op, add_norm_reference, fuses
from kernels.fp8_linear import Fp8Linear, quantize_rows, quantize_rows_op, quantize_rows_reference
from kernels.runtime.tuning import forced
from kernels.upsample_normalize import (
    bicubic_matrix,
    upsample_normalize,
    upsample_normalize_op,
    upsample_normalize_reference,
)
from tests.kernels.interpreted.checks import DTYPES, compare, far_apart, surrounded

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def layer_norm(c, dtype=torch.float32):
    norm = torch.nn.LayerNorm(c, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.to(dtype)


def summed(x, residual, weight, bias, keep_sum=True):
    """add_norm with the parameters as tensors; without the sum, only the norm is a result."""
    norm = torch.nn.LayerNorm(x.shape[-1], eps=1e-3)
    norm.weight, norm.bias = (torch.nn.Parameter(p, requires_grad=False) for p in (weight, bias))
    found = add_norm(x, residual, norm, keep_sum)
    assert keep_sum or found[0].numel() in (0, x.numel())
    return found if keep_sum else found[1]


def summed_reference(x, residual, weight, bias, keep_sum=True):
    found = add_norm_reference(x, residual, weight, bias, 1e-3)
    return found if keep_sum else found[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 40), (0, 8), (7, 16)])
def test_add_norm(shape, rows, dtype):
    inputs = [torch.randn(shape).to(dtype), (torch.randn(shape) + 3).to(dtype)]
    inputs += [torch.randn(shape[-1]).to(dtype) for _ in range(2)]
    with forced(add_norm__forward={"ROWS": rows, "num_warps": 4, "num_stages": 1}):
        for keep_sum in (True, False):
            compare(summed, summed_reference, inputs, keep_sum, depth=shape[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "shape, other", [((3, 5, 24), (5, 24)), ((3, 5, 24), (1, 5, 24)), ((2, 1, 7, 16), (7, 16)), ((5, 1, 18), (1, 18))]
)
def test_add_norm_repeats_fewer_rows(shape, other, rows, dtype, monkeypatch):
    """Positions, and queries that are the same for every image: in either place, by the kernel."""
    inputs = [torch.randn(shape).to(dtype), (torch.randn(other) + 3).to(dtype)]
    parameters = [torch.randn(shape[-1]).to(dtype) for _ in range(2)]
    monkeypatch.setattr("kernels.add_norm.add_norm_reference", None)
    with forced(add_norm__forward={"ROWS": rows, "num_warps": 4, "num_stages": 1}):
        for terms in (inputs, inputs[::-1]):
            compare(summed, summed_reference, [*terms, *parameters], depth=shape[-1])


def test_add_norm_takes_no_other_broadcast():
    norm, x = layer_norm(8), torch.randn(2, 3, 8)
    with torch.no_grad():
        others = [x[:, :1], x[..., :1], torch.randn(2, 2, 3, 8)[:, :1], torch.randn(1, 1, 3, 8)]
        for other in (one.contiguous() for one in others):
            assert not fuses(x, other, norm) and not fuses(other, x, norm)
            exact = add_norm_reference(x, other, norm.weight, norm.bias, norm.eps)
            torch.testing.assert_close(add_norm(x, other, norm), exact)


def test_add_norm_steps_aside_for_training_and_strides():
    norm, x = layer_norm(8), torch.randn(2, 3, 8)
    plain = add_norm_reference(x, x, norm.weight, norm.bias, norm.eps)
    found = add_norm(x, x, norm)[1]
    assert found.requires_grad and torch.equal(found, plain[1])
    with torch.no_grad():
        mixed = add_norm(x[:1], x, norm)  # the same queries for every image
        assert torch.equal(mixed[0], x[:1] + x)
        strided = x.transpose(0, 1)
        torch.testing.assert_close(add_norm(strided, strided, norm)[0], 2 * strided)


def test_add_norm_gives_the_norm_of_the_rounded_sum():
    """As if the sum had been stored in between: in bfloat16 its rounding is larger than any other error."""
    norm, x, residual = layer_norm(64, torch.bfloat16), torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        _, found = add_norm(x, residual, norm)
        exact = torch.nn.functional.layer_norm(
            (x + residual).float(), (64,), norm.weight.float(), norm.bias.float(), norm.eps
        )
    assert (found.float() - exact).abs().max() <= 2 * 2**-7 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, rows", [((2, 3, 90), 4), ((0, 8), 1), ((1, 2), 1), ((5, 300), 2)])
def test_quantize_rows_is_the_reference_bit_by_bit(shape, rows, dtype):
    x = torch.randn(shape) * torch.logspace(-6, 3, shape[-1])
    x = surrounded(x.to(dtype))
    with forced(fp8_linear__quantize={"ROWS": rows, "num_warps": 4, "num_stages": 1}):
        values, scale = quantize_rows(x)
    exact, exact_scale = quantize_rows_reference(x)
    assert torch.equal(scale, exact_scale) and torch.equal(values.view(torch.uint8), exact.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_after_gelu(dtype):
    x = surrounded(torch.randn(3, 70).to(dtype) * 3)
    values, scale = quantize_rows(x, gelu=True)
    exact = torch.nn.functional.gelu(x.double())
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)
    # half a step: three bits behind the leading one, and 2**-9 scales where the exponent ends
    error = (values.double() * scale - exact).abs()
    assert (error <= exact.abs() * 2**-4 + scale * 2**-10 * 1.01).all()


def test_rows_of_zeros_extremes_and_what_is_not_finite():
    x = torch.zeros(6, 20)
    x[1, 3], x[2, 4], x[3, 5], x[4, 6], x[5] = 3e38, float("nan"), float("inf"), 1e-45, torch.randn(20)
    values, scale = quantize_rows(x)
    found = values.float() * scale
    assert torch.equal(found[[0, 1, 4]], torch.where(x.abs() > 1e-40, x, 0.0)[[0, 1, 4]])
    assert found[2].isnan().any() and found[3].isnan().any(), "a product with such a row is NaN"
    assert torch.equal(found[5], (quantize_rows_reference(x[5])[0].float() * scale[5]))


@pytest.mark.parametrize("gelu, gelu_before", [(False, False), (True, False), (False, True)])
def test_fp8_linear_multiplies_the_quantized_rows(gelu, gelu_before):
    plain, x = torch.nn.Linear(48, 32), torch.randn(2, 7, 48)
    layer = Fp8Linear(plain, gelu)
    layer.gelu_before = gelu_before
    with torch.no_grad():
        found = layer(x)
        before = torch.nn.functional.gelu(x) if gelu_before else x
        weight, scale = quantize_rows_reference(plain.weight)
        rows, row_scale = quantize_rows_reference(before)
        exact = (rows.double() * row_scale) @ (weight.double() * scale).T + plain.bias
        exact = torch.nn.functional.gelu(exact) if gelu else exact
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.05 if gelu_before else 1e-5)


def levels(size, batch=1):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def prepared(operation, pixels, size, target, dtype=torch.float32):
    return operation(pixels, bicubic_matrix(size, target), MEAN, STD, dtype)


@pytest.mark.parametrize(
    "batch, size, target", [(1, 12, 24), (2, 7, 14), (1, 10, 17), (1, 5, 5), (0, 4, 8), (1, 5, 18)]
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
    x = far_apart(torch.randn(2, 40).half(), 0)
    assert torch.equal(quantize_rows(x)[0].view(torch.uint8), quantize_rows_reference(x)[0].view(torch.uint8))


def test_torch_compile_sees_whole_graphs():
    x, w = torch.randn(2, 3, 10), torch.randn(10)
    torch.library.opcheck(add_norm_op, (x, x, w, w, 1e-5, True))
    torch.library.opcheck(add_norm_op, (x, x[0], w, w, 1e-5, False))
    torch.library.opcheck(quantize_rows_op, (x, False))
    torch.library.opcheck(upsample_normalize_op, (levels(4), bicubic_matrix(4, 8), MEAN, STD, torch.float32))
    matrix, norm = bicubic_matrix(4, 8), layer_norm(10)

    def everything(x, pixels):
        values, scale = quantize_rows(x)
        return *add_norm(x, x, norm), values.float(), scale, upsample_normalize(pixels, matrix, MEAN, STD)

    with torch.no_grad():
        compiled = torch.compile(everything, fullgraph=True, backend="eager")(x, pixels := levels(4))
        torch.testing.assert_close(compiled, everything(x, pixels), rtol=0, atol=0)
