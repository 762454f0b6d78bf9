"""Train on several processes by torch's own means: DDP or FSDP2, started by torchrun, or one process alone."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from vlv.common.device import choose_device
from vlv.model.bottleneck import BartLayer, ClipLayer
from vlv.model.davit import Block
from vlv.train.config import TrainConfig, TrainError


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    background: dist.ProcessGroup  # for checkpoints, whose messages must not mix with the training's

    @classmethod
    @contextmanager
    def start(cls, device: str | None = None) -> Iterator[World]:
        """Join torchrun's processes, or be the only one; leave when the block ends."""
        kind = choose_device(device)
        if kind.type == "cuda":
            kind = torch.device("cuda", kind.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(kind)
        store, rank, size = dist.HashStore(), 0, 1
        if "WORLD_SIZE" in os.environ:
            store, rank, size = next(dist.rendezvous("env://"))
            # torchrun keeps its store when it starts workers again, with the addresses of those that died in it
            store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            # the others wait while one process looks through the data
            background = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            yield cls(dist.get_rank(), dist.get_world_size(), kind, background)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Return True on the process that logs and writes."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Return True on the first process of each machine."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes, in place."""
        dist.all_reduce(values)
        return values.div_(self.size)

    def barrier(self) -> None:
        """Wait for the other processes."""
        dist.barrier(self.background)


_OURS = Block | BartLayer | ClipLayer  # blocks whose shapes never change within a run


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of encoder and LLM: the units of sharding, recomputation and compilation."""
    return [
        m for m in module.modules()
        if isinstance(m, _OURS) or type(m).__name__.endswith("DecoderLayer")
    ]  # fmt: skip


def prepare(objective: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """Return the objective, ready to train: recomputation, compilation, and DDP or FSDP2 around it.

    Mixed precision: the weights stay float32 and autocast (in the trainer) computes in bfloat16; FSDP2 gathers
    bfloat16 and reduces gradients in float32.
    """
    objective.train()
    if config.compile:
        _need_compiler(world.device)
        # a forward has as many graphs as there are kinds of blocks that run it, in the tower alone 8, which is torch's
        # limit; beyond it blocks would silently stay as they are
        torch._dynamo.config.recompile_limit = 64
    for block in blocks(objective):
        # FSDP's unit is around both, so that its weights are there when the block is computed again; recomputation is
        # around the compiled block, since torch compiles nothing within it
        if config.compile:
            # captions differ in length: the language model's second one gives a graph for every other
            block.forward = torch.compile(block.forward, dynamic=False if isinstance(block, _OURS) else None)
        if config.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        precision = MixedPrecisionPolicy(torch.bfloat16 if config.bf16 else None, torch.float32)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks(objective):
            fully_shard(block, mesh=mesh, mp_policy=precision)
        return fully_shard(objective, mesh=mesh, mp_policy=precision)
    if world.size == 1:
        return objective
    # the filters of depthwise convolutions: their gradients are laid out otherwise, and copied
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ids = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        objective, ids, gradient_as_bucket_view=True, find_unused_parameters=config.encoder_from > 0
    )


def _need_compiler(device: torch.device) -> None:
    """Raise TrainError where torch.compile would find no compiler: C++ for a CPU, C for Triton's launchers."""
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise TrainError(
            f"--compile needs a compiler, and there is no {' or '.join(names)} here: install it, or name one in "
            f"{variable}, or leave --compile out"
        )


@contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """Let the processes exchange gradients within only if this is a step's last forward pass."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
    yield


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other as it is. Shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
