"""Layout: boxes of captions and of a probe, scored by hand; and boxes that a language model reads from captions."""

import json

import pytest
import torch

from vlv.data import scenes
from vlv.evaluate.__main__ import main
from vlv.evaluate.judges import boxes as judge_boxes
from vlv.evaluate.metrics.boxes import score
from vlv.evaluate.synthetic import attribute_probe, box_probe, layout

FROG = scenes.Thing("frog", "large", 0, 0, 0, 0, 32)
CAT = scenes.Thing("cat", "small", 1, 1, 32, 48, 16)
SCENE = scenes.Scene("pink", (250, 175, 200), (FROG, CAT))
TEXT = "The image shows a large frog and a small cat on a pink background. The frog is at the top left. "


def test_scores_by_hand():
    known = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]])
    present = torch.ones(1, 2, dtype=torch.bool)
    moved = known + torch.tensor([0.25, 0.0, 0.25, 0.0])  # half of it overlaps: 0.125 of 0.375
    found = score(moved, boxes=known, present=present)
    assert found["iou"] == pytest.approx(1 / 3) and found["centre_error"] == pytest.approx(0.25)
    # a box that is not placed counts 0, and has no centre
    found = score(known, torch.tensor([[True, False]]), boxes=known, present=present)
    assert found == {"iou": 0.5, "centre_error": 0.0, "placed": 0.5, "objects": 2}
    assert score(known, ~present, boxes=known, present=present)["centre_error"] is None
    apart = score(known.flip(1), boxes=known, present=present)
    assert apart["iou"] == 0 and apart["centre_error"] == pytest.approx(0.5**0.5)


def test_boxes_of_captions():
    boxes, present = layout.true_boxes([SCENE])
    found, placed = layout.boxes_of_captions([TEXT + "The cat sits at the bottom right. The cat is below the frog."])
    assert torch.equal(placed, present)
    assert score(found[:, [scenes.KINDS.index("frog")]], boxes=boxes[:, [scenes.KINDS.index("frog")]],
                        present=present[:, [scenes.KINDS.index("frog")]])["iou"] == 1  # fmt: skip
    # the small cat's exact corner is not said: the middle of its quadrant is (0.75, 0.75), it is at (0.625, 0.875)
    cat = [scenes.KINDS.index("cat")]
    found = score(found[:, cat], boxes=boxes[:, cat], present=present[:, cat])
    assert found["iou"] == pytest.approx(0.125**2 / (2 * 0.25**2 - 0.125**2))
    assert found["centre_error"] == pytest.approx((2 * 0.125**2) ** 0.5)
    assert layout.boxes_of_captions([TEXT])[1].sum() == 1


def test_the_probe_finds_boxes_that_are_there_and_none_in_noise():
    """Embeddings that are the boxes themselves, turned by a random matrix, are read; shuffled they are not."""
    things = [scenes.sample(s) for s in range(600)]
    boxes, present = layout.true_boxes(things)
    generator = torch.Generator().manual_seed(0)
    flat = (boxes * present[..., None]).flatten(1)
    contexts = (flat @ torch.randn(flat.shape[1], 4 * 64, generator=generator)).unflatten(1, (4, 64))
    probe = box_probe.fit(contexts[:500], boxes[:500], present[:500], steps=150)
    with torch.inference_mode():
        found = score(probe(contexts[500:]), boxes=boxes[500:], present=present[500:])
        other = score(probe(contexts[500:].roll(1, 0)), boxes=boxes[500:], present=present[500:])
    assert found["iou"] > 2 * other["iou"] and found["centre_error"] < 0.5 * other["centre_error"]


def test_attributes_by_hand():
    truth = attribute_probe.labels([SCENE, SCENE])
    small, large = (list(scenes.SIZES).index(s) for s in ("small", "large"))
    assert truth[0].tolist() == [
        1 + 2 * scenes.KINDS.index("frog") + large, 0, 0, 1 + 2 * scenes.KINDS.index("cat") + small,
        list(scenes.BACKGROUNDS).index("pink"),
    ]  # fmt: skip
    said = truth.clone()
    assert attribute_probe.compare(said, truth) == dict.fromkeys(
        ("objects", "places", "sizes", "background", "everything"), 1
    )
    said[0, [0, 3]] = said[0, [3, 0]]  # the right objects in each other's place
    found = attribute_probe.compare(said, truth)
    assert (found["objects"], found["places"], found["sizes"], found["everything"]) == (1, 0.5, 0.5, 0.5)
    said = truth.clone()
    said[1, 0] -= 1  # a small frog
    found = attribute_probe.compare(said, truth)
    assert (found["objects"], found["places"], found["sizes"]) == (1, 1, 0.5)
    said[1, 4] += 1
    assert attribute_probe.compare(said, truth)["background"] == 0.5


