"""Captions in the form that a data set wants."""

from __future__ import annotations

import pytest

from serve.core.inputs import Item
from serve.core.record import caption_record
from serve.core.style import CaptionStyle
from serve.engines.base import Completion

TEXT = "The image shows a red apple on a table. A dog is left of it! It is small. The background is blue."


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ({}, TEXT),
        ({"strip_openers": True}, TEXT.replace("The image shows a", "A")),
        ({"max_sentences": 2}, "The image shows a red apple on a table. A dog is left of it!"),
        ({"max_words": 14}, "The image shows a red apple on a table."),
        ({"max_words": 5}, "The image shows a red"),
        ({"max_sentences": 1, "strip_openers": True}, "A red apple on a table."),
        (
            {"template": "sks, {caption} (by me)", "max_words": 9},
            "sks, The image shows a red apple on a table. (by me)",
        ),
    ],
)
def test_styles(style, expected):
    assert CaptionStyle(**style).apply(TEXT) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In this image, we can see two cats.", "Two cats."),
        ("In the photo there is a cat.", "A cat."),
        ("This is a picture of a cat.", "A cat."),
        ("this photograph depicts cats.", "Cats."),
        ("The picture has two dogs.", "Two dogs."),
        ("The image quality is low.", "The image quality is low."),
        ("A cat. The image shows a dog.", "A cat. The image shows a dog."),
    ],
)
def test_openers(text, expected):
    assert CaptionStyle(strip_openers=True).apply(text) == expected


def test_a_single_line():
    assert CaptionStyle(single_line=True).apply(" One.\n\nTwo\tthree. ") == "One. Two three."


def test_captions_that_become_equal_count_once():
    completions = [Completion(text, [1], "stop") for text in ("A cat. It sits.", "A cat. It runs.", "A dog.")]
    record = caption_record(Item("a", "/a"), completions, False, "m", style=CaptionStyle(max_sentences=1))
    assert record["captions"] == ["A cat.", "A dog."] and record["caption"] == "A cat." and record["tokens"] == 3
