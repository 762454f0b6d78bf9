"""Replay a module from CUDA graphs that were captured for a few batch sizes.

A small batch takes PyTorch longer to launch than the GPU to compute: batch 1 of the published encoder took 50 ms on an
H200 for 2.2 ms of work. A graph launches all kernels at once. A batch between two sizes is padded to the larger one, or
split where that computes fewer rows: 7 images run as 8, and 17 as 16 and 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32)
OVERHEAD = 1  # what a graph costs beside its rows, in rows: about 2 of 7 ms at batch 1, and 5 ms for each image more
WARM_UP = 3  # calls before a capture: they compile kernels, choose algorithms and make the handles of libraries

Outputs = tuple[Tensor, ...]


class CudaCapture:
    """Capture calls in CUDA graphs that share one pool of memory.

    The values inside one graph may lie where those of another lie, so no two of them may run at the same time
    (`in_turn`). The outputs of all graphs stay apart, since they are alive while the next graph is captured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    def __call__(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Return what replays the call, and the memory that every replay writes its outputs to."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may allocate memory meanwhile, as the language model's do
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = call()
        return graph.replay, outputs

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the GPU run what is launched within only after what was launched in the block before, on any stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def memory(self) -> int:
        """Return the bytes of GPU memory that PyTorch holds, without those that it could give back."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


class BatchGraphs:
    """Replay `call` for batches of any size from graphs of the sizes up to `largest`; any thread may call."""

    @torch.inference_mode()
    def __init__(self, call: Callable[[Tensor], Outputs], like: Tensor, largest: int, capture: CudaCapture):
        """Capture the graphs. like: a batch [1, ...], whose shape and dtype all others have."""
        top = next((size for size in SIZES if size >= largest), SIZES[-1])
        self.sizes = tuple(size for size in SIZES if size <= top)
        self._capture = capture
        self._lock = threading.Lock()
        before = capture.memory()
        self._input = like.new_zeros(top, *like.shape[1:])  # the memory that all graphs read
        # the largest first: the values of the smaller ones fit into its memory
        self._graphs = {
            size: capture(lambda size=size: call(self._input[:size])) for size in sorted(self.sizes, reverse=True)
        }
        self.memory_bytes = capture.memory() - before

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Outputs:
        """Return the outputs for x [B, ...], in memory of their own."""
        parts = []
        for size in self.sizes_for(len(x)):
            parts.append(self._replay(x[:size], size))
            x = x[size:]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def sizes_for(self, count: int) -> tuple[int, ...]:
        """Return the sizes of the graphs that run `count` rows at the least cost; only the last one may be padded."""
        below = max((size for size in self.sizes if size <= count), default=0)
        split = (below, *self.sizes_for(count - below)) if below and count > below else ()
        whole = next(((size,) for size in self.sizes if size >= count), split)
        return split if split and sum(split) + OVERHEAD * len(split) < sum(whole) + OVERHEAD * len(whole) else whole

    def _replay(self, x: Tensor, size: int) -> Outputs:
        count = len(x)
        replay, outputs = self._graphs[size]
        with self._lock, self._capture.in_turn():
            self._input[:count].copy_(x)  # the rows beyond are those of an earlier batch, and their results unused
            replay()
            return tuple(output[:count].clone() for output in outputs)
