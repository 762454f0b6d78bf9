"""What vLLM is started with, computed for cards and models that are not here, and what it makes of it."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest

from serve.engines import vllm_settings
from serve.engines.base import LLMSpec
from serve.engines.vllm_settings import (
    ENCODER_OVERHEAD,
    Device,
    encoder_bytes,
    flashinfer_problem,
    graph_sizes,
    settings,
    weight_bytes,
)
from serve.reports.capacity import capacity, sizes_of
from vlv.checkpoints.folder import Checkpoint

H200, L4 = Device(True, 141 << 30), Device(True, 23 << 30)


def llm(folder, parameters: int, dtype: str, width: int) -> None:
    """Write the header of a safetensors file of so many parameters; the file is sparse."""
    header = json.dumps(
        {"w": {"dtype": dtype, "shape": [parameters], "data_offsets": [0, parameters * width]}}
    ).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + parameters * width)


@pytest.fixture
def qwen(tmp_path) -> LLMSpec:
    """Qwen2.5-3B: 36 layers with 2 heads of 128 for keys and values, 3.09 billion parameters in bfloat16."""
    llm(tmp_path, 3_085_938_688, "BF16", 2)
    return LLMSpec(tmp_path, 77, 2048, 32768, 2 * 36 * 2 * 128)


def test_a_large_card_decodes_512_with_graphs_up_to_them(qwen):
    found = settings(H200, qwen, 300)
    assert found.in_flight == 512 and not found.notes
    arguments = found.arguments
    assert arguments["compilation_config"]["cudagraph_capture_sizes"][-1] == arguments["max_num_seqs"] == 512
    assert arguments["max_num_batched_tokens"] == 8192 and arguments["max_model_len"] == 377
    assert arguments["enable_prefix_caching"] is False and "async_scheduling" not in arguments  # vLLM's own: on


def test_a_small_card_decodes_what_its_memory_takes(qwen):
    """23 GiB: 0.8 of it less 3 GB and 6.2 GB of weights leaves 10.6 GB; a caption of 377 tokens has 13.9 MB."""
    assert settings(L4, qwen, 300).in_flight == 512  # 762 fit
    eight = Device(True, 12 << 30)  # 1.1 GB is left: 81 captions
    assert settings(eight, qwen, 300).in_flight == 64
    assert settings(eight, qwen, 300, quantization="fp8").in_flight == 256  # 3.1 GB more: 304
    assert settings(eight, qwen, 300, cache_dtype="fp8").in_flight == 128  # half the cache: 163
    assert settings(Device(True, 6 << 30), qwen, 300).in_flight == 16  # it will not start; but that is vLLM's to say
    (note,) = settings(eight, qwen, 300, in_flight=512).notes
    assert note == "--in-flight 512: the memory takes about 81 captions of 377 tokens at a time; the others wait"


def test_what_is_asked_for_is_given_with_graphs(qwen):
    """Above 512 vLLM's own list ends: 54.9 captions/s instead of 79.7 (benchmarks/gpu/h200.json)."""
    arguments = settings(H200, qwen, 300, in_flight=768).arguments
    assert arguments["max_num_seqs"] == arguments["compilation_config"]["cudagraph_capture_sizes"][-1] == 768
    assert settings(H200, qwen, 300, in_flight=10_000).arguments["max_num_batched_tokens"] == 10_000


@pytest.mark.parametrize("in_flight", [1, 5, 8, 32, 100, 128, 256, 512, 1000])
def test_graph_sizes(in_flight):
    sizes = graph_sizes(in_flight)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == in_flight
    for size in range(1, in_flight + 1):
        padded = next(s for s in sizes if s >= size)
        assert padded - size < 32 and (size < 64 or padded < 1.25 * size)
    assert len(graph_sizes(512)) == 25


def test_vllm_shares_a_process_with_a_cache_of_a_known_size(qwen):
    """Its own measurement of what is free would count the encoder."""
    assert settings(H200, qwen, 300, shared=True).arguments["kv_cache_memory_bytes"] == 512 * 377 * 18432 * 2
    assert "kv_cache_memory_bytes" not in settings(H200, qwen, 300).arguments


