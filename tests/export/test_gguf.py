"""The language model as GGUF: its numbers against the gguf package's, its captions against transformers'."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from export import gguf as command
from export.manifest import Manifest
from tests.export.conftest import BUNDLED
from vlv.checkpoints.llm_folder import end_token_ids
from vlv.common.command import INSTALL, explain

pytest.importorskip("xllamacpp", reason=INSTALL["xllamacpp"])
pytest.importorskip("gguf", reason=INSTALL["gguf"])

import gguf

from export.builders.gguf import ENDS, GGUFError, cached_gguf, write_gguf
from export.runtimes import llama_library
from export.runtimes.llama_library import Entry, Llama, LlamaError

LLM = BUNDLED / "llm"
LAYERS = 8


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Qwen2 model with random weights whose widths 256 divides, and a head of its own; the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("wide") / "llm"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=460, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    AutoTokenizer.from_pretrained(LLM).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the bundled language model, to change."""
    return Path(shutil.copytree(LLM, tmp_path / "copy"))


def update(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def read(file: Path) -> dict[str, gguf.gguf_reader.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Return the folder's weights in float32 as transformers loads them, by the names of the gguf package."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {names.get_name(name, try_suffixes=(".weight", ".bias")): value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("source", ["bundled", "wide"])
def test_float32_holds_the_weights(source, wide, tmp_path):
    """Of float16 in one file, and of bfloat16 in several; float16 too, where the values fit."""
    folder = LLM if source == "bundled" else wide
    expected = weights_of(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (source == "wide")
    report = write_gguf(folder, tmp_path / "f32.gguf", "f32")
    found = read(tmp_path / "f32.gguf")
    assert found.keys() == expected.keys() and report["tensors"] == {"F32": len(expected)}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.data, expected[name])
    write_gguf(folder, tmp_path / "f16.gguf", "f16")
    for name, tensor in read(tmp_path / "f16.gguf").items():
        assert tensor.data.dtype == (np.float16 if expected[name].ndim == 2 else np.float32)
        np.testing.assert_array_equal(tensor.data, expected[name].astype(tensor.data.dtype))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_those_of_the_gguf_package(kind, tmp_path):
    """Its quantizer is another implementation of the same types, in NumPy."""
    report = write_gguf(LLM, tmp_path / "q.gguf", kind)
    expected, types = weights_of(LLM), {"F32": 21, kind.upper(): 29}
    if kind == "q4_0":  # the output layer has more bits
        types = {"F32": 21, "Q4_0": 28, "Q8_0": 1}
        assert report["fallbacks"] == {
            "token_embd.weight": "Q8_0 instead of Q6_K, whose blocks of 256 do not fit a width of 128"
        }
    assert report["tensors"] == types
    for name, tensor in read(tmp_path / "q.gguf").items():
        if expected[name].ndim == 2:
            np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(expected[name], tensor.tensor_type))


def test_k_quants(wide, tmp_path):
    """The mixture of Q4_K_M for 8 layers, and the error of its types, by the gguf package's dequantization."""
    report = write_gguf(wide, tmp_path / "q.gguf", "q4_k_m")
    expected, found = weights_of(wide), read(tmp_path / "q.gguf")
    assert report["fallbacks"] == {}
    larger = {f"blk.{i}.{name}.weight" for i in (0, 3, 6, 7) for name in ("attn_v", "ffn_down")} | {"output.weight"}
    assert {name for name, tensor in found.items() if tensor.tensor_type.name == "Q6_K"} == larger
    matrices = {name for name, value in expected.items() if value.ndim == 2}
    assert {name for name, tensor in found.items() if tensor.tensor_type.name == "Q4_K"} == matrices - larger
    for name in matrices:
        restored = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        error = np.sqrt(np.square(restored - expected[name]).mean() / np.square(expected[name]).mean())
        assert error < (0.03 if name in larger else 0.1), name  # normal weights: 6 and 4 bits


def test_widths_that_forbid_a_type_are_named(tmp_path):
    report = write_gguf(LLM, tmp_path / "q.gguf", "q4_k_m")
    matrices = {name for name, value in weights_of(LLM).items() if value.ndim == 2}
    assert report["fallbacks"].keys() == matrices and report["tensors"] == {"F32": 21, "Q5_0": 24, "Q8_0": 5}
    found = read(tmp_path / "q.gguf")
    assert all(sentence.startswith(found[name].tensor_type.name) for name, sentence in report["fallbacks"].items())
    assert report["fallbacks"]["blk.1.ffn_down.weight"].endswith("Q4_K, whose blocks of 256 do not fit a width of 384")


def test_the_tokenizer_and_sizes_are_described(copy, tmp_path):
    update(copy / "generation_config.json", eos_token_id=[7, 0])
    write_gguf(copy, tmp_path / "x.gguf", "f16")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(455))
    merges = json.loads((copy / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [f"{a} {b}" for a, b in merges]
    assert fields[ENDS] == list(end_token_ids(copy, tokenizer)) == [0, 7]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (0, 7)
    assert fields["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.bos_token_id" not in fields
    sizes = ("context_length", "embedding_length", "block_count", "attention.head_count", "attention.key_length")
    assert [fields[f"qwen2.{name}"] for name in sizes] == [1024, 128, 4, 2, 64]
    assert fields["qwen2.rope.freq_base"] == 10000 and fields["qwen2.attention.layer_norm_rms_epsilon"] < 2e-6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"num_hidden_layers": 0}, "layers is 0, expected a number above 0"),
        ({"num_attention_heads": 0}, "does not describe a Qwen2 model: ZeroDivisionError"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"head_dim": 32}, "2 heads of 32 numbers and a hidden size of 128"),
        ({"num_hidden_layers": 5}, "missing model.layers.4.input_layernorm.weight"),
        ({"tie_word_embeddings": False}, "missing lm_head.weight"),
        ({"intermediate_size": 512}, r"model.layers.0.mlp.down_proj.weight is \[128, 384\], expected \[128, 512\]"),
        ({"vocab_size": 300}, r"is \[455, 128\], expected \[300, 128\]"),
    ],
)
def test_models_that_would_run_otherwise_are_refused(values, words, copy, tmp_path):
    update(copy / "config.json", **values)
    with pytest.raises(GGUFError, match=words):
        write_gguf(copy, tmp_path / "out" / "x.gguf", "f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("lora", "has LoRA tensors .*merge them"),
        ("adapter", "is a LoRA adapter: merge it"),
        ("wrapper", "was saved from a wrapper"),
        ("nan", "weights that are not finite"),
        ("huge", "token_embd.weight has weights above 65,504"),
        ("bin", "model.safetensors is missing"),
        ("merges", "no byte-pair tokenizer with merges"),
    ],
)
def test_folders_that_cannot_be_written_are_refused(damage, words, copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    if damage == "lora":
        weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 128)
    elif damage == "wrapper":
        weights = {f"module.{name}": value for name, value in weights.items()}
    elif damage == "adapter":
        (copy / "adapter_config.json").write_text("{}")
    elif damage == "nan":
        weights["model.norm.weight"][3] = float("nan")
    elif damage == "huge":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].float() * 1e6
    elif damage == "merges":
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        update(copy / "tokenizer.json", model={**tokenizer["model"], "merges": []})
    save_file(weights, copy / "model.safetensors")
    if damage == "bin":
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    out = tmp_path / "out"
    with pytest.raises(GGUFError, match=words):
        write_gguf(copy, out / "x.gguf", "f16")
    assert not out.exists() or not list(out.iterdir())


