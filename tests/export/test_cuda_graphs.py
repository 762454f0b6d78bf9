"""CUDA graphs for batches of any size: which graph runs, what it reads and writes, and what happens without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from export.runtimes import torch as torch_runtime
from export.runtimes.cuda_graphs import OVERHEAD, SIZES, BatchGraphs, CudaCapture
from export.runtimes.torch import TorchRuntime

BYTES = 1000


class Recorder:
    """Captures as a GPU does, on a CPU: a replay reads and writes the memory of the captured call."""

    def __init__(self, *_):
        self.captured, self.replayed, self.inside = [], [], False

    def __call__(self, call):
        outputs = call()
        self.captured.append(len(outputs[0]))

        def replay():
            assert self.inside, "a replay out of turn"
            self.replayed.append(len(outputs[0]))
            for held, new in zip(outputs, call(), strict=True):
                held.copy_(new)

        return replay, outputs

    @contextmanager
    def in_turn(self):
        assert not self.inside, "two replays at once share their memory"
        self.inside = True
        yield
        self.inside = False

    def memory(self) -> int:
        return BYTES * len(self.captured)


def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two outputs, of which no row depends on another one."""
    return x.float().cumsum(-1), x.flatten(1).double().mean(1)


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.mark.parametrize(
    ("count", "graphs"),
    [
        (1, [1]), (2, [2]), (3, [4]), (5, [4, 1]), (7, [8]), (9, [8, 1]), (15, [16]), (17, [16, 1]), (31, [32]),
        (32, [32]), (33, [32, 1]), (75, [32, 32, 8, 4]),
    ],
)  # fmt: skip
def test_a_batch_is_padded_or_split_whichever_computes_less(recorder, count, graphs):
    graphed = BatchGraphs(call, images(1), 32, recorder)
    assert graphed.sizes == SIZES and recorder.captured == sorted(SIZES, reverse=True)
    assert graphed.memory_bytes == BYTES * len(SIZES)
    graphed(images(32, seed=1))  # whose rows are the padding of the next batch
    recorder.replayed.clear()
    x = images(count)
    found = graphed(x)
    assert recorder.replayed == graphs
    assert all(torch.equal(a, b) for a, b in zip(found, call(x), strict=True))


def test_no_other_sizes_cost_less(recorder):
    """Against the least cost by dynamic programming, with OVERHEAD rows for each graph."""
    graphed, best = BatchGraphs(call, images(1), 32, recorder), [0]
    for count in range(1, 100):
        best.append(min(size + OVERHEAD + best[max(0, count - size)] for size in SIZES))
        sizes = graphed.sizes_for(count)
        assert sum(sizes) >= count > sum(sizes[:-1]) and sum(sizes) + OVERHEAD * len(sizes) == best[count], count


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (3, (1, 2, 4)), (8, (1, 2, 4, 8)), (20, SIZES), (500, SIZES)]
)
def test_sizes_up_to_the_largest_batch(recorder, largest, sizes):
    assert BatchGraphs(call, images(1), largest, recorder).sizes == sizes


def test_results_are_not_overwritten_by_the_next_batch(recorder):
    graphed = BatchGraphs(call, images(1), 4, recorder)
    first, second = graphed(images(4, seed=1)), graphed(images(4, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, call(images(4, seed=1)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, call(images(4, seed=2)), strict=True))


def test_threads_take_turns(recorder):
    graphed = BatchGraphs(call, images(1), 8, recorder)
    batches = [images(1 + seed % 8, seed) for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for x, found in zip(batches, pool.map(graphed, batches), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, call(x), strict=True))


def test_a_runtime_replays_its_encoder_and_says_what_memory_that_takes(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(torch_runtime, "CudaCapture", Recorder)
    plain, graphed = TorchRuntime(checkpoint, "cpu"), TorchRuntime(checkpoint, "cpu", graphs=4)
    assert graphed.graphs == 0, "a CPU has none"
    graphed.graphs = 4
    size = checkpoint.config.image_size
    x = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    torch.testing.assert_close(graphed.encode(x), plain.encode(x), rtol=1e-4, atol=1e-4)
    assert graphed.session("encoder").replayed.sizes == (1, 2, 4)
    assert "encoder: CUDA graphs for batches of 1, 2, 4 hold 0.0 GB of GPU memory" in capsys.readouterr().err


def test_without_a_capture_the_encoder_runs_as_it_is(checkpoint, monkeypatch, capsys):
    class Full(Recorder):
        def __call__(self, call):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_runtime, "CudaCapture", Full)
    runtime = TorchRuntime(checkpoint, "cpu")
    runtime.graphs = 4
    size = checkpoint.config.image_size
    assert runtime.encode(torch.zeros(3, 3, size, size, dtype=torch.uint8)).shape[0] == 3
    assert runtime.session("encoder").replayed is None
    assert "encoder: runs without CUDA graphs" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_real_graphs_give_what_the_call_gives():
    device = torch.device("cuda")
    weight = torch.randn(48, 64, device=device)

    def product(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((x.flatten(1).float() @ weight).relu(),)

    graphed = BatchGraphs(product, images(1).to(device), 8, CudaCapture(device))
    for count in (1, 3, 8, 11):
        x = images(count, count).to(device)
        torch.testing.assert_close(graphed(x), product(x))
    streams = [torch.cuda.Stream() for _ in range(4)]
    batches, found = [images(8, seed).to(device) for seed in range(4)], []
    torch.cuda.synchronize()
    for stream, x in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            found.append(graphed(x))
    torch.cuda.synchronize()
    for x, one in zip(batches, found, strict=True):
        torch.testing.assert_close(one, product(x))
