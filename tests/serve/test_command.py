"""What the commands share: arguments that mean the same everywhere, and one way to end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import serve
from serve.command import engine_arguments, model_arguments, open_model, placement_arguments
from serve.core.model import CACHES
from serve.engines.base import OptionError
from serve.engines.vllm import VLLMEngine
from serve.engines.vllm_settings import Device
from vlv.common.command import Misuse, Parser, explain, run_command

COMMANDS = ("vllm_caption", "server", "gateway", "bench", "vllm_plugin")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_light(name):
    """No command loads a model's libraries for its --help."""
    code = f"""
import sys
from serve.{name} import parser
parser().format_help()
heavy = {{"torch", "numpy", "transformers", "vllm", "uvicorn", "aiohttp"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


@pytest.mark.parametrize("command", ["vllm_caption", "server", "ray_batch"])
def test_a_wrong_checkpoint_is_refused_before_anything_heavy(command, scene_images, tmp_path):
    """Importing PyTorch takes seconds."""
    words = {"vllm_caption": [str(scene_images)], "server": [], "ray_batch": [str(scene_images), str(tmp_path / "out")]}
    code = f"""
import sys
from serve.{command} import main
assert main({[*words[command], "--ckpt", "/no/such"]}) == 2
heavy = {{"torch", "transformers", "vllm", "ray"}} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("error: --ckpt: no checkpoint at /no/such: expected a folder with vlv.json")


def test_the_package_lists_its_commands():
    """Each of them is a module that is run, and none is left out."""
    run = subprocess.run([sys.executable, "-m", "serve"], capture_output=True, text=True, check=True, timeout=20)
    listed = {line.split()[2].removeprefix("serve.") for line in run.stdout.splitlines()}
    folder = Path(serve.__file__).parent
    commands = {
        f.stem for f in folder.glob("*.py") if '__name__ == "__main__"' in f.read_text() and f.stem != "__main__"
    }
    assert listed == commands


def parse(*args) -> argparse.Namespace:
    p = Parser(parents=[model_arguments(in_flight=7), engine_arguments(), placement_arguments()])
    p.set_defaults(debug=False)
    return p.parse_args([str(arg) for arg in args])


def test_arguments_become_a_model_and_its_engine(captioning_checkpoint):
    model = open_model(parse("--ckpt", captioning_checkpoint, "--max-tokens", 9, "--llm-url", "http://127.0.0.1:1"))
    engine = model.engine()
    assert (engine.name, engine.in_flight, engine.max_tokens) == ("remote", 7, 9)
    assert (model.options.precision, model.options.cuda_graphs) == (None, True)
    assert engine.options.url == "http://127.0.0.1:1" and engine.spec == model.spec
    assert model.engine() is not engine
    with pytest.raises(OptionError, match="--lora does not go with --engine transformers"):
        open_model(parse("--ckpt", captioning_checkpoint, "--engine", "transformers", "--lora", "x")).engine()
    with pytest.raises(OptionError, match="--llm-dtype does not go with --engine transformers"):
        open_model(
            parse("--ckpt", captioning_checkpoint, "--engine", "transformers", "--llm-dtype", "float16")
        ).engine()
    model = open_model(parse("--ckpt", captioning_checkpoint, "--llm-dtype", "bfloat16"))
    assert model.engine().options.dtype == "bfloat16" and model.flags == "--llm-dtype bfloat16"
    with pytest.raises(OptionError, match="--engine remote needs --llm-url"):
        open_model(parse("--ckpt", captioning_checkpoint, "--engine", "remote")).engine()
    with pytest.raises(OptionError, match=r"--lora: /absent/adapter_config\.json does not describe a LoRA adapter"):
        open_model(parse("--ckpt", captioning_checkpoint, "--lora", "/absent")).engine()


def test_what_changes_captions_is_in_their_flags(captioning_checkpoint, monkeypatch):
    monkeypatch.setattr(VLLMEngine, "_device", Device(cuda=True, memory=80 << 30))  # on a CPU vLLM has no FP8
    given = ("--ckpt", captioning_checkpoint, "--llm-quantization", "fp8", "--kv-cache-dtype", "fp8", "--ignore-icc")
    model = open_model(parse(*given, "--fast-jpeg", "--encoder-placement", "inline"))  # a placement changes nothing
    assert model.flags == "--llm-quantization fp8 --kv-cache-dtype fp8 --ignore-icc --fast-jpeg"
    assert (model.engine().options.quantization, model.engine().options.placement) == ("fp8", "inline")
    assert open_model(parse("--ckpt", captioning_checkpoint)).flags == ""


def test_one_folder_for_all_caches(captioning_checkpoint, tmp_path, monkeypatch):
    for name in CACHES:
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.chdir(tmp_path)
    open_model(parse("--ckpt", captioning_checkpoint, "--cache", "kept"))
    assert os.environ["VLLM_CACHE_ROOT"] == f"{tmp_path}/kept/vllm"
    assert os.environ["XDG_CACHE_HOME"] == f"{tmp_path}/kept"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--encoder-placement", "engine", "--encoder", "onnx", "--artifacts", "/absent"),
            "--encoder onnx runs in our",
        ),
        (("--max-tokens", 10**6), "--max-tokens: 1000000 tokens a caption"),
        (("--encoder", "onnx"), "--encoder onnx and --artifacts: an exported encoder needs both"),
        (("--artifacts", "/absent"), "--encoder torch and --artifacts"),
        (("--encoder", "onnx", "--artifacts", "/absent"), "--artifacts: no artifacts in /absent"),
        (("--encoder", "onnx", "--artifacts", "/absent", "--precision", "fp8"), "--precision fp8 and --encoder onnx"),
    ],
)
def test_arguments_that_do_not_fit(captioning_checkpoint, args, words):
    with pytest.raises(Misuse, match=words):
        open_model(parse("--ckpt", captioning_checkpoint, *args))


def test_an_error_is_one_sentence_and_a_traceback_on_demand(capsys):
    def work(args) -> int:
        raise args.error

    for error, code, words in (
        (Misuse("not so"), 2, "error: not so\n"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "error: x is not installed: pip install x\n"),
        (ZeroDivisionError("line\nline"), 1, "error: ZeroDivisionError: line line (unexpected: --debug shows where)\n"),
    ):
        assert run_command(work, argparse.Namespace(error=error, debug=False)) == code == explain(error)[0]
        assert capsys.readouterr().err.startswith(words)
        with pytest.raises(type(error)):
            run_command(work, argparse.Namespace(error=error, debug=True))
    assert run_command(lambda args: 3, argparse.Namespace(debug=False)) == 3
