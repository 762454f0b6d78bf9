"""Generate the synthetic scenes of the bundled checkpoint: emoji on a plain background, with true captions.

A scene has one to three objects of different kinds, each small or large, in one of the four
quadrants of a square canvas (a small one in a corner of it), on one of eight background colours. Everything follows
from an integer seed, so a data set is a range of seeds: training takes [0, 2**31), the held-out
scenes start at `HELD_OUT`.

The glyphs come from Noto Color Emoji (SIL Open Font License 1.1, see assets/OFL.txt).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlv.data.image import read_rgba

SPRITE = 64  # pixels a side of one glyph in the sheet
CANVAS = 64  # pixels a side of a scene
HELD_OUT = 2**31
KINDS = (
    "apple banana carrot pizza donut octopus cat frog fish turtle butterfly penguin "
    "car bus rocket sailboat tree sunflower star heart guitar ball crown cactus"
).split()
BACKGROUNDS = {
    "white": (245, 245, 245), "black": (25, 25, 25), "gray": (140, 140, 140), "blue": (110, 160, 240),
    "green": (130, 205, 130), "yellow": (245, 230, 120), "pink": (250, 175, 200), "purple": (150, 105, 200),
}  # fmt: skip
SIZES = {"small": 16, "large": 32}  # sides in pixels: a quarter of a quadrant, and all of it
GRID = 16  # objects lie on multiples of this many pixels, where a small text-to-image model learns them soonest
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")


@dataclass(frozen=True)
class Thing:
    """Describe one object: its kind, size word, quadrant, and its box in pixels of the canvas."""

    kind: str
    size: str
    row: int
    column: int
    x: int
    y: int
    side: int

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Describe what an image shows; `things` in reading order, `color` the background's RGB."""

    background: str
    color: tuple[int, int, int]
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> set[str]:
        return {t.kind for t in self.things}


@functools.cache
def _sprites() -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """Return (kind, side) -> premultiplied RGB [side, side, 3] and transparency [side, side, 1], float32."""
    sheet = read_rgba(Path(__file__).parents[1] / "assets" / "emoji.png")
    cache = {}
    for i, kind in enumerate(KINDS):
        glyph = sheet.crop((SPRITE * i, 0, SPRITE * (i + 1), SPRITE))
        for side in SIZES.values():
            rgba = np.asarray(glyph.resize((side, side), Image.Resampling.BOX), np.float32)
            alpha = rgba[..., 3:] / 255
            cache[kind, side] = (rgba[..., :3] * alpha, 1 - alpha)
    return cache