def test_a_tied_head_that_is_stored_too_is_left_out(copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    write_gguf(copy, tmp_path / "x.gguf", "f32")
    assert "output.weight" not in read(tmp_path / "x.gguf") and len(read(tmp_path / "x.gguf")) == len(weights)


def test_writing_needs_neither_torch_nor_transformers(tmp_path):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from pathlib import Path
from export.builders.gguf import write_gguf
print(write_gguf(Path({str(LLM)!r}), Path({str(tmp_path / "x.gguf")!r}), "q4_0")["bytes"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == (tmp_path / "x.gguf").stat().st_size


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    code = f"""
import sys
sys.modules["gguf"] = None
from export.gguf import main
sys.exit(main(["--ckpt", {str(BUNDLED)!r}, "--out", {str(tmp_path)!r}]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr.splitlines()[-1]) == (1, "error: gguf is not installed: pip install gguf")

    def absent(name):
        raise llama_library.PackageNotFoundError(name)

    monkeypatch.setattr(llama_library, "version", absent)
    with pytest.raises(LlamaError, match=r"xllamacpp is not installed: pip install .*xllamacpp==2026\.10\.11549"):
        llama_library.library.__wrapped__()


def test_another_version_of_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(llama_library, "version", lambda name: "2026.11.1")
    with pytest.raises(LlamaError) as caught:
        llama_library.library.__wrapped__()
    code, sentence = explain(caught.value)
    assert code == 1 and sentence.startswith("xllamacpp 2026.11.1 is installed") and "==2026.10.11549" in sentence


def test_the_structures_are_those_of_the_library():
    """llama.cpp's documented defaults lie where the declared fields are."""
    context = llama_library.library().llama_context_default_params()
    assert (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
    assert (context.rope_scaling_type, context.pooling_type, context.attention_type) == (-1, -1, -1)
    assert (context.flash_attn_type, context.yarn_ext_factor, context.yarn_beta_slow) == (-1, -1, -1)
    assert (context.type_k, context.type_v) == (1, 1)  # float16
    flags = [context.embeddings, context.offload_kqv, context.no_perf, context.op_offload, context.swa_full]
    assert flags == [False, True, True, True, True] and not context.kv_unified and not context.ctx_other
    model = llama_library.library().llama_model_default_params()
    assert (model.load_mode, model.split_mode, model.main_gpu) == (-1, 1, 0)
    assert model.use_extra_bufts and not model.vocab_only and not model.check_tensors and not model.tensor_split


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    write_gguf(LLM, file := tmp_path_factory.mktemp("llama") / "f32.gguf", "f32")
    llama = Llama(file, sequences=3, positions=300, threads=1, batch=64)
    yield llama
    llama.close()
    llama.close()


def prompt(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 128)).astype(np.float32)


def test_embeddings_and_tokens_share_a_step(llama):
    """A step of both gives the logits that transformers computes for each sequence by itself."""
    model = AutoModelForCausalLM.from_pretrained(LLM, dtype=torch.float32)
    table, tokens = model.get_input_embeddings().weight, [5, 70]

    def expected(*parts) -> np.ndarray:
        rows = torch.cat([torch.from_numpy(p) if isinstance(p, np.ndarray) else table[[p]] for p in parts])
        with torch.inference_mode():
            return model(inputs_embeds=rows[None]).logits[0, -1].numpy()

    first, other = prompt(0), prompt(1, 11)
    close = {"rtol": 1e-3, "atol": 2e-2}  # the cache is float16
    np.testing.assert_allclose(llama.step([Entry(0, 0, first)])[0], expected(first), **close)
    found = llama.step([Entry(0, 8, tokens[0]), Entry(2, 0, other)]).copy()
    np.testing.assert_allclose(found, [expected(first, tokens[0]), expected(other)], **close)
    found = llama.step([Entry(2, 11, tokens[1]), Entry(0, 9, tokens[1])]).copy()
    np.testing.assert_allclose(found, [expected(other, tokens[1]), expected(first, *tokens)], **close)
    llama.release(0)
    np.testing.assert_allclose(llama.step([Entry(0, 0, other)])[0], expected(other), **close)
    llama.release(0)
    llama.release(2)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([Entry(3, 0, 1)], "sequence 3: expected 0 to 2"),
        ([Entry(0, 0, 455)], "token 455: expected 0 to 454"),
        ([Entry(0, 0, -1)], "token -1"),
        ([Entry(0, 1024, 1)], "position 1024: the model takes 1024"),
        ([Entry(0, 1020, prompt(0))], "position 1027: the model takes 1024"),
        ([Entry(0, 0, prompt(0).astype(np.float64))], r"embeddings float64 \[8, 128\]: expected float32 \[n, 128\]"),
        ([Entry(0, 0, prompt(0)[:, :64])], r"embeddings float32 \[8, 64\]"),
        ([Entry(0, 0, prompt(0)[:, ::-1])], "each row contiguous"),
        ([Entry(0, 0, prompt(0) * np.float32("nan"))], "expected finite numbers"),
        ([Entry(0, 0, prompt(0, 65))], "a step of 65 rows: expected 1 to 64"),
        ([Entry(0, 0, 1), Entry(0, 1, 2)], "each sequence once"),
        ([], "a step of 0 rows"),
    ],
)
def test_what_llama_cpp_must_not_get_is_refused_before(entries, words, llama):
    """Some of these would end the process."""
    with pytest.raises(ValueError, match=words):
        llama.step(entries)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such file format" * 100, None])
def test_files_that_cannot_be_loaded_are_refused(content, tmp_path):
    file = tmp_path / "x.gguf"
    write_gguf(LLM, file, "f16")
    file.write_bytes(file.read_bytes()[:-100_000] if content is None else content)
    with pytest.raises(LlamaError, match=r"llama\.cpp cannot load .*x\.gguf: .+"):
        Llama(file, 1, 64, 1)
    with pytest.raises(LlamaError, match=r"257 sequences: llama\.cpp decodes 1 to 256 together"):
        Llama(file, 257, 64, 1)


def test_the_cache_is_written_once_and_follows_the_weights(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = cached_gguf(copy, "q8_0")
    time = file.stat().st_mtime_ns
    assert (
        file.is_relative_to(tmp_path / "cache" / "vlv") and "writing the language model once" in capsys.readouterr().err
    )
    assert cached_gguf(copy, "q8_0") == file and file.stat().st_mtime_ns == time and not capsys.readouterr().err
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, copy / "model.safetensors")
    assert len({file, cached_gguf(copy, "q8_0"), cached_gguf(copy, "f16")}) == 3
    assert len(list(file.parent.iterdir())) == 3  # nothing half written


def test_export_verifies_on_256_unseen_scenes(tmp_path, capsys):
    """float32 writes transformers' tokens, 4 bits captions as true of the scenes; a second run has nothing to do."""
    args = ["--ckpt", str(BUNDLED), "--out", str(tmp_path / "out"), "--types", "f32", "q4_0"]
    assert command.main(args) == 0
    table = capsys.readouterr().out
    assert "llm@gguf-f32" in table and "256 of 256" in table
    manifest = Manifest.open(tmp_path / "out")
    exact, small = (manifest.checked("llm", "gguf", kind) for kind in ("f32", "q4_0"))  # with their hashes
    assert exact.verification["captions_equal"] == exact.verification["scenes"] == 256
    assert exact.verification["agreement"] == 1 and exact.verification["problems"] == []
    assert small.verification["captions_equal"] < 256 and small.verification["agreement"] > 0.98
    assert min(small.verification["claims"].values()) >= 0.99
    assert "token_embd.weight" in small.verification["fallbacks"] and "xllamacpp 2026" in small.builder
    assert small.files["llm-q4_0.gguf"]["bytes"] < exact.files["llm-f32.gguf"]["bytes"] / 6
    assert command.main(args) == 0
    assert capsys.readouterr().err.splitlines() == ["f32: up to date", "q4_0: up to date"]


@pytest.mark.parametrize(
    ("positions", "code", "words"),
    [(40, 0, "f32: verified"), (32, 1, "has 32 positions, and an image's embeddings fill 32: no text fits")],
)
def test_a_model_with_few_positions(positions, code, words, tmp_path, capsys):
    """An image takes 32 of them; what is left bounds the captions that are compared."""
    shutil.copytree(BUNDLED, tmp_path / "ckpt", ignore=shutil.ignore_patterns("t2i"))
    update(tmp_path / "ckpt" / "llm" / "config.json", max_position_embeddings=positions)
    args = ["--ckpt", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--scenes", "4", "--types", "f32"]
    assert command.main(args) == code
    assert words in capsys.readouterr().err
    if code == 0:
        checked = Manifest.open(tmp_path / "out").checked("llm", "gguf", "f32").verification
        assert checked["tokens"] == 4 * (40 - 32) and checked["captions_equal"] == 4


def test_a_type_that_drifts_is_refused(tmp_path, capsys):
    """Weights of one channel a thousand times the others': in float32 the same model, in blocks of 4 bits another."""
    shutil.copytree(BUNDLED, tmp_path / "ckpt", ignore=shutil.ignore_patterns("t2i"))
    file = tmp_path / "ckpt" / "llm" / "model.safetensors"
    weights = {name: value.float() for name, value in load_file(file).items()}
    for i in range(4):
        weights[f"model.layers.{i}.mlp.up_proj.weight"][::32] /= 1000
        weights[f"model.layers.{i}.mlp.down_proj.weight"][:, ::32] *= 1000
    save_file(weights, file, metadata={"format": "pt"})
    args = [
        "--ckpt",
        str(tmp_path / "ckpt"),
        "--out",
        str(tmp_path / "out"),
        "--scenes",
        "16",
        "--types",
        "f32",
        "q4_0",
    ]
    assert command.main(args) == 1
    error = capsys.readouterr().err
    assert "error: q4_0: it writes " in error and "at least 96.00% are required" in error
    assert "error: q4_0: objects: " in error and "refused, and nothing kept" in error
    assert list(Manifest.open(tmp_path / "out").artifacts) == ["llm@gguf-f32"]
    assert not (tmp_path / "out" / "llm-q4_0.gguf").exists()
    assert command.main([*args, "--allow-drift"]) == 0
    kept = Manifest.open(tmp_path / "out").checked("llm", "gguf", "q4_0")
    assert len(kept.verification["problems"]) >= 2 and "--allow-drift" in kept.command
