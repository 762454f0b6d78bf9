"""The configuration that a launch takes, and the next smaller one where the GPU has too little shared memory."""

from __future__ import annotations

import json

import pytest
import torch

from kernels.runtime import launch, tuning

KERNEL, SHAPE = "attention.forward", "d999"


class OutOfResources(Exception):
    """As Triton names it."""


class Device:
    """Takes only tiles up to a size, as a GPU with little shared memory."""

    def __init__(self, room: int):
        self.room, self.tried = room, []

    def __getitem__(self, grid):
        return self

    def __call__(self, x, BLOCK_M, BLOCK_N, TMA, num_warps, num_stages):
        self.tried.append((BLOCK_M, BLOCK_N, num_stages))
        if BLOCK_M * BLOCK_N * num_stages > self.room:
            raise OutOfResources
        if self.room < 0:
            raise ValueError("another error")


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(tuning, "_fitting", {})

    def run(device: Device) -> None:
        monkeypatch.setattr(launch, "function", lambda name: device)
        launch.launch(KERNEL, SHAPE, lambda meta: (1,), {"x": torch.empty(1)}, {})

    return run


def test_the_largest_configuration_that_fits_is_kept(start):
    device = Device(64 * 32 * 2)
    start(device)
    assert device.tried[-1] == (64, 32, 2) and len(device.tried) > 1
    device.tried.clear()
    start(device)
    assert device.tried == [(64, 32, 2)]


def test_no_room_at_all_is_an_error(start):
    device = Device(16)
    with pytest.raises(OutOfResources):
        start(device)
    assert device.tried[-1] == (16, 16, 1)


def test_an_entry_of_the_gpu_comes_before_its_architecture(monkeypatch):
    entry = {"BLOCK": 1, "num_warps": 1, "num_stages": 1}
    table = {
        name: {"kernels": {"upsample_normalize.forward": {"t8": {"config": {**entry, "BLOCK": block}}}}}
        for name, block in (("NVIDIA X", 512), ("sm90", 128))
    }
    monkeypatch.setattr(tuning, "table", lambda: table)
    for name, shape, block in (("NVIDIA X", "t8", 512), ("another", "t8", 128), ("another", "t9", 256)):
        monkeypatch.setattr(tuning, "_names", lambda index, name=name: (name, "sm90"))
        assert tuning.config("upsample_normalize.forward", shape, torch.device("cuda", 0))[0] == {"BLOCK": block}
    # builds are made from the architecture's entry, so a node with builds looks for those
    monkeypatch.setattr(tuning, "AOT_FOLDER", "builds")
    monkeypatch.setattr(tuning, "_names", lambda index: ("NVIDIA X", "sm90"))
    assert tuning.config("upsample_normalize.forward", "t8", torch.device("cuda", 0))[0] == {"BLOCK": 128}


def test_committed_configurations_are_candidates():
    for entry in json.loads(tuning.FILE.read_text()).values():
        for kernel, shapes in entry["kernels"].items():
            assert all(one["config"] in tuning.CANDIDATES[kernel] for one in shapes.values())
