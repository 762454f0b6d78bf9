"""The stages around an engine, without HTTP."""

from __future__ import annotations

import asyncio

import pytest
import torch

from serve.core.decode import DecodeError
from serve.core.service import ServiceConfig
from serve.engines.base import EngineError, LLMSpec, Sampling
from serve.engines.transformers import TransformersEngine
from serve.http.errors import ApiError
from serve.http.service import Service
from tests.serve.serving import Scripted
from vlv.checkpoints.folder import Checkpoint


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class FakeEncoder:
    """An encoder's interface, without weights."""

    def __init__(self, checkpoint, runtime, artifacts, batch, threads, precision, cuda_graphs):
        self.batch = batch


def test_the_encoder_is_the_one_that_is_asked_for(captioning_checkpoint, scene_images, monkeypatch, tmp_path):
    """It is opened with the service's configuration, and its embeddings are the ones handed on."""
    opened, checkpoint = [], Checkpoint.open(captioning_checkpoint)

    class Sevens(FakeEncoder):
        def __init__(self, *given):
            opened.append(given)
            super().__init__(*given)

        def __call__(self, crops):
            return torch.full((len(crops), 2, 3), 7.0)

    monkeypatch.setattr("serve.core.service.Encoder", Sevens)
    config = ServiceConfig(8, 1, encoder="onnx", artifacts=tmp_path, precision="bf16", cuda_graphs=False)

    async def embed():
        service = Service(checkpoint, lambda: Scripted(LLMSpec.of(checkpoint), 10, 8), config)
        await service.start()
        try:
            return await service.embed((scene_images / "00.png").read_bytes())
        finally:
            await service.close()

    assert asyncio.run(embed()).tolist() == [[7.0] * 3] * 2
    # None: the scripted engine leaves PyTorch its threads
    assert opened == [(checkpoint, "onnx", tmp_path, 8, None, "bf16", False)]


def encoded(monkeypatch, spec: LLMSpec) -> list[int]:
    """Return a list that gets the sizes of the batches, which an encoder of zeros is given from now on."""
    sizes = []

    class Zeros(FakeEncoder):
        def __call__(self, crops):
            sizes.append(len(crops))
            return torch.zeros(len(crops), spec.queries, spec.width)

    monkeypatch.setattr("serve.core.service.Encoder", Zeros)
    return sizes


def test_pictures_gather_while_the_language_model_is_full(captioning_checkpoint, scene_images, monkeypatch):
    """They would wait for it anyway, and one batch costs less than several."""
    checkpoint, content = Checkpoint.open(captioning_checkpoint), (scene_images / "00.png").read_bytes()
    spec = LLMSpec.of(checkpoint)
    sizes = encoded(monkeypatch, spec)

    class Gated(Scripted):
        async def tokens(self, embeds, sampling, every):
            await gate.wait()
            async for token in super().tokens(embeds, sampling, every):
                yield token

    async def captioned(service):
        await service.caption(await service.embed(content), Sampling(4))

    async def run():
        nonlocal gate
        gate = asyncio.Event()
        service = Service(checkpoint, lambda: Gated(spec, 10, in_flight=2), ServiceConfig(batch=4, workers=1))
        await service.start()
        try:
            await until(lambda: service.ready)
            async with asyncio.TaskGroup() as tasks:
                for more in range(1, 4):
                    tasks.create_task(captioned(service))
                    await until(lambda more=more: service.batcher.captions == more)
                for _ in range(3):
                    tasks.create_task(captioned(service))
                    await asyncio.sleep(0.2)
                assert sizes == [1, 1, 1]  # so far the language model had room
                gate.set()
        finally:
            await service.close()

    gate = None
    asyncio.run(run())
    assert sizes == [1, 1, 1, 3]


def test_a_service_that_cannot_decode_gives_up(captioning_checkpoint, monkeypatch):
    """It refuses, and whoever runs it learns why it has to end."""
    checkpoint = Checkpoint.open(captioning_checkpoint)
    monkeypatch.setattr("serve.core.decode._work", print)  # ends at once

    async def run():
        service = Service(checkpoint, lambda: Scripted(LLMSpec.of(checkpoint), 10, 8), ServiceConfig(workers=1))
        await service.start()
        try:
            for _ in range(2):
                with pytest.raises(ApiError) as refused:
                    await service.embed(b"")
                assert refused.value.status == 503 and not service.ready
            with pytest.raises(DecodeError, match="did not start"):
                service.failure.result()
        finally:
            await service.close()

    asyncio.run(run())


def test_what_nobody_waits_for_costs_nothing_more(captioning_checkpoint, scene_images, monkeypatch):
    """A request that is given up frees its turn: before it is decoded, and before it is encoded."""
    checkpoint, content = Checkpoint.open(captioning_checkpoint), (scene_images / "00.png").read_bytes()
    spec = LLMSpec.of(checkpoint)
    sizes = encoded(monkeypatch, spec)

    async def run():
        service = Service(checkpoint, lambda: Scripted(spec, 10, in_flight=2), ServiceConfig(batch=1, workers=1))
        await service.start()
        service.batcher._below_limit.clear()
        try:
            asking = [asyncio.create_task(service.embed(content)) for _ in range(20)]
            await until(lambda: not service.pool._free and service.batcher.waiting == 2)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            service.batcher._below_limit.set()
            await service.embed(content)
            assert sizes == [1] and len(service.pool._free) == 3
        finally:
            await service.close()

    asyncio.run(run())


def test_a_request_that_fails_alone_costs_no_other(captioning_checkpoint):
    """The engine lives, so it is not started again; new requests are refused only while it is ill."""
    checkpoint = Checkpoint.open(captioning_checkpoint)
    spec = LLMSpec.of(checkpoint)
    embeds = torch.zeros(spec.queries, spec.width)

    class Choosy(Scripted):
        well, starts, pace = True, 0, 0.02

        async def tokens(self, embeds, sampling, every):
            if sampling.seed:
                raise EngineError("not this one")
            async for token in super().tokens(embeds, sampling, every):
                yield token

        async def healthy(self):
            return self.well

    async def run():
        service = Service(checkpoint, lambda: Choosy(spec, 100, 8), ServiceConfig(workers=1))
        await service.start()
        try:
            await until(lambda: service.ready)
            other = asyncio.create_task(service.caption(embeds, Sampling(20)))
            await until(lambda: service.batcher.captions)
            for well in (True, False):
                Choosy.well = well
                with pytest.raises(ApiError, match="did not answer"):
                    await service.caption(embeds, Sampling(20, seed=1))
                assert service.ready == well
            await asyncio.sleep(1)
            assert not service.ready
            Choosy.well = True
            await until(lambda: service.ready)
            assert len((await other).token_ids) == 20 and Choosy.starts == 1
        finally:
            await service.close()

    asyncio.run(run())


def test_transformers_is_dead_after_a_batch_that_failed(captioning_checkpoint):
    """In CUDA all that follow would fail too; nobody waits for them in vain."""
    spec = LLMSpec.of(Checkpoint.open(captioning_checkpoint))
    embeds = torch.zeros(spec.queries, spec.width)

    async def run():
        engine = TransformersEngine(spec, 10, in_flight=1)
        await engine.start()
        assert engine.alive
        engine._llm.generate = None
        asked = [engine.generate(embeds, Sampling(2)) for _ in range(2)]
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, EngineError)
        assert not engine.alive
        with pytest.raises(EngineError, match="has failed"):
            await engine.generate(embeds, Sampling(2))
        await engine.close()

    asyncio.run(run())