def test_the_linear_probe_reads_what_is_linear():
    things = [scenes.sample(s) for s in range(1200)]
    truth = attribute_probe.labels(things)
    sizes = [attribute_probe.CONTENTS] * 4 + [len(scenes.BACKGROUNDS)]
    codes = torch.cat([torch.nn.functional.one_hot(c, n) for c, n in zip(truth.T, sizes, strict=True)], 1).float()
    contexts = (codes @ torch.randn(codes.shape[1], 256, generator=torch.Generator().manual_seed(0))).unflatten(
        1, (2, 128)
    )
    probe = attribute_probe.fit(contexts[:1000], truth[:1000], epochs=10)
    assert attribute_probe.compare(probe.predict(contexts[1000:]), truth[1000:])["everything"] > 0.8
    assert attribute_probe.compare(probe.predict(contexts[1000:].roll(1, 0)), truth[1000:])["everything"] < 0.05


def test_the_command_on_scenes(captioning_checkpoint, tmp_path):
    words = ["layout", "--ckpt", captioning_checkpoint, "--train", "200", "--count", "20", "--steps", "20"]
    assert main([str(w) for w in [*words, "-o", tmp_path / "out.json"]]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(rows) == {
        "probe of the embeddings", "the same, other scenes' embeddings", "each kind's mean box",
        "places said in the captions",
    }  # fmt: skip
    assert all(0 <= r["iou"] <= 1 for r in rows.values())


@pytest.fixture
def photographs(tmp_path):
    boxes = {"a.jpg": [{"label": "cat", "box": [0, 0, 0.5, 0.5]}, {"label": "dog", "box": [0.5, 0.5, 0.5, 0.5]}]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes | {"b.jpg": [], "c.jpg": boxes["a.jpg"]}))
    (tmp_path / "c.json").write_text(json.dumps({"a.jpg": "A cat and a dog.", "b.jpg": "Nothing."}))
    return ["layout", "--boxes", str(tmp_path / "boxes.json"), "--captions", f"ours={tmp_path / 'c.json'}"]


def test_boxes_by_a_language_model(photographs, server, tmp_path):
    server.answer = lambda body: 'Sure: {"1": [0, 0, 0.5, 0.25], "2": null}'
    words = [*photographs, "--url", server.url, "--model", "m", "-o", str(tmp_path / "out.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    row = found["rows"]["ours"]
    assert found["photographs"] == 1 and (row["placed"], row["objects"]) == (0.5, 2)
    assert row["iou"] == pytest.approx(0.25) and row["centre_error"] == pytest.approx(0.125)
    text = server.asked[0][2]["messages"][1]["content"]
    assert "A cat and a dog." in text and "1. cat\n2. dog" in text


@pytest.mark.parametrize(
    "answer",
    [
        '{"1": [0, 0, 0.5, 0.25], "2": null}',
        '{"1": null, "2": null} is the form. ```json\n{"1": [0, 0, 0.5, 0.25], "2": null}\n``` {"sure": 0.9}',
        '{"boxes": {"1": [0, 0, "0.5", 0.25], "2": null}}',
    ],
)
def test_boxes_in_every_form(answer):
    assert judge_boxes.parse(answer) == {"1": (0, 0, 0.5, 0.25), "2": None}


@pytest.mark.parametrize("answer", ["", "[1]", '{"1": [0, 0, 1]}', '{"1": [0.5, 0, 0.5, 1]}', '{"1": [0, 0, 2, 1]}'])
def test_no_boxes(answer):
    with pytest.raises(ValueError, match="JSON object"):
        judge_boxes.parse(answer)


def test_misuse(photographs, tmp_path, capsys):
    assert main(["layout"]) == 2 and "either --ckpt" in capsys.readouterr().err
    assert main(photographs[:3]) == 2 and "--boxes needs --captions" in capsys.readouterr().err
    (tmp_path / "boxes.json").write_text('{"a.jpg": [{"label": "cat", "box": [0, 0, 20, 30]}]}')
    assert main([*photographs, "--model", "m", "--estimate"]) == 1
    assert "no [x, y, width, height] in shares" in capsys.readouterr().err
