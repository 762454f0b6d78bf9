"""The CUDA C++ kernel without a GPU: its own code with emulated warp instructions, its builds, and what it is given."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from kernels.aot.compile import resources
from kernels.aot.manifest import TARGETS
from kernels.cuda import launch as cuda
from kernels.cuda.nvrtc import compile_cuda, library
from kernels.runtime import tuning
from kernels.runtime.launch import recording
from kernels.runtime.spec import Launch
from kernels.window_attention import window_attention_op, window_attention_reference
from tests.kernels.interpreted.checks import compare, surrounded

CONFIGS = [one for one in tuning.CANDIDATES["window_attention.forward"] if one["DESIGN"] == tuning.CUDA_DESIGN]


class Arguments(ctypes.Structure):
    _fields_ = list(cuda.PARAMETERS.items())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Run a launch by the kernel's code, compiled for the host."""
    if not shutil.which("g++"):
        pytest.skip("the emulation needs a C++ compiler: apt-get install g++")
    folder = tmp_path_factory.mktemp("emulated")

    @cache
    def built(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        out = folder / f"{len(list(folder.iterdir()))}.so"
        options = [f"-D{name}={value}" for name, value in macros] + [f'-DKERNEL="{cuda.SOURCE}"']
        source = Path(__file__).parent / "emulated_warp.cpp"
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, "-o", str(out), str(source)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(out))

    def run(start: Launch) -> None:
        windows, heads, batch = start.blocks()
        given = Arguments(*(value.value for value in cuda.parameters(start)))
        built(tuple(cuda.defines(start).items())).launch(ctypes.byref(given), heads, windows, batch, cuda.THREADS)

    return run


def recorded(qkv, bias, heads, window=12, config=CONFIGS[0]) -> tuple[Launch, torch.Tensor]:
    """The launch that the operation makes where a configuration names the CUDA kernel, and its result."""
    with tuning.forced(None, window_attention__forward=config), recording() as record:
        out = window_attention_op._init_fn(qkv, bias, heads, window)
    return record[0], out