def sample(seed: int) -> Scene:
    """Return the scene of a seed (any non-negative int)."""
    rng = np.random.default_rng(seed)
    background = str(rng.choice(list(BACKGROUNDS)))
    color = np.clip(np.array(BACKGROUNDS[background]) + rng.integers(-8, 9), 0, 255)
    count = int(rng.integers(1, 4))
    kinds = rng.choice(KINDS, count, replace=False)
    things = []
    for kind, quadrant in zip(kinds, np.sort(rng.choice(4, count, replace=False)), strict=True):
        size = str(rng.choice(list(SIZES)))
        side = SIZES[size]
        row, column = divmod(int(quadrant), 2)
        x, y = GRID * rng.integers((CANVAS // 2 - side) // GRID + 1, size=2) + CANVAS // 2 * np.array([column, row])
        things.append(Thing(str(kind), size, row, column, int(x), int(y), side))
    return Scene(background, tuple(int(c) for c in color), tuple(things))


def render(scene: Scene) -> np.ndarray:
    """Render a scene to an RGB image uint8 [CANVAS, CANVAS, 3]."""
    canvas = np.empty((CANVAS, CANVAS, 3), np.float32)
    canvas[:] = scene.color
    for t in scene.things:
        rgb, clear = _sprites()[t.kind, t.side]
        box = canvas[t.y : t.y + t.side, t.x : t.x + t.side]
        box *= clear
        box += rgb
    return canvas.round().astype(np.uint8)


def write_scenes(folder: Path, first: int, count: int) -> None:
    """Write `count` held-out scenes, from number `first` on, as folder/scene-NUMBER.png. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(render(sample(HELD_OUT + number))).save(folder / f"scene-{number:05}.png")


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def prompt(scene: Scene, rng: np.random.Generator) -> str:
    """Return a short text-to-image prompt that describes the whole scene (at most 30 words and commas)."""
    parts = [f"a {t.size} {t.kind} at the {t.place}" for t in scene.things]
    if rng.random() < 0.3:
        rng.shuffle(parts)
    if rng.random() < 0.5:
        return ", ".join(parts) + f", on a {scene.background} background"
    return f"{scene.background} background, " + ", ".join(parts)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a varied, true description: the objects, their places, and how two of them relate."""
    names = _join([f"a {t.size} {t.kind}" for t in scene.things])
    ground = f"{scene.background} background"
    number = ("one object", "two objects", "three objects")[len(scene.things) - 1]
    sentences = [
        _pick(
            rng,
            f"The image shows {names} on a {ground}.",
            f"On a {ground}, there is {names}." if len(scene.things) == 1 else f"On a {ground}, there are {names}.",
            f"The picture has {number} on a {ground}: {names}.",
        )
    ]
    for t in scene.things:
        verb = _pick(rng, "is at", "sits at", "is placed at")
        sentences.append(f"The {t.kind} {verb} the {t.place}.")
    sentences += _relations(scene, rng)
    return " ".join(sentences)


def _relations(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return one true relation sentence for a scene of two or three objects, none for a single object.

    The sentence names the place before the object: in thousands of steps a language model this small learns the
    object of a place, but not the place of an object, and without the place it guessed the direction.
    """
    if len(scene.things) < 2:
        return []
    i, j = rng.choice(len(scene.things), 2, replace=False)
    a, b = scene.things[i], scene.things[j]
    words = []
    if a.column != b.column:
        words.append("to the left of" if a.column < b.column else "to the right of")
    if a.row != b.row:
        words.append("above" if a.row < b.row else "below")
    return [f"At the {a.place}, the {a.kind} is {_pick(rng, *words)} the {b.kind}."]


@dataclass(frozen=True)
class Judgement:
    """Hold which claims of a caption are true for its scene; `relations` is (true claims, all claims)."""

    objects: bool
    count: bool
    background: bool
    sizes: bool
    places: bool
    relations: tuple[int, int]


def judge(text: str, scene: Scene) -> Judgement:
    """Check a caption's claims against its scene; a claim that the caption does not make counts as false."""
    things = {t.kind: t for t in scene.things}
    opening = text.split(".")[0]
    named = re.findall(rf"\b({'|'.join(KINDS)})\b", opening)
    number = {"one": 1, "two": 2, "three": 3}
    stated = [number[w] for w in re.findall(r"\b(one|two|three) objects?\b", text)]
    sizes = {k: s for s, k in re.findall(rf"\b({'|'.join(SIZES)}) ({'|'.join(KINDS)})\b", text)}
    places = re.findall(rf"\bThe ({'|'.join(KINDS)}) (?:is at|sits at|is placed at) the (\w+ \w+)\.", text)
    repeated = re.findall(r"\bAt the (\w+ \w+), the (\w+)", text)
    claims = re.findall(r"[Tt]he (\w+) is (?:to the )?(left of|right of|above|below) the (\w+)\.", text)
    return Judgement(
        objects=set(named) == set(things) and len(named) == len(things),
        count=len(named) == len(things) and all(n == len(things) for n in stated),
        background=re.findall(r"(\w+) background", text) == [scene.background],
        sizes=sizes == {k: t.size for k, t in things.items()},
        places=dict(places) == (true := {k: t.place for k, t in things.items()})
        and all(true.get(kind) == place for place, kind in repeated),
        relations=(sum(_holds(things.get(a), r, things.get(b)) for a, r, b in claims), len(claims)),
    )


def _holds(a: Thing | None, relation: str, b: Thing | None) -> bool:
    if a is None or b is None:
        return False
    centre = lambda t: (t.x + t.side / 2, t.y + t.side / 2)  # noqa: E731
    (ax, ay), (bx, by) = centre(a), centre(b)
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]
