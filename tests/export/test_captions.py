"""The check of captions: greedy whatever the model's settings, and the same verdict for any scenes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from export.manifest import Manifest
from export.runtimes.factory import open_runtime
from export.verification.captions import MAX_SCENES, SCENES, Agreement, Captions
from export.verification.inputs import NOISE, VerificationInputs, scene_images
from tests.export.conftest import BUNDLED
from tests.export.toy import export
from vlv.checkpoints.folder import Checkpoint

HOSTILE = {
    "do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2, "min_length": 60, "num_beams": 3,
}  # fmt: skip


def test_agreement_and_its_error():
    assert Agreement.of([10, 10], [10, 10]) == Agreement(2, 20, 1.0, 0.5)
    found = Agreement.of([10, 5], [10, 10])  # by hand: deviations of 2.5 and a caption of 10, of 20 tokens
    assert (found.images, found.tokens, found.agreement) == (2, 20, 0.75)
    assert found.error == pytest.approx((2 * 2.5**2 + 10**2) ** 0.5 / 20)
    many = Agreement.of([10] * 320, [10] * 320)
    assert many.is_certain(0.99) and many.passes(0.99) and not Agreement.of([10] * 200, [10] * 200).is_certain(0.99)


def test_a_lucky_draw_is_not_certain():
    """Of captions that lose half their tokens in 2.4 % of all cases, hardly a draw passes at 99 %."""
    draw, passed = np.random.default_rng(0), 0
    for _ in range(200):
        lost = 23 * (draw.random(MAX_SCENES) < 0.024)
        for n in range(SCENES, MAX_SCENES + 1, SCENES):
            found = Agreement.of(list(46 - lost[:n]), [46] * n)
            if found.is_certain(0.99):
                break
        passed += found.passes(0.99)
    assert passed <= 6


def test_an_uncertain_agreement_needs_a_margin_only_at_the_end():
    kept, totals = [10] * (MAX_SCENES - 20) + [5] * 20, [10] * MAX_SCENES
    late = Agreement.of(kept, totals)
    assert late.agreement == pytest.approx(1 - 100 / (10 * MAX_SCENES)) and not late.is_certain(0.99)
    assert not late.passes(0.99) and late.passes(late.agreement - 2.5 * late.error)
    early = Agreement.of([10, 10, 10], [10, 10, 10])
    assert not early.is_certain(0.99) and early.passes(0.99)


def test_the_models_own_settings_change_nothing(checkpoint, tmp_path):
    """With sampling, penalties, beams and minimum lengths in its file, the reference's captions stay greedy."""
    shutil.copytree(BUNDLED, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "llm" / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | HOSTILE))
    inputs = VerificationInputs(checkpoint, 8)
    plain = Captions(checkpoint, inputs.reference, inputs.images[:-NOISE])
    hostile = Captions(Checkpoint.open(tmp_path / "checkpoint"), inputs.reference, inputs.images[:-NOISE])
    found = hostile.agreement(inputs.reference.encode, 1.0)
    assert found.agreement == 1 and found.images == 6 and found.tokens > 60
    prompts = inputs.reference.encode(inputs.images[:-NOISE])
    assert hostile.generate(prompts) == plain.generate(prompts)


def test_right_drafts_save_passes_and_wrong_ones_change_nothing(checkpoint, monkeypatch):
    """Drafts that are wrong in their first token, in one in the middle and in the last are generated again."""
    inputs = VerificationInputs(checkpoint, 8)
    captions = Captions(checkpoint, inputs.reference, inputs.images[:-NOISE])
    prompts = inputs.reference.encode(inputs.images[:-NOISE])
    expected, generate, generated = captions.generate(prompts), captions.generate, []
    monkeypatch.setattr(captions, "generate", lambda rows: generated.append(len(rows)) or generate(rows))
    assert captions.generate_like(prompts, expected) == expected and not generated
    drafts = [list(row) for row in expected]
    for row, place in ((1, 0), (3, len(drafts[3]) // 2), (4, -1)):
        drafts[row][place] += 1
    assert captions.generate_like(prompts, drafts) == expected and generated == [3]
    assert captions.generate_like(prompts.flip(0), expected) == expected[::-1]


def test_scenes_are_others_than_the_verification_inputs(checkpoint):
    size = checkpoint.config.image_size
    first, second = scene_images(size, 0, 0, 8), scene_images(size, 0, 8, 8)
    rows = [one.numpy().tobytes() for one in (*first, *second, *VerificationInputs(checkpoint, 10).images)]
    assert first.shape == (8, 3, size, size) and first.dtype == torch.uint8 and len(set(rows)) == len(rows)


def test_the_verdict_is_the_same_for_any_scenes(tmp_path, checkpoint):
    """Five seeds in float16, which loses no caption."""
    assert export(tmp_path, "fp16", "--components", "encoder", "--no-captions") == 0
    artifact = Manifest.open(tmp_path).checked("encoder")
    runtime = open_runtime("onnx", tmp_path, checkpoint)

    def encode(images):
        return torch.cat([runtime.encode(part) for part in images.split(artifact.profile.max)])

    for seed in range(5):
        inputs = VerificationInputs(checkpoint, 6, seed=seed)
        captions = Captions(checkpoint, inputs.reference, inputs.images[:-NOISE], seed)
        assert captions.agreement(encode, 0.99).passes(0.99)
