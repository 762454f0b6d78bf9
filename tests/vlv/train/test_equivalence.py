"""The trainer repeats the losses of the loop that trained the bundled checkpoint, before there was one trainer."""

import json
from pathlib import Path

import pytest

from benchmarks.trainer_equivalence import LIMIT, now


def test_the_toy_recipe_gives_the_losses_of_the_trainer_before(tmp_path):
    """50 steps of both stages, the bundled checkpoint's sizes at a batch of 4; the encoder joins stage 2 at step 25."""
    recorded = json.loads((Path(__file__).parent / "toy_losses.json").read_text())
    found = now(recorded["settings"], tmp_path / "run", with_t2i=False)
    for name in ("stage1", "stage2"):
        assert len(recorded["losses"][name]) == 50
        assert found[name] == pytest.approx(recorded["losses"][name], rel=LIMIT), name