def random_map(batch, height, width, c, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, height, width, 3 * c, generator=generator) * scale
    return x.to(dtype), (torch.randn(3 * c, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "batch, height, width, heads, scale",
    [(1, 12, 12, 1, 1.0), (2, 24, 36, 2, 1.0), (1, 13, 23, 3, 1.0), (2, 5, 12, 1, 1.0), (1, 12, 25, 1, 8.0)],
)
def test_the_kernel_agrees_with_the_reference(emulated, monkeypatch, batch, height, width, heads, scale, dtype):
    monkeypatch.setattr(cuda, "_has_compiler", lambda: True)

    def operation(qkv, bias):
        start, out = recorded(qkv, bias, heads)
        out.fill_(float("nan"))
        assert cuda.takes(start)
        emulated(start)
        return out

    def reference(qkv, bias):
        return window_attention_reference(qkv, bias, heads, 12)

    compare(operation, reference, list(random_map(batch, height, width, 32 * heads, dtype, scale)), depth=144)


def test_rows_apart_and_nan_around_them(emulated):
    qkv, bias = random_map(2, 14, 12, 64, torch.float16)
    memory = torch.full((4, 17, 15, 256), float("nan"), dtype=qkv.dtype)
    strided = memory[1:3, 2:16, 1:13, 8:200]
    strided.copy_(qkv)
    start, out = recorded(strided, bias, 2)
    emulated(start)
    exact = window_attention_reference(qkv.double(), bias.double(), 2, 12)
    assert (out.double() - exact).abs().max() <= 4 * 2**-10 * qkv.abs().max()


def test_the_parameters_are_those_of_the_source():
    text = re.search(r"\nforward\((.*?)\) \{", cuda.SOURCE.read_text(), re.DOTALL)[1]
    declared = [one.split()[-1] for one in text.replace("*", "* ").split(",")]
    assert declared == list(cuda.PARAMETERS)


def test_what_the_kernel_does_not_take(monkeypatch):
    """It goes to the Triton kernel, where this design is design 0."""
    monkeypatch.setattr(cuda, "_has_compiler", lambda: True)
    qkv, bias = random_map(1, 12, 12, 64, torch.bfloat16)
    assert cuda.takes(recorded(qkv, bias, 2)[0])
    others = [
        (qkv.float(), bias.float(), 2, 12),
        (qkv, bias, 1, 12),  # heads of 64
        (qkv, bias, 2, 6),
        (surrounded(qkv), bias, 2, 12),  # rows that are not aligned
        (qkv[..., ::2], bias[::2].contiguous(), 1, 12),
        (qkv, torch.cat([bias[:1], bias])[1:], 2, 12),
    ]
    for one in others:
        assert not cuda.takes(recorded(*one)[0])
    assert not cuda.takes(recorded(qkv, bias, 2, config=tuning.CANDIDATES["window_attention.forward"][0])[0])


def test_no_gpu_takes_it_unless_it_was_measured():
    assert all(one["DESIGN"] != tuning.CUDA_DESIGN for one in tuning._by_size("window_attention.forward"))
    assert tuning.CANDIDATES["window_attention.forward"][0]["DESIGN"] == 0
    shapes = {shape: tuning.candidates("window_attention.forward", shape) for shape in ("w12d32", "w4d32", "w12d64")}
    assert [shape for shape, found in shapes.items() if CONFIGS[0] in found] == ["w12d32"]


def test_without_nvrtc_the_triton_kernel_runs(monkeypatch):
    def missing():
        raise OSError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(cuda, "library", missing)
    cuda._has_compiler.cache_clear()
    start, _ = recorded(*random_map(1, 12, 12, 32, torch.float16), 1)
    with pytest.warns(RuntimeWarning, match="runs on its Triton kernel: NVRTC is not installed"):
        assert not cuda.takes(start)
    cuda._has_compiler.cache_clear()


def built(compiler: str, target: str, macros: dict[str, int], folder: Path) -> bytes:
    if compiler == "nvrtc":
        return compile_cuda(cuda.SOURCE, int(target.removeprefix("sm")), macros)
    options = [f"-D{name}={value}" for name, value in macros.items()]
    out = folder / "window_attention.cubin"
    command = ["nvcc", "-cubin", f"-arch={target.replace('sm', 'sm_')}", *options, "-o", str(out), str(cuda.SOURCE)]
    subprocess.run(command, check=True)
    return out.read_bytes()


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request) -> str:
    if request.param == "nvcc":
        if not shutil.which("nvcc"):
            pytest.skip("nvcc is not installed: it comes with the CUDA toolkit")
        return "nvcc"
    try:
        library()
    except OSError as error:
        pytest.skip(str(error))
    return "nvrtc"


@pytest.mark.parametrize("target", TARGETS)
def test_builds_fit_as_many_blocks_as_they_promise(compiler, target, tmp_path):
    """Registers leave room for BLOCKS; by CUDA 13.0, at most 16 bytes of a thread lie in local memory on sm90."""
    pytest.importorskip("triton", reason="cuobjdump comes with Triton: pip install triton")
    for config in CONFIGS:
        macros = {"PADDED": 0, "BLOCKS": config["GROUP"]}
        registers, spills = resources(built(compiler, target, macros, tmp_path))
        warps = -(-config["GROUP"] * cuda.THREADS // 32 // 4)  # of a quarter of the multiprocessor
        assert registers * 32 * warps <= 65536 // 4
        assert spills <= (16 if target == "sm90" else 128)


def test_a_source_that_does_not_compile_is_an_error_with_the_log(tmp_path):
    try:
        library()
    except OSError as error:
        pytest.skip(str(error))
    (tmp_path / "wrong.cu").write_text("__device__ int x = unknown;")
    with pytest.raises(ValueError, match=r"wrong.cu does not compile for sm90:\n.*unknown"):
        compile_cuda(tmp_path / "wrong.cu", 90, {})
