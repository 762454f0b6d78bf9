"""Published checkpoints in all their forms: read, refused, converted, and written back bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.convert import identical, write_published
from tests.vlv.official import SLIM, Weights, sharded, untied
from vlv import published as command
from vlv.checkpoints import published, tensor_files
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.checkpoints.published_keys import LLM, STAGE1, TABLES
from vlv.checkpoints.published_read import convert
from vlv.checkpoints.published_write import carry_published, to_published
from vlv.model.config import PRESETS, DaViTConfig, VLVConfig


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory) -> Weights:
    """Every tensor of the plain conversion, by part."""
    folder = tmp_path_factory.mktemp("plain")
    torch.save(weights, folder / "model.pt")
    convert(
        folder / "model.pt", folder / "out", str(SLIM / "florence2"), str(SLIM / "text_encoder"), str(SLIM / "qwen")
    )
    return parts(folder / "out")


def parts(folder: Path) -> Weights:
    return {**load_file(folder / "encoder.safetensors"), **load_file(folder / "llm" / "model.safetensors")}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def without_copies(weights: Weights) -> Weights:
    """As save_pretrained stores them: of the tied tables only the first."""
    return {name: tensor for name, tensor in untied(weights).items() if name not in TABLES[1:]}


FORMS = {
    "state dict": lambda folder, w: torch.save(w, folder / "model.pt"),
    "training checkpoint": lambda folder, w: torch.save({"step": 3, "model_state_dict": w}, folder / "checkpoint_7.pt"),
    "DistributedDataParallel": lambda folder, w: torch.save(
        {"module." + name: tensor for name, tensor in w.items()}, folder / "model.pt"
    ),
    "DeepSpeed, consolidated": lambda folder, w: torch.save(w, folder / "pytorch_model.bin"),
    "DeepSpeed, sharded": lambda folder, w: sharded(folder, w, "bin"),
    "safetensors": lambda folder, w: save_file(untied(w), folder / "model.safetensors"),
    "safetensors, sharded": lambda folder, w: sharded(folder, w, "safetensors"),
    "tied tables saved once": lambda folder, w: save_file(without_copies(w), folder / "model.safetensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_and_goes_back(form: str, weights: Weights, converted: Weights, source: Path):
    FORMS[form](source, weights)
    checkpoint = convert(source, source / "out")
    assert checkpoint.can == ["caption", "to-published"]
    assert same(parts(checkpoint.folder), converted)
    back = load_file(to_published(checkpoint.folder, source / "back") / "model.safetensors")
    assert same(back, without_copies(weights) if form == "tied tables saved once" else weights)


def test_back_to_a_torch_file_with_shared_storage(weights: Weights, source: Path):
    torch.save(weights, source / "model.pt")
    convert(source, source / "out")
    back = torch.load(to_published(source / "out", source / "back.pt"), weights_only=True)
    assert list(back) == list(weights) and same(back, weights)
    assert len({back[name].data_ptr() for name in TABLES}) == 1
    assert {f.name for f in source.iterdir()} >= {"back.pt", "out"} and not list(source.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype, weights: Weights, source: Path):
    cast = {name: tensor.to(dtype) for name, tensor in untied(weights).items()}
    save_file(cast, source / "model.safetensors")
    checkpoint = convert(source, source / "out")
    assert {tensor.dtype for tensor in parts(checkpoint.folder).values()} == {dtype}
    assert json.loads((checkpoint.llm / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    assert same(load_file(to_published(source / "out", source / "back") / "model.safetensors"), cast)


def test_encoder_and_language_model_of_different_dtypes(weights: Weights, source: Path):
    mixed = {n: t.to(torch.bfloat16) if n.startswith(LLM) else t for n, t in untied(weights).items()}
    save_file(mixed, source / "model.safetensors")
    convert(source, source / "out")
    assert same(load_file(to_published(source / "out", source / "back") / "model.safetensors"), mixed)


def test_mixed_dtypes_within_one_of_our_tensors_are_named_and_can_be_cast(weights: Weights, source: Path):
    layer = f"{STAGE1}model.language_model.model.encoder.layers.0.self_attn"
    mixed = {**weights, f"{layer}.q_proj.weight": weights[f"{layer}.q_proj.weight"].float()}
    torch.save(mixed, source / "model.pt")
    with pytest.raises(CheckpointError, match=r"q_proj.weight float32, .*k_proj.weight float16.*--dtype"):
        convert(source, source / "out")
    checkpoint = convert(source, source / "out", dtype=torch.float32)
    assert {tensor.dtype for tensor in parts(checkpoint.folder).values()} == {torch.float32}


@pytest.mark.parametrize("head", ["absent", "aliased", "equal", "different"])
def test_tied_heads(head: str, weights: Weights, source: Path):
    """A configuration that ties the head is obeyed, unless the checkpoint has trained them apart."""
    config = json.loads((source / "qwen" / "config.json").read_text())
    (source / "qwen" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    name, table = LLM + "lm_head.weight", weights[LLM + "model.embed_tokens.weight"]
    tied = {n: t for n, t in weights.items() if n != name}
    if head != "absent":
        tied[name] = {"aliased": table, "equal": table.clone(), "different": table + 1}[head]
    torch.save(tied, source / "model.pt")
    checkpoint = convert(source, source / "out")
    written = json.loads((checkpoint.llm / "config.json").read_text())["tie_word_embeddings"]
    assert written == (head != "different")
    assert ("lm_head.weight" in load_file(checkpoint.llm / "model.safetensors")) == (head == "different")
    back = load_file(to_published(checkpoint.folder, source / "back") / "model.safetensors")
    assert same(back, tied)


@pytest.mark.parametrize("prefix", ["", STAGE1])
def test_stage_one(prefix: str, weights: Weights, source: Path):
    """Without a language model, its names bare as SDModel saves them, and with the frozen UNet and VAE."""
    stage1 = {prefix + name.removeprefix(STAGE1): tensor for name, tensor in weights.items() if name.startswith(STAGE1)}
    stage1 |= {
        f"{prefix}unet.conv_in.weight": torch.ones(4, 3, 3, 3),
        f"{prefix}vae.post_quant_conv.bias": torch.ones(4),
    }
    torch.save({"model_state_dict": stage1}, source / "checkpoint_10000.pt")
    (source / "sd" / "vae").mkdir(parents=True)
    (source / "sd" / "model_index.json").write_text("{}")
    (source / "sd" / "vae" / "config.json").write_text("{}")
    checkpoint = convert(source, source / "out", t2i=source / "sd")
    assert checkpoint.can == ["reconstruct", "to-published"] and (checkpoint.t2i / "vae" / "config.json").is_file()
    assert checkpoint.load_encoder().to_llm is None
    with pytest.raises(CheckpointError, match="stage-1"):
        _ = checkpoint.llm
    assert same(load_file(to_published(checkpoint.folder, source / "back") / "model.safetensors"), stage1)


def test_what_was_trained_since_goes_back(weights: Weights, source: Path):
    from vlv.checkpoints import folder as folders

    torch.save(weights, source / "model.pt")
    checkpoint = convert(source, source / "out")
    encoder = checkpoint.load_encoder()
    encoder.bottleneck.prompt += 1
    encoder.bottleneck.text.positions *= 2
    folders.save(checkpoint.folder, encoder, torch.float16)
    back = load_file(to_published(checkpoint.folder, source / "back") / "model.safetensors")
    assert torch.equal(back[TABLES[0]][47066], (weights[TABLES[0]][47066].float() + 1).half())
    positions = f"{STAGE1}text_encoder.text_model.embeddings.position_embedding.weight"
    assert torch.equal(back[positions], weights[positions] * 2)


SIZES = {
    "tiny": PRESETS["tiny"],
    "odd": VLVConfig(
        vision=DaViTConfig(
            dims=(24, 48, 80), heads=(3, 4, 8), groups=(2, 6, 10), depths=(2, 1, 1), patches=(7, 3, 3),
            strides=(4, 2, 2), paddings=(3, 1, 1), prenorm=(False, True, True), window=5,
        ),
        image_size=100, upsample=3, image_positions=21, width=96, heads=6, ffn=80, encoder_layers=1, decoder_layers=3,
        text_positions=500, queries=31, context_width=48, context_heads=3, context_ffn=200, context_layers=1,
        context_activation="quick_gelu", llm_width=192,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_other_sizes_are_read_from_the_tensors(config: VLVConfig, kind: str, tmp_path: Path):
    config = replace(config, prompt_tokens=14)
    write_published(tmp_path, config, "tiny", torch.float16, kind)
    checkpoint = convert(tmp_path, tmp_path / "out", image_size=config.image_size)
    assert checkpoint.config == config
    encoder = checkpoint.load_encoder()
    pixels = torch.randint(0, 256, (1, 3, config.image_size, config.image_size), dtype=torch.uint8)
    assert encoder(pixels).shape == (1, config.queries, config.llm_width)
    assert identical(tmp_path, to_published(checkpoint.folder, tmp_path / ("back.pt" if kind == "pt" else "back")))


def test_mappings_are_dropped_in_between(weights: Weights, converted: Weights, source: Path, monkeypatch):
    """With a budget of 100 kB the files are mapped anew for every few tensors, on reading and on writing."""
    monkeypatch.setattr(tensor_files, "_MAPPED", 100_000)
    torch.save(weights, source / "model.pt")
    checkpoint = convert(source, source / "out")
    assert same(parts(checkpoint.folder), converted)
    assert same(torch.load(to_published(checkpoint.folder, source / "back.pt"), weights_only=True), weights)


def test_resolve_converts_once(weights: Weights, source: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(weights, source / "model.pt")
    first = published.resolve(source / "model.pt")
    assert first.folder.is_relative_to(tmp_path / "cache" / "vlv" / "published")
    monkeypatch.setattr("vlv.checkpoints.published.convert", None)
    assert published.resolve(source / "model.pt").folder == first.folder
    assert published.resolve(first.folder) == Checkpoint.open(first.folder)


def test_hub_ids_come_from_the_cache_or_fail_in_one_sentence(weights: Weights, tmp_path: Path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="cannot get someone/model from the Hugging Face hub") as caught:
        published.fetch("someone/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"removed its Stable Diffusion 2 repositories; mirrors .*sd2-community/"):
        published.fetch("stabilityai/stable-diffusion-2-1-base")
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "abc"
    shutil.copytree(SLIM, snapshot, ignore=lambda *_: ["weights.safetensors"])
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    torch.save(weights, snapshot / "model.pt")
    assert convert(published.fetch("someone/model"), tmp_path / "out").can == ["caption", "to-published"]


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    code = command.main([*arguments])
    return code, *capsys.readouterr()


def test_command(weights: Weights, source: Path, capsys):
    torch.save(weights, source / "model.pt")
    code, out, _ = run(str(source), "--out", str(source / "out"), capsys=capsys)
    assert code == 0 and json.loads(out)["can"] == ["caption", "to-published"]
    code, out, _ = run(str(source / "out"), "--to-published", "--out", str(source / "b.pt"), capsys=capsys)
    assert code == 0 and json.loads(out) == {"published": str(source / "b.pt")}
    code, out, err = run(str(source / "no"), "--out", str(source / "x"), capsys=capsys)
    assert code == 2 and err.startswith("error: no checkpoint at ") and not out
    code, _, err = run("--out", str(source / "x"), capsys=capsys)
    assert code == 2 and "either SRC or --random-weights" in err


def test_random_weights_make_a_whole_checkpoint(tmp_path: Path):
    from vlv.checkpoints.random_weights import write
    from vlv.model.captioner import Captioner

    checkpoint = write("tiny", tmp_path / "random", "float32")
    captioner = Captioner.load(checkpoint)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert 0.3 < captioner.encoder(pixels).std() < 3  # the scales hold through all layers
    assert all(isinstance(text, str) for text in captioner.captions(pixels, max_new_tokens=5))
    with pytest.raises(CheckpointError, match=r"no published\.safetensors"):
        to_published(checkpoint.folder, tmp_path / "back")


def test_help_needs_no_torch():
    code = (
        "import sys, vlv.published, vlv.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_that_added_the_language_model_goes_back(weights: Weights, source: Path, tmp_path: Path):
    """Stage 1 is converted, stage 2 trained from it elsewhere: the published stage-2 file has every published name."""
    torch.save({n.removeprefix(STAGE1): w for n, w in weights.items() if n.startswith(STAGE1)}, source / "model.pt")
    start = convert(source / "model.pt", tmp_path / "start")
    assert start.config.llm_width == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    torch.save(weights, whole / "model.pt")
    beside = [str(source / name) for name in ("florence2", "text_encoder", "qwen")]
    trained = convert(whole / "model.pt", tmp_path / "trained", *beside)  # stands for the trained weights
    (trained.folder / "published.safetensors").unlink()
    with pytest.raises(CheckpointError, match="trained from was converted"):
        to_published(trained.folder, tmp_path / "back.pt")
    carry_published(start.folder, trained.folder)
    carry_published(start.folder, trained.folder)
    back = torch.load(to_published(trained.folder, tmp_path / "back.pt"), weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    again = convert(tmp_path / "back.pt", tmp_path / "again", *beside)
    assert same(parts(again.folder), parts(trained.folder))


def test_another_language_model_goes_back(weights: Weights, source: Path, tmp_path: Path):
    """Trained on with a model of fewer layers: its tensors take the place of those that were converted."""
    torch.save(weights, source / "model.pt")
    checkpoint = convert(source / "model.pt", source / "out")
    llm = load_file(checkpoint.folder / "llm" / "model.safetensors")
    last = max(int(name.split(".")[2]) for name in llm if ".layers." in name)
    fewer = {name: tensor for name, tensor in llm.items() if f".layers.{last}." not in name}
    save_file(fewer, checkpoint.folder / "llm" / "model.safetensors")
    back = load_file(to_published(checkpoint.folder, tmp_path / "back") / "model.safetensors")
    assert back.keys() == {name for name in weights if f"{LLM}model.layers.{last}." not in name}
    assert all(torch.equal(back[name], weights[name]) for name in back)
