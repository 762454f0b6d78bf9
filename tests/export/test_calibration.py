"""Our ranges of activations against those of ONNX Runtime's own calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export import trace
from export.components import Batch
from export.graphs import Graph, Port
from export.quantize import calibration
from export.quantize.calibration import CalibrationError


class Two(Graph):
    """A product, something that makes it negative, and a product again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(9, 5), torch.nn.Linear(5, 7)
        self.inputs, self.outputs, self.blocks = (Port("x", "float32", (9,)),), ("y",), ()

    def forward(self, x):
        return self.second(torch.sin(self.first(x)) - 0.5)


@pytest.fixture(params=[False, True], ids=["one file", "external weights"])
def traced(request, tmp_path, monkeypatch):
    """The graph's file and its inputs."""
    if request.param:
        monkeypatch.setattr(trace, "EXTERNAL", 10)
    written = trace.to_onnx(Two(), tmp_path / "two.onnx", Batch(1, 3, 8), 20)
    assert (len(written.files) == 2) == request.param
    rows = [{"x": np.random.default_rng(seed).standard_normal((3, 9), np.float32)} for seed in range(4)]
    return tmp_path / written.files[0], rows


def test_ranges_are_onnx_runtimes(traced, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization.calibrate import create_calibrator

    graph, rows = traced

    class Reader(CalibrationDataReader):
        left = iter(rows)

        def get_next(self):
            return next(self.left, None)

    kinds = ["MatMul", "Gemm"]
    theirs = create_calibrator(graph, kinds, tmp_path / "theirs.onnx")
    theirs.collect_data(Reader())
    expected = theirs.compute_data().data
    before = {file.name for file in tmp_path.iterdir()}
    found = calibration.ranges(graph, kinds, rows).data
    assert found.keys() == expected.keys() and len(found) >= 4
    for name, entry in expected.items():
        for one, other in zip(found[name].range_value, entry.range_value, strict=True):
            assert one.shape == other.shape and one == other, name
    assert {file.name for file in tmp_path.iterdir()} == before, "nothing is left behind"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_values_that_are_not_finite_are_named(traced, value, place):
    """Wherever they are: ReduceMin and ReduceMax of a NaN depend on its place."""
    graph, rows = traced
    rows[1]["x"][1, place] = value
    with pytest.raises(CalibrationError, match=r"x and \d+ more tensors are not finite on the calibration images"):
        calibration.ranges(graph, ["MatMul", "Gemm"], rows)
