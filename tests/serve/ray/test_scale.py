"""The simulation of a large run, where its answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale import Plan, simulate

ROOT = Path(__file__).parents[3]


def test_without_losses_it_is_a_division():
    found = simulate(Plan(images=512_000, gpus=4, rate=50, spread=0, lost_after_hours=0))
    assert found["days"] * 86400 == pytest.approx(512_000 / 50 / 4) and found["over_ideal"] == pytest.approx(0)
    assert found["gpus_lost"] == found["images_done_again"] == 0 and found["parts"] == 1000
    assert found["cost"] == pytest.approx(512_000 / 50 / 3600 * 3.0)
    assert found["reads_per_second"] == 200 and found["read_gbit_per_second"] == pytest.approx(0.24)


def test_losses_cost_what_theory_says():
    """A GPU's share of lost time: half a unit and the restart, each mean life."""
    plan = Plan(images=20_000_000, gpus=16, rate=50, spread=0, lost_after_hours=1, restart_minutes=6)
    found = simulate(plan)
    expected = (6 * 60 + plan.unit / plan.rate / 2) / 3600
    # about 400 losses: their number's standard deviation is 5 % of itself
    assert found["over_ideal"] == pytest.approx(expected, rel=0.2)
    assert found["images_done_again"] == pytest.approx(found["gpus_lost"] * plan.unit / 2, rel=0.2)


def test_the_page_quotes_the_committed_figures():
    page = (ROOT / "docs" / "scale.md").read_text()
    rate = json.loads((ROOT / "benchmarks" / "caption.json").read_text())["parts"]["service"]["images_per_second"]
    assert f"{rate:.0f} captions a second (`benchmarks/caption.json`)" in page
    simulated = json.loads((ROOT / "benchmarks" / "scale.json").read_text())
    assert f"takes {1000 * simulated['decode']['seconds']:.0f} ms" in page
    for run in simulated["runs"]:
        found = run["found"]
        cells = (f"{found['days']:.1f}", f"{found['gpu_hours']:,.0f}", f"{found['cost']:,.0f}", found["gpus_lost"])
        assert f"| {run['assumed']['rate']:g} | {' | '.join(map(str, cells))} |" in page
        assert f"| {run['decode_cores_per_gpu']:.1f} | {found['read_gbit_per_second']:.1f} Gbit/s |" in page
