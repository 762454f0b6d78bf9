"""serve.ray_serve: a replica by itself, and the command on a Ray cluster of this machine, with a replica killed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from serve import ray_serve
from serve.engines.base import EngineError
from serve.http.routes import ServerConfig
from serve.ray.replica import Replica
from serve.server import config_from

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def flags(captioning_checkpoint) -> list[str]:
    return ["--ckpt", str(captioning_checkpoint), "--engine", "transformers", "--workers", "1", "--in-flight", "4"]


@pytest.fixture(scope="module")
def body(scene_images) -> dict:
    """A request for two captions."""
    pictures = [(scene_images / f"{i:02}.png").read_bytes() for i in range(2)]
    urls = ["data:image/png;base64," + base64.b64encode(content).decode() for content in pictures]
    return {"images": urls, "max_tokens": 40}


@pytest.fixture(scope="module")
def expected(captioning_checkpoint, scene_images) -> list[str]:
    """What the reference writes of them."""
    import torch

    from vlv.checkpoints.folder import Checkpoint
    from vlv.data.image import load_crop
    from vlv.model.captioner import Captioner

    captioner = Captioner.load(Checkpoint.open(captioning_checkpoint))
    size = captioner.encoder.config.image_size
    crops = torch.stack([torch.from_numpy(load_crop(scene_images / f"{i:02}.png", size)) for i in range(2)])
    return captioner.captions(crops, max_new_tokens=40)


def captions(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [entry["caption"] for entry in answer.json()["captions"]]


def test_a_replica(flags, body, expected):
    """It is there once it can caption, is healthy until its service has given up, and takes nothing while it ends."""

    async def life() -> None:
        replica = Replica.__new__(Replica)
        args = ray_serve.parser().parse_args([*flags, "--fast-jpeg"])
        await replica.__init__(config_from(args, ServerConfig))
        assert replica.routes.service.config.fast_jpeg
        async with httpx.AsyncClient(transport=httpx.ASGITransport(replica.answer), base_url="http://here") as client:
            assert (await client.get("/ready")).json() == {"status": "ready"}
            assert captions(await client.post("/v1/captions", json=body, timeout=60)) == expected
            replica.check_health()
            replica.routes.service.failure.set_exception(EngineError("it has died too often"))
            with pytest.raises(EngineError, match="too often"):
                replica.check_health()
            await replica.close()
            assert (await client.post("/v1/captions", json=body)).json()["error"]["code"] == "draining"
        await replica.close()  # as Ray's destructor does

    asyncio.run(life())


def test_a_replica_that_cannot_load_says_why(flags, monkeypatch):
    async def fails(service) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr("serve.core.service.CaptionService._keep_engine", fails)
    with pytest.raises(EngineError, match="no memory"):
        config = config_from(ray_serve.parser().parse_args(flags), ServerConfig)
        asyncio.run(Replica.__new__(Replica).__init__(config))


def test_how_ray_is_told_to_scale(flags):
    args = ray_serve.parser().parse_args([*flags, "--replicas", "2-6", "--target", "9", "--drain", "7", "--queue", "5"])
    told = ray_serve.scaling(args, gpus=False)
    wanted = {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 9}
    assert wanted.items() <= told["autoscaling_config"].items()
    assert told["graceful_shutdown_timeout_s"] == 7 and told["max_ongoing_requests"] == 4 + 5
    assert told["ray_actor_options"]["num_gpus"] == 0
    assert ray_serve.scaling(args, gpus=True)["ray_actor_options"]["num_gpus"] == 1
    for more, share in {("--gpu", "0.5"): 0.5, ("--tensor-parallel", "4"): 4}.items():
        args = ray_serve.parser().parse_args([*flags, *more])
        assert ray_serve.scaling(args, gpus=True)["ray_actor_options"]["num_gpus"] == share


def test_options_of_serve_deploy(monkeypatch):
    monkeypatch.setattr(ray_serve, "application", lambda args: args)
    hosts = ["a.example.org", "b.example.org"]
    given = {"ckpt": "/models/vlv", "replicas": "2-3", "image_host": hosts, "no_auth": True, "debug": False, "port": 80}
    args = ray_serve.build(given)
    assert (args.ckpt, args.replicas, args.port) == ("/models/vlv", (2, 3), 80)
    assert args.image_host == hosts and args.no_auth and not args.debug


def test_refused_in_one_sentence(flags, capsys):
    for more, words in {
        ("--ckpt", "/absent"): "error: --ckpt: no checkpoint at /absent",
        ("--host", "0.0.0.0"): "error: --host 0.0.0.0 lets others in",
        ("--encoder", "onnx"): "error: --encoder onnx and --artifacts",
    }.items():
        assert ray_serve.main([*flags, *more]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith(words) and stderr.count("\n") == 1, stderr


@pytest.fixture(scope="module")
def cluster(flags, tmp_path_factory):
    """The command with one replica, and a second where requests wait, once it is ready."""
    pytest.importorskip("ray.serve", reason='ray is not installed: python -m pip install "ray[serve]"')
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "serve.ray_serve", *flags, "--cpus", "4", "--replicas", "1-2", "--port", str(port)]
    words += ["--target", "2"]
    env = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}  # Ray keeps a token at home
    with open(home / "log", "w+") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        process.url, process.log = f"http://127.0.0.1:{port}", home / "log"
        deadline = time.monotonic() + 240
        while "\nready\n" not in process.log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, process.log.read_text()[-3000:]
            time.sleep(0.2)
        yield process
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()


def replicas(process: subprocess.Popen) -> set[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return {child for child in children if "ServeReplica" in " ".join(child.cmdline())}


def test_requests_that_wait_get_a_second_replica(cluster, body, expected):
    assert httpx.get(cluster.url + "/ready", timeout=30).json() == {"status": "ready"}
    assert len(replicas(cluster)) == 1
    stopped, answers = threading.Event(), []

    def ask() -> None:
        while not stopped.is_set():
            answers.append(httpx.post(cluster.url + "/v1/captions", json=body, timeout=60))

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + 120
    while len(replicas(cluster)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped.set()
    for thread in asking:
        thread.join()
    assert len(replicas(cluster)) == 2
    assert all(captions(answer) == expected for answer in answers)


def test_a_killed_replica_is_replaced_and_requests_go_on(cluster, body, expected):
    before = replicas(cluster)
    next(iter(before)).kill()
    time.sleep(0.5)  # the connection that it had is gone by then
    for _ in range(8):  # by the other one
        assert captions(httpx.post(cluster.url + "/v1/captions", json=body, timeout=60)) == expected
    deadline = time.monotonic() + 120
    while len(replicas(cluster)) < 2 or replicas(cluster) == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert captions(httpx.post(cluster.url + "/v1/captions", json=body, timeout=60)) == expected


def test_sigterm_finishes_what_runs(cluster, body):
    """Streams that have begun come to their end; then the command ends with 0."""
    content = [{"type": "image_url", "image_url": {"url": body["images"][0]}}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 250, "temperature": 2, "stream": True}
    begun, streams = threading.Semaphore(0), []

    def ask() -> None:
        with httpx.stream("POST", cluster.url + "/v1/chat/completions", json=asked, timeout=90) as answer:
            lines = answer.iter_lines()
            got = [next(lines)]
            begun.release()
            streams.append((answer.status_code, got + list(lines)))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for _ in asking:
        assert begun.acquire(timeout=60)
    os.kill(cluster.pid, signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [status for status, _ in streams] == [200] * 4
    assert all("data: [DONE]" in lines and not any("error" in line for line in lines) for _, lines in streams)
    assert cluster.wait(90) == 0
    told = cluster.log.read_text()
    assert "SIGTERM: no new requests; those that run are finished" in told and "Traceback" not in told
    with pytest.raises(httpx.TransportError):
        httpx.get(cluster.url + "/health")
