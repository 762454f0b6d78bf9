"""The official VQA accuracy: answers normalised, then compared with those of ten people, leaving one out by turns.

Source of the rules: Goyal et al. 2017 (VQA v2.0, arXiv 1612.00837) and the evaluation code published with the data
set (GT-Vision-Lab/VQA, vqaEval.py); its oddities are kept, since published figures have them.
"""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
# What a word is spelled like when one of its apostrophes was left out is put right. Words whose bare spelling is
# another word (we'll, she'd, I'm ...) are not in the official list.
_SPELLED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _SPELLED for i, letter in enumerate(w) if letter == "'"}
CONTRACTIONS |= {"she'dve": "she'd've", "shed've": "she'd've", "we'dve": "we'd've", "wed've": "we'd've"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round

_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")


def without_punctuation(text: str) -> str:
    """Remove punctuation beside a space, or all of it where a number has a comma; make other punctuation a space.

    The first 32 periods that no digit follows are removed: the official code passes a flag in place of a count.
    """
    cleaned = text
    number = _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside or number else " ")
    return _PERIOD.sub("", cleaned, count=int(re.UNICODE))


def normalise(text: str) -> str:
    """Return lower case, digits for number words, no articles, apostrophes where they belong, no punctuation."""
    words = [NUMBERS.get(w, w) for w in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def accuracy(answer: str, people: list[str]) -> float:
    """Return the answer's accuracy against the people's answers: min(1, matches / 3), averaged over leaving one out.

    As in the official code, nothing is normalised where all people say the same.
    """
    if not people:
        raise ValueError("a question without answers has no accuracy")
    answer, people = _plain(answer), [_plain(p) for p in people]
    if len(set(people)) > 1:
        answer, people = normalise(answer), [normalise(p) for p in people]
    matches = [p == answer for p in people]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(people)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
