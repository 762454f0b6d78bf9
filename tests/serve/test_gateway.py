"""Test the gateway without a vLLM behind it; test_remote.py tests it with one."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
import torch
from safetensors.torch import save
from starlette.requests import Request

from serve import gateway
from serve.engines.base import LLMSpec
from serve.engines.remote import RemoteEngine
from serve.http.admission import Admission
from serve.http.app import Bounds
from serve.http.auth import Keys
from serve.http.errors import ApiError
from serve.http.gateway import HEADER, Gateway, Upstream, sampling_fields
from serve.http.incoming import limit_body
from serve.http.metrics import Metrics
from tests.serve.serving import Scripted
from vlv.checkpoints.folder import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(captioning_checkpoint) -> Checkpoint:
    return Checkpoint.open(captioning_checkpoint)


def test_vllm_elsewhere_is_refused(checkpoint, capsys):
    assert gateway.main(["--ckpt", str(checkpoint.folder), "--llm-url", "http://10.0.0.1:8000"]) == 2
    assert "must be on this machine" in capsys.readouterr().err


def test_a_gateway_waits_for_its_vllm(checkpoint, monkeypatch):
    """Also longer than a run does: vLLM may take minutes to load."""
    monkeypatch.setattr(RemoteEngine, "patience", 0)

    async def listen(app, state, config, failure):
        await asyncio.sleep(1.5)
        assert not failure.done()
        return 0

    monkeypatch.setattr("serve.http.gateway.listen", listen)
    assert gateway.main(["--ckpt", str(checkpoint.folder), "--llm-url", "http://127.0.0.1:9"]) == 0


def test_a_closed_stream_is_cancelled_before_its_lease_is_released(checkpoint):
    spec = LLMSpec.of(checkpoint)

    async def body():
        return {"type": "http.request", "body": save({"embeds": torch.zeros(spec.queries, spec.width)})}

    async def run():
        engine = Scripted(spec, 32, 8)
        await engine.start()
        upstream = Upstream(engine, Metrics())
        scope = {"type": "http", "headers": [(HEADER.encode(), b'{"stream": true}')]}
        request = limit_body(Request(scope, body), 1 << 20, lambda _: None)
        events = await Gateway(upstream, Keys(), Admission(1), Bounds()).generate(request, None)
        await anext(events)
        assert Scripted.running == 1
        await events.aclose()
        assert Scripted.running == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "field", ["repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_logprobs", "logprobs"]
)
def test_what_differs_with_embeddings_is_refused(field):
    """docs/compatibility.md: vLLM reads a prompt's token ids for these, and embeddings have placeholders there."""
    with pytest.raises(ApiError, match=f"{HEADER} holds .*, not {field}"):
        sampling_fields(json.dumps({"max_tokens": 4, field: 1}))


def test_a_port_that_is_taken(checkpoint, capsys):
    args = ["--ckpt", str(checkpoint.folder), "--llm-url", "http://127.0.0.1:9", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert gateway.main([*args, str(port)]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: cannot listen at 127.0.0.1:{port}: another server has the port, or it is not allowed"
    for port in ("70000", "0", "x"):
        with pytest.raises(SystemExit):
            gateway.main([*args, port])
        assert f"argument --port: expected a port from 1 to 65535, got '{port}'" in capsys.readouterr().err
