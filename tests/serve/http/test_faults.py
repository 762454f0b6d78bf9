"""Run a short version of benchmarks/serve_faults.py: every invalid request has an answer that a client can read."""

from __future__ import annotations

import asyncio

import httpx
import psutil
import pytest

from benchmarks.serve_faults import caption, send_all
from benchmarks.serve_fuzz import fuzzed_images, fuzzed_requests, scene
from serve.http.app import Bounds
from tests.serve.serving import Running, Scripted
from vlv.checkpoints.folder import Checkpoint


@pytest.fixture(scope="module")
def server(captioning_checkpoint):
    running = Running(Checkpoint.open(captioning_checkpoint), Scripted, 64, bounds=Bounds(20, 2, 1 << 20, 16))
    yield running
    assert running.routes.admission.active == 0 and Scripted.running == 0
    running.stop()


def using(server, work):
    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            before = (await caption(client, scene(0))).json()
            figures = await work(client)
            assert (await caption(client, scene(0))).json() == before
            return figures

    return asyncio.run(run())


def test_mutated_images(server):
    files = fuzzed_images(320, seed=1)
    requests = [
        {"url": "/v1/captions", "files": [("file", f) for f in files[i : i + 8]], "data": {"max_tokens": 2}}
        for i in range(0, len(files), 8)
    ]
    figures = using(server, lambda client: send_all(client, requests, at_once=4))
    assert not figures["wrong"] and figures["answers"] == {"200": 40}


def test_mutated_requests(server):
    figures = using(server, lambda client: send_all(client, fuzzed_requests(400, seed=2)))
    assert not figures["wrong"], figures["wrong"]
    assert {"200", "400"} <= figures["answers"].keys()


def test_killed_decode_processes(server):
    async def work(client):
        asking = [asyncio.create_task(caption(client, scene(i))) for i in range(30)]
        await asyncio.sleep(0.05)
        for process in psutil.Process().children():
            if "spawn_main" in " ".join(process.cmdline()):
                process.kill()
        return [(await task).json()["captions"][0] for task in asking]

    results = using(server, work)
    failed = [r for r in results if "error" in r]
    assert len(failed) <= 1 and all("killed the process" in r["error"]["message"] for r in failed)
