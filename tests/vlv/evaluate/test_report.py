"""The report: every kind of result on one page that asks nothing of the network."""

import json
import re

import pytest
from PIL import Image

from vlv.evaluate.__main__ import main
from vlv.evaluate.page import sections

INTERVAL = {"mean": 4.5, "low": 4.25, "high": 4.75, "n": 9}
USAGE = {"model": "m", "tokens_in": 5, "tokens_out": 6}


@pytest.fixture
def results(tmp_path):
    """One file of every kind that the commands write."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    metrics = {"frechet": 12.5, "kernel": 0.25, "kernel_std": 0.01, "cmmd": 3.5, "cosine": 0.875}
    rows = [{"guidance": g, "control": "", "clip": metrics | {"frechet": 10.0 * g}} for g in (1.0, 2.0, 4.0)]
    point = {"noise_error": 0.125, "right": {"objects": 0.75}}
    layout = {"probe": {"iou": 0.5, "centre_error": None, "placed": 1.0, "objects": 3}}
    found = {
        "images": {
            "images": 3, "rows": rows,
            "examples": [{"label": "original", "files": [str(tmp_path / "red.png"), str(tmp_path / "gone.png")]}],
        },
        "judge": {
            "images": 9, "rubric": {"<ours>": {"coverage": INTERVAL}}, "usage": USAGE, "failures": {"a": "no <JSON>"},
            "pairs": {"ours against theirs": {"n": 9, "wins": 5, "win_rate": INTERVAL}},
        },
        "vqa": {"rows": [{"system": "ours", "accuracy": INTERVAL, "by_kind": {"number": 50.0}}], "usage": USAGE},
        "layout": {"rows": layout},
        "references": {"rows": {"ours": {"bleu_1": 0.5, "cider": 1.25}}},
        "scenes": {"captions": {"objects": 0.998, "samples": ["A <cat>."]}, "reconstructions": {"objects_named": 0.98}},
        "bottleneck": {
            "what": "In small.", "settings": {"text_positions": 32},
            "points": [point | {"queries": q, "images": n} for q, n in ((8, 100), (32, 100), (32, 10))],
        },
    }  # fmt: skip
    files = []
    for kind, content in found.items():
        files.append(str(tmp_path / f"{kind}.json"))
        (tmp_path / f"{kind}.json").write_text(json.dumps({"kind": kind, "command": f"run {kind}"} | content))
    assert set(found) == set(sections.RENDERERS)
    return files


def test_one_page_of_everything(results, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert main(["report", *results, "-o", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert text.count("<section>") == 7 and text.count("data:image/png;base64") == 1
    assert "4.5 [4.25, 4.75]" in text and "0.998" in text and "&lt;ours&gt;" in text and "A &lt;cat&gt;." in text
    assert "1 failed, such as no &lt;JSON&gt;" in text
    # one curve a figure of the sweep, and one of attributes over queries and over images each
    assert text.count("<svg") == 4 + 1 + 1  # not of the deviation
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text) and "http" not in text.replace("http-equiv", "")


def test_a_dash_where_nothing_was_measured():
    assert sections.number(None) == sections.number({"mean": None, "low": 0.0, "high": 1.0, "n": 0}) == "–"


def test_what_is_no_result(results, tmp_path, capsys):
    assert main(["report", results[0]]) == 2 and "-o FILE.html is needed" in capsys.readouterr().err
    for content in ("{}", "[]", "{", '{"kind": "images"}', '{"kind": "other"}'):
        (tmp_path / "bad.json").write_text(content)
        assert main(["report", str(tmp_path / "bad.json"), "-o", str(tmp_path / "r.html")]) == 1
        assert "is no result of these commands" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
