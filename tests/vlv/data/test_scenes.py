"""The synthetic scenes: scenes follow from their seed, captions are true, and the judge can tell."""

import re

import numpy as np
import pytest

from vlv import scenes as command
from vlv.data import scenes
from vlv.evaluate.__main__ import main as evaluate

SEEDS = range(scenes.HELD_OUT, scenes.HELD_OUT + 300)


def test_a_scene_follows_from_its_seed():
    assert scenes.sample(7) == scenes.sample(7) != scenes.sample(8)
    assert np.array_equal(scenes.render(scenes.sample(7)), scenes.render(scenes.sample(7)))


def test_objects_lie_inside_their_quadrant():
    for seed in SEEDS:
        for t in scenes.sample(seed).things:
            half = scenes.CANVAS // 2
            assert t.row * half <= t.y <= (t.row + 1) * half - t.side
            assert t.column * half <= t.x <= (t.column + 1) * half - t.side


def test_every_kind_is_drawn_differently():
    images = []
    for kind in scenes.KINDS:
        thing = scenes.Thing(kind, "large", 0, 0, 0, 0, scenes.SIZES["large"])
        images.append(scenes.render(scenes.Scene("white", (245, 245, 245), (thing,))).tobytes())
    assert len(set(images)) == len(scenes.KINDS) >= 24


def test_captions_are_true_and_varied():
    rng = np.random.default_rng(0)
    captions = []
    for seed in SEEDS:
        scene = scenes.sample(seed)
        text = scenes.caption(scene, rng)
        captions.append(text)
        verdict = scenes.judge(text, scene)
        assert verdict.objects and verdict.count and verdict.background and verdict.sizes and verdict.places, text
        assert verdict.relations == ((1, 1) if len(scene.things) > 1 else (0, 0)), text
    assert len(set(captions)) > 0.95 * len(captions)


def test_prompts_name_everything_within_the_context():
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        scene = scenes.sample(seed)
        text = scenes.prompt(scene, rng)
        assert f"{scene.background} background" in text
        assert all(f"a {t.size} {t.kind} at the {t.place}" in text for t in scene.things)
        assert len(text.replace(",", " ,").split()) <= 30


@pytest.mark.parametrize(
    ("claim", "replacement", "field"),
    [
        ("a large frog", "a large cat", "objects"),
        ("a large frog and a large cat", "a large frog", "count"),
        ("pink", "blue", "background"),
        ("a large frog", "a small frog", "sizes"),
        ("is at the top left", "is at the top right", "places"),
        ("At the top left", "At the top right", "places"),
    ],
)
def test_the_judge_sees_a_false_claim(claim, replacement, field):
    frog = scenes.Thing("frog", "large", 0, 0, 0, 0, 28)
    cat = scenes.Thing("cat", "large", 1, 1, 32, 32, 28)
    scene = scenes.Scene("pink", (250, 175, 200), (frog, cat))
    truth = (
        "The image shows a large frog and a large cat on a pink background. The frog is at the top left. "
        "The cat sits at the bottom right. At the top left, the frog is above the cat."
    )
    assert getattr(scenes.judge(truth, scene), field)
    assert not getattr(scenes.judge(truth.replace(claim, replacement), scene), field)


def test_the_command_writes_scenes_or_says_why_not(tmp_path, capsys):
    assert command.main([str(tmp_path / "made"), "--count", "2"]) == 0
    assert [f.name for f in sorted((tmp_path / "made").iterdir())] == ["scene-00000.png", "scene-00001.png"]
    (tmp_path / "file").write_text("")
    assert command.main([str(tmp_path / "file" / "made")]) == 1
    assert re.fullmatch("error: .*/made cannot be written: Not a directory\n", capsys.readouterr().err)
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), "--count", "0"])
    assert stopped.value.code == 2


def test_measuring_only_this_and_only_that_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(["scenes", "--ckpt", "x", "--captions-only", "--reconstructions-only"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_the_judge_sees_a_false_relation():
    frog = scenes.Thing("frog", "large", 0, 0, 0, 0, 28)
    cat = scenes.Thing("cat", "large", 1, 1, 32, 32, 28)
    scene = scenes.Scene("pink", (250, 175, 200), (frog, cat))
    for text, right in [
        ("The frog is above the cat.", 1),
        ("The frog is below the cat.", 0),
        ("The cat is to the right of the frog.", 1),
        ("The cat is to the left of the frog.", 0),
        ("The cat is above the dog.", 0),
        ("At the bottom right, the cat is above the frog.", 0),
    ]:
        assert scenes.judge(text, scene).relations == (right, 1), text
