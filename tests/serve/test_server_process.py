"""Test the server as a process: errors at its start, captions of a real checkpoint, and SIGTERM while it captions."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from serve.server import main
from vlv.common.files import link_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    """Start a server process with the reference engine, and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--engine", "transformers", "--workers", "1", "--body-seconds", "2", "--in-flight", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.server", "--ckpt", str(captioning_checkpoint), "--port", str(port), *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.url = f"http://127.0.0.1:{port}"
    states, deadline = [], time.monotonic() + 200
    while not states or states[-1] != 200:
        assert process.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(httpx.TransportError):
            states.append(httpx.get(process.url + "/ready").status_code)
        time.sleep(0.05)
    process.states = states
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def image(scene_images):
    return "data:image/png;base64," + base64.b64encode((scene_images / "00.png").read_bytes()).decode()


def test_answers_while_it_loads_and_captions_like_the_captioner(server, captioning_checkpoint, image, scene_images):
    import torch

    from vlv.checkpoints.folder import Checkpoint
    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    assert set(server.states) == {503, 200}
    answer = httpx.post(server.url + "/v1/captions", json={"images": [image], "max_tokens": 40}, timeout=60).json()
    captioner = Captioner.load(Checkpoint.open(captioning_checkpoint))
    crop = torch.from_numpy(load_crop(scene_images / "00.png", captioner.encoder.config.image_size))[None]
    assert answer["captions"][0]["caption"] == captioner.captions(crop, max_new_tokens=40)[0]
    assert answer["model"] == captioning_checkpoint.name


@pytest.mark.parametrize("before", [0, 2])
def test_a_client_that_never_finishes_its_head(server, before):
    """Neither that of its first request nor, on a connection that is kept, that of a later one."""
    with socket.create_connection(server.url[7:].split(":")) as slow:
        slow.settimeout(10)
        for _ in range(before):
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while not slow.recv(1000).endswith(b"}"):
                pass
        if before:
            time.sleep(3)  # longer than --body-seconds: an idle connection is kept
        slow.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        start = time.monotonic()
        assert slow.recv(100) == b"" and 1 < time.monotonic() - start < 8  # closed after --body-seconds


def test_sigterm_finishes_what_runs(server, image):
    """A request that is being answered gets its captions; then the process ends with 0."""
    answers = []

    def ask():
        body = {"images": [image] * 2, "max_tokens": 100, "temperature": 2, "n": 3}
        answers.append(httpx.post(server.url + "/v1/captions", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    while "vlv_llm_requests 0.0" in httpx.get(server.url + "/metrics").text:
        time.sleep(0.01)
    refused = httpx.post(server.url + "/v1/captions", json={"images": []}, headers={"X-Request-Id": "mine"})
    assert refused.status_code == 400
    os.kill(server.pid, signal.SIGTERM)
    asking.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["captions"]) == 2
    assert server.wait(60) == 0
    told = server.stderr.read()
    assert "SIGTERM: no new requests; those that run are finished" in told and "Traceback" not in told
    settings = r"model \S+, language model by transformers, encoder by torch, at most \d+ tokens a caption and "
    settings += "4 captions together, no API keys, 60 s a request\n"
    assert re.search(rf"^ready after [\d.]+ s at {server.url}: {settings}", told, re.M), told
    assert re.search(r"^\S+Z 127.0.0.1 POST /v1/captions 400 \d+ms id=mine: images must be one image URL", told, re.M)
    assert " 200 " not in told  # without --access-log
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_arguments_that_are_refused(captioning_checkpoint, tmp_path, capsys):
    (tmp_path / "keys.json").write_text("[1]")
    for args, words in {
        (): "error: --ckpt is needed",
        ("--ckpt", "/absent"): "error: --ckpt: no checkpoint at /absent",
        ("--ckpt", captioning_checkpoint, "--host", "0.0.0.0"): "error: --host 0.0.0.0 lets others in: give --keys",
        ("--ckpt", captioning_checkpoint, "--keys", tmp_path / "keys.json"): f"error: {tmp_path}/keys.json is no file",
        ("--ckpt", captioning_checkpoint, "--max-tokens", "100000"): "error: --max-tokens: 100000 tokens a caption",
        ("--ckpt", captioning_checkpoint, "--encoder", "onnx"): "error: --encoder onnx and --artifacts: an exported",
        ("--ckpt", captioning_checkpoint, "--encoder", "onnx", "--artifacts", tmp_path): "error: --artifacts: no artif",
        ("--new-key", "me"): "error: --new-key needs --keys FILE",
        ("--new-key", "", "--keys", "k.json"): "error: --new-key needs a name",
    }.items():
        assert main([str(a) for a in args]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith(words) and stderr.count("\n") == 1, stderr
    file = tmp_path / "made.json"
    assert main(["--new-key", "me", "--keys", str(file), "--concurrent", "3"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("vlv-") and key not in file.read_text() and '"concurrent": 3' in file.read_text()
    assert main(["--new-key", "me", "--keys", str(file)]) == 2 and "has a key 'me' already" in capsys.readouterr().err


def test_a_warm_up_fills_the_caches_and_ends(captioning_checkpoint, tmp_path):
    """With vLLM, which keeps there what it has learned of the model's class; nothing listens, and nothing is left."""
    pytest.importorskip("vllm")
    cache, out = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-m", "serve.server", "--ckpt", captioning_checkpoint, "--cache", cache, "--warm"]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_CACHE_ROOT"}
    with out.open("w") as log:
        done = subprocess.run(
            [*map(str, command), "--prompt-batch", "2", "--workers", "1", "--in-flight", "4"],
            cwd=ROOT,
            env=env,
            stderr=log,
            timeout=300,
        )
    assert done.returncode == 0, out.read_text()
    assert [file for file in (cache / "vllm").rglob("*") if file.is_file()]


def test_a_warm_up_that_fails_says_why(captioning_checkpoint, tmp_path, capfd):
    link_tree(captioning_checkpoint, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "llm" / "model.safetensors").unlink()
    words = ["--ckpt", tmp_path / "ckpt", "--engine", "transformers", "--workers", "1", "--warm"]
    assert main([str(word) for word in words]) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "holds no weights" in lines[0]


def test_the_server_returns_embeddings(captioning_checkpoint, capsys):
    assert main(["--ckpt", str(captioning_checkpoint), "--encoder-placement", "engine"]) == 2
    assert "--encoder-placement engine keeps the embeddings in vLLM" in capsys.readouterr().err
