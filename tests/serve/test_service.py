"""The stages around an engine, without HTTP."""

from __future__ import annotations

import asyncio

import torch

from serve.llm import LLMSpec
from serve.service import Service, ServiceConfig
from tests.serve.serving import Scripted
from vlv.checkpoint import Checkpoint


def test_the_encoder_is_the_one_that_is_asked_for(captioning_checkpoint, scene_images, monkeypatch, tmp_path):
    """It is opened with the service's configuration, and its embeddings are the ones handed on."""
    opened, checkpoint = [], Checkpoint.open(captioning_checkpoint)

    def open_encoder(*given):
        opened.append(given)
        return lambda crops: torch.full((len(crops), 2, 3), 7.0)

    monkeypatch.setattr("serve.service.open_encoder", open_encoder)
    config = ServiceConfig(8, 1, encoder="onnx", artifacts=tmp_path)

    async def embed():
        service = Service(checkpoint, lambda: Scripted(LLMSpec.of(checkpoint), 10, 8), config)
        await service.start()
        try:
            return await service.embed((scene_images / "00.png").read_bytes())
        finally:
            await service.close()

    assert asyncio.run(embed()).tolist() == [[7.0] * 3] * 2
    assert opened == [(checkpoint, "onnx", tmp_path, None)]  # the scripted engine leaves PyTorch its threads