def test_a_small_card_leaves_the_encoder_its_memory(qwen):
    """23 GiB less 9.8 GB of the encoder, 3 and 6.2 GB leave 5.7 GB: 412 captions, as --plan says (256 fit, 512 not)."""
    found = settings(L4, qwen, 300, encoder=9_800_000_000)
    assert found.in_flight == 256 and found.arguments["gpu_memory_utilization"] == 0.603 and not found.notes
    assert settings(H200, qwen, 300, encoder=9_800_000_000).arguments["gpu_memory_utilization"] == 0.8
    (note,) = settings(Device(True, 16 << 30), qwen, 300, encoder=9_800_000_000).notes
    assert note.startswith("the GPU has 17.2 GB, of which the encoder needs about 9.8 and the language model 9.2: room")
    assert not settings(Device(True, 16 << 30), qwen, 300, encoder=4_700_000_000).notes  # --prompt-batch 8


@pytest.mark.parametrize("batch", [8, 32])
def test_the_encoders_memory_is_not_underestimated(batch, tmp_path):
    """Its layers are run on tensors without data, and those that are alive at a time added up."""
    config, llm_config = sizes_of("qwen2.5-3b")
    found = capacity(config, llm_config, batch=batch)
    checkpoint = Checkpoint(tmp_path, config)
    llm(tmp_path, found.encoder // 2, "F32", 4)
    (tmp_path / "model.safetensors").rename(checkpoint.encoder_file)
    estimate = encoder_bytes(checkpoint, batch) - ENCODER_OVERHEAD
    assert 1 <= estimate / (found.encoder + found.activations) < 1.2


def test_two_cards_share_the_weights(qwen):
    eight = Device(True, 12 << 30)
    found = settings(eight, qwen, 300, devices=2)
    assert found.in_flight == 512 and found.arguments["tensor_parallel_size"] == 2  # 616 fit


def test_a_cpu_gets_a_cache_for_all_requests_and_no_graphs(qwen):
    """In float32; vLLM keeps one block of 32 tokens empty. At most a quarter of the memory that is free."""
    found = settings(Device(False, 256 << 30), qwen, 300, in_flight=10)
    assert found.arguments["kv_cache_memory_bytes"] == (10 * 12 + 1) * 32 * 18432 * 4
    assert found.arguments["enforce_eager"] and "compilation_config" not in found.arguments
    small = settings(Device(False, 1 << 30), qwen, 300)
    assert small.in_flight == 256 and small.arguments["kv_cache_memory_bytes"] == 1 << 28


def test_weights_as_a_card_holds_them(tmp_path):
    """float32 becomes bfloat16; what is quantised stays; without safetensors the files' size counts."""
    llm(tmp_path, 1000, "F32", 4)
    assert weight_bytes(tmp_path) == 2000
    llm(tmp_path, 1000, "F8_E4M3", 1)
    assert weight_bytes(tmp_path) == 1000
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(300))
    assert weight_bytes(tmp_path) == 300


def test_vllm_takes_the_arguments(captioning_checkpoint):
    """The names are those of its own configuration, which it completes without a GPU."""
    pytest.importorskip("vllm")
    from vllm import AsyncEngineArgs

    spec = LLMSpec.of(Checkpoint.open(captioning_checkpoint))
    cuda = settings(H200, spec, 48).arguments
    assert set(cuda) <= set(AsyncEngineArgs.__dataclass_fields__)
    compilation = AsyncEngineArgs(model=str(spec.folder), **cuda).compilation_config
    assert compilation.cudagraph_capture_sizes == graph_sizes(512)
    cpu = settings(Device(False, 8 << 30), spec, 48, in_flight=32).arguments
    config = AsyncEngineArgs(model=str(spec.folder), enable_prompt_embeds=True, **cpu).create_engine_config()
    scheduler = config.scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (32, 2048)
    assert not config.cache_config.enable_prefix_caching and config.compilation_config.cudagraph_capture_sizes == []


def test_flashinfer_needs_a_compiler_or_its_compiled_kernels(tmp_path, monkeypatch):
    """vLLM 0.26 with flashinfer and without nvcc would end when it first samples, as after pip install vllm alone."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(vllm_settings, "CUDA", str(tmp_path / "nowhere"))
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec("flashinfer") is None:
        assert "flashinfer is not installed" in flashinfer_problem()
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer/__init__.py").touch()
    importlib.invalidate_caches()
    assert "flashinfer finds no nvcc" in flashinfer_problem()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    assert flashinfer_problem() is None  # on PATH
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))  # which flashinfer then takes alone
    assert "flashinfer finds no nvcc" in flashinfer_problem()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert flashinfer_problem() is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    (tmp_path / "flashinfer_jit_cache.py").touch()
    importlib.invalidate_caches()
    assert flashinfer_problem() is None
