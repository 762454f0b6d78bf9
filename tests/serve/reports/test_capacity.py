"""Memory and cost that `--plan` computes, against sizes that are published or counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve.reports.capacity import IN_FLIGHT, MEASURED, capacity, report, sizes_of
from serve.vllm_caption import main
from vlv.checkpoints.folder import Checkpoint


def test_sizes_of_the_published_model():
    found = capacity(*sizes_of("qwen2.5-3b"), max_tokens=300, batch=1)
    assert found.language_model == 2 * 3_085_938_688  # parameters of Qwen2.5-3B as its publisher counts them
    # keys and values: 36 layers x 2 heads x 128 x 2 bytes each, of 77 + 300 tokens
    assert found.cache_per_request == 2 * 36 * 2 * 128 * 2 * 377
    assert found.total(512) - found.total(256) == 256 * found.cache_per_request


def test_activations_grow_with_the_batch():
    one, four = (capacity(*sizes_of("qwen2.5-0.5b"), batch=batch).activations for batch in (1, 4))
    # the widest map of one image: 192 x 192 x 256 in bfloat16, of which several are alive at once
    assert one > 2 * 192 * 192 * 256 * 2 and 3.5 * one < four < 4.5 * one


def test_report_of_a_checkpoint(captioning_checkpoint):
    text = report(str(captioning_checkpoint), gpu_memory=2.55, price=None, max_tokens=64)
    assert [line.split()[0] for line in text.splitlines() if line[:1].isdigit()] == [str(n) for n in IN_FLIGHT]
    assert "not measured" in text and " yes" in text and " no" in text
    queries = Checkpoint.open(captioning_checkpoint).config.queries
    assert f"{queries} + 64 tokens" in text


def test_cost_comes_from_the_measured_rate():
    assert "$8.71 for a million captions" in report("qwen2.5-3b", None, 2.5)  # 1e6 / 79.7 / 3600 * 2.5


@pytest.mark.parametrize("name", ["nowhere", "tests"])
def test_what_is_no_checkpoint_is_refused(name):
    with pytest.raises(ValueError, match=name):
        report(name, None, None)


def test_the_readme_table_is_what_is_computed():
    root = Path(__file__).parents[3]
    rows = re.findall(r"^\| Qwen2\.5-([\d.]+B)[^|]*\|(.*)\|$", (root / "README.md").read_text(), re.M)
    assert len(rows) == 3
    for size, cells in rows:
        found = capacity(*sizes_of(f"qwen2.5-{size.lower()}"))
        expected = [f"{found.total(count) / 1e9:.1f} GB" for count in (64, 256, 512)]
        assert [cell.strip() for cell in cells.split("|")][:3] == expected, size
    measured = json.loads((root / "benchmarks" / "gpu" / "h200.json").read_text())["captioning"]
    assert MEASURED["qwen2.5-3b"][0] == measured["captions_per_s_by_in_flight"]["512"]


def test_an_unknown_name_is_misuse_and_the_presets_are_named(capsys):
    assert main(["--plan", "nonsense"]) == 2
    assert "--plan: no checkpoint at nonsense: " in (text := capsys.readouterr().err)
    assert text.rstrip().endswith("or a preset: tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b")
