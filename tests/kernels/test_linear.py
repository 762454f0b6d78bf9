"""The fused linear layer against its reference: odd shapes, strides, dtypes, and where it must step aside."""

import pytest
import torch

from kernels.fp8_linear import Fp8Linear, fp8_linear_reference, quantize_rows_reference, scaled_product
from kernels.linear import Linear, gelu_epilogue, linear, linear_reference
from kernels.runtime import tuning

TOLERANCE = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 33), (2, 3, 64), (2, 5, 7, 129)])
@pytest.mark.parametrize("outputs", [1, 31, 96])
def test_agrees_with_the_reference(shape, outputs, gelu, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)
    exact = linear_reference(x.double(), weight.double(), bias.double(), gelu)
    scale = (x.abs() @ weight.abs().T).max().item() + bias.abs().max().item() if x.numel() else 1
    found = linear(x.to(dtype), weight.to(dtype), bias.to(dtype), gelu)
    assert found.dtype == dtype and found.shape == exact.shape
    # inputs and result are rounded to the dtype; a sum of n float32 terms errs by at most n units of its magnitude
    bound = scale * (4 * TOLERANCE[dtype] + shape[-1] * TOLERANCE[torch.float32])
    assert torch.allclose(found.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("gelu", [False, True])
def test_strides_and_no_bias(gelu):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 4, 3).transpose(0, 2), torch.randn(6, 10).T
    assert not x.is_contiguous() and not weight.is_contiguous()
    assert torch.allclose(linear(x, weight, None, gelu), linear_reference(x, weight, None, gelu), atol=1e-5)


def test_learns_and_traces_like_the_plain_layer():
    torch.manual_seed(0)
    layer, x = Linear(8, 4, gelu=True), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is not None
    graph = torch.export.export(layer.requires_grad_(False), (torch.randn(3, 8),)).graph
    assert not any("mkldnn" in str(node.target) for node in graph.nodes)


def test_is_used_for_inference():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    from torch.profiler import profile

    with torch.inference_mode(), profile() as record:
        Linear(8, 4, gelu=True)(torch.randn(3, 8))
    assert "mkldnn::_linear_pointwise" in {event.key for event in record.key_averages()}


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (2, 5, 7, 129)])
def test_gelu_epilogue(shape):
    """On a CPU the operator applies the exact GELU; on CUDA cuBLASLt's is at most 5e-4 away."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(31, shape[-1]), torch.randn(31)
    found = gelu_epilogue(x, weight, bias)
    assert found.shape == (*shape[:-1], 31)
    assert torch.allclose(found, linear_reference(x, weight, bias, gelu=True), rtol=0, atol=1e-3)


def test_the_tanh_approximation_is_closer_than_half_precision_rounds():
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    error = (torch.nn.functional.gelu(x, approximate="tanh") - torch.nn.functional.gelu(x)).abs()
    assert error.max() < 5e-4
    values = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.gelu(values)
    approximated = (torch.nn.functional.gelu(values, approximate="tanh") - exact).square().mean().sqrt()
    assert approximated < (exact.bfloat16().double() - exact).square().mean().sqrt() / 2


def test_the_epilogue_is_chosen_by_tuned_json(monkeypatch):
    table = {"GPU": {"kernels": {"linear.gelu": {"k256n1024": {"config": tuning.CANDIDATES["linear.gelu"][1]}}}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "_names", lambda index: ("GPU", "sm90"))
    assert tuning.tuned_constant("linear.gelu", "k256n1024", "EPILOGUE", 0) == 1
    assert tuning.tuned_constant("linear.gelu", "k512n2048", "EPILOGUE", 0) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_8_bit_floats_is_its_reference(bias):
    """torch._scaled_mm, here in its version for CPUs: layout of weights and scales, and the sum's rounding."""
    torch.manual_seed(0)
    x, scale = quantize_rows_reference(torch.randn(2, 5, 64))
    weight, weight_scale = quantize_rows_reference(torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None])
    more = torch.randn(48).bfloat16() if bias else None
    try:
        found = scaled_product(x, scale, weight, weight_scale, more)
    except RuntimeError as error:
        if "only supports per-tensor" not in str(error):
            raise
        pytest.skip("this torch multiplies rows with scales of their own on GPUs alone: pip install torch==2.13.0")
    exact = (x.double() * scale) @ (weight.double() * weight_scale).T + (more.double() if bias else 0)
    assert found.shape == (2, 5, 48) and found.dtype == torch.bfloat16
    for result in (found, fp8_linear_reference(x, scale, weight, weight_scale, more)):
        assert ((result.double() - exact).abs() <= 2**-6 * exact.abs().amax((0, 1)) + 2**-7).all()


def test_an_fp8_layer_is_close_to_its_layer_and_half_as_large():
    """Three bits behind the leading one: rounding errs by 2**-4 / sqrt(3) at most, in either operand."""
    torch.manual_seed(0)
    plain, x = Linear(256, 128).requires_grad_(False), torch.randn(64, 256)
    layer = Fp8Linear(plain)
    error = (layer(x) - plain(x)).square().mean().sqrt() / plain(x).square().mean().sqrt()
    assert 0.02 < error < 2**-4 / 3**0.5 * 2**0.5
    assert layer.weight.element_size() == 1 and not list(layer.parameters())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert Fp8Linear.takes(plain) and not Fp8Linear.takes(Linear(24, 16)) and not Fp8Linear.takes(Linear(16, 24))


def test_an_fp8_layer_compiles_whole():
    layer, x = Fp8Linear(Linear(32, 16).requires_grad_(False)), torch.randn(3, 32)
    layer.gelu_before = True
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
