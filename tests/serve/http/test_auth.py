"""Test keys, rates and admission without a server, and the clean-up of a caption while it is written."""

from __future__ import annotations

import json
import random

import pytest

from serve.http.admission import Admission
from serve.http.auth import Key, Keys, KeysError
from serve.http.errors import ApiError
from serve.http.openai_api import Cleaner
from vlv.model.clean_up import clean_caption


def test_keys_are_kept_as_hashes(tmp_path):
    file = tmp_path / "keys.json"
    keys = [Keys.add(file, name, per_minute=5) for name in ("a", "b")]
    assert len(set(keys)) == 2 and not any(key in file.read_text() for key in keys)
    found = Keys.load(file)
    assert [found.find(f"Bearer {key}").name for key in keys] == ["a", "b"]
    assert found.find(f"bearer  {keys[0]} ").per_minute == 5
    for wrong in (None, "", "Bearer", "Bearer ", keys[0], f"Basic {keys[0]}", f"Bearer {keys[0]}x", "Bearer \udcff"):
        with pytest.raises(ApiError) as refused:
            found.find(wrong)
        assert refused.value.status == 401
    assert Keys().find(None).name == "anybody"


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"name": "a"}]', '[{"name": "a", "sha256": "00", "per_minute": 1, "concurrent": 1}]']
)
def test_files_that_hold_no_keys(tmp_path, content):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(KeysError, match=r"keys.json is no file of keys .*--new-key NAME"):
        Keys.load(tmp_path / "keys.json")
    with pytest.raises(KeysError, match="cannot read"):
        Keys.load(tmp_path / "absent.json")


def test_a_rate_is_a_bucket_of_a_minute():
    key = Key("a", per_minute=60)
    assert key.consume(60, now=1000.0) == 0.0  # a minute's worth at once
    assert key.consume(1, now=1000.0) == pytest.approx(1.0)  # then one a second
    assert key.consume(1, now=1000.5) == pytest.approx(0.5)
    assert key.consume(1, now=1001.0) == 0.0
    assert key.consume(30, now=1031.0) == 0.0 and key.consume(1, now=1031.0) > 0
    assert key.consume(60, now=9999.0) == 0.0 and key.consume(1, now=9999.0) > 0  # never more than a minute's


def test_leases_are_released_whatever_happens():
    admission, key = Admission(4), Key("a", concurrent=3)
    with pytest.raises(ZeroDivisionError), admission.enter(key) as lease:
        lease.reserve(2)
        assert (admission.active, key.active) == (3, 3)
        with pytest.raises(ApiError) as refused, admission.enter(key):
            pass
        assert refused.value.status == 429
        with pytest.raises(ApiError, match="4 captions in one request: at most 3 here") as refused:
            lease.reserve(1)
        assert refused.value.status == 400
        with admission.enter(Key("b")) as other, pytest.raises(ApiError) as refused:
            other.reserve(1)
        assert refused.value.status == 503 and refused.value.retry_after >= 1
        raise ZeroDivisionError
    assert (admission.active, key.active) == (0, 0)


def test_all_bodies_together_are_limited():
    admission = Admission(4, max_bytes=100)
    with admission.body() as one:
        one(60)
        with pytest.raises(ApiError) as refused, admission.body() as other:
            other(40)
            other(1)
        assert refused.value.status == 503 and admission.bytes == 60
        one(40)
    assert admission.bytes == 0


def test_a_refused_request_costs_no_rate():
    admission, key = Admission(1), Key("a", per_minute=2)
    for _ in range(10):
        with admission.enter(Key("b")), pytest.raises(ApiError), admission.enter(key):
            pass
    with admission.enter(key) as lease:
        assert lease.images == 1


@pytest.mark.parametrize("seed", range(200))
def test_a_caption_cleaned_while_it_is_written(seed):
    """Whatever the pieces, they add up to the clean-up of the whole."""
    draw = random.Random(seed)
    words = ["A cat", "a dog", ". ", ".", "! ", "? ", " ", "\n", "3.5", "The end. ", "A cat. ", "A cat. ", "Dr.", "…"]
    text = "".join(draw.choice(words) for _ in range(draw.randint(0, 25)))
    cleaner, out, rest = Cleaner(), [], text
    while rest:
        n = draw.randint(1, 5)
        out.append(cleaner.push(rest[:n]))
        rest = rest[n:]
    assert "".join([*out, cleaner.end()]) == clean_caption(text), json.dumps(text)
