"""Read captions of any system, by image: JSON lines, a JSON object, COCO files, or a folder of .txt files.

    {"id": "photos/cat.jpg", "caption": "..."}          one a line, as serve.vllm_caption writes them
    {"cat.jpg": "...", "dog.jpg": "..."}                one object
    [{"image_id": 42, "caption": "..."}, ...]           COCO results; {"annotations": [...]} are references
    FOLDER/cat.txt                                      the caption of cat.jpg

An image's key is its file name without folder and ending, so that systems with other paths still match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from vlv.data.image import EXTENSIONS
from vlv.data.image_files import image_files
from vlv.evaluate.results import EvaluationError

NAMES = ("image_id", "id", "image", "file_name", "path", "filename")


def key(name: str | int) -> str:
    """Return the key of an image: the file name's stem, or the id itself."""
    return Path(str(name)).stem if "." in Path(str(name)).name else Path(str(name)).name


def read(path: Path) -> dict[str, str]:
    """Read one caption an image. Raises OSError, and EvaluationError for a file that is no such or repeats an image."""
    found: dict[str, str] = {}
    for name, text in _records(path):
        if name in found:
            raise EvaluationError(f"{path} has two captions of {name!r}: one an image is expected")
        found[name] = text
    if not found:
        raise EvaluationError(f"{path} holds no captions")
    return found


def read_several(path: Path) -> dict[str, list[str]]:
    """Read all captions of each image, as references are. Raises as `read`."""
    found: dict[str, list[str]] = {}
    for name, text in _records(path):
        found.setdefault(name, []).append(text)
    if not found:
        raise EvaluationError(f"{path} holds no captions")
    return found


def images(paths: list[Path]) -> dict[str, Path]:
    """Return image files, and those of folders, by key. Raises EvaluationError for none, or two of one name."""
    found: dict[str, Path] = {}
    for file in image_files(paths):
        if other := found.get(key(file.name)):
            raise EvaluationError(f"{other} and {file} have the same name: their captions could not be told apart")
        found[key(file.name)] = file
    if not found:
        raise EvaluationError(f"no images in {', '.join(map(str, paths))}: looked for {' '.join(sorted(EXTENSIONS))}")
    return found


def by_reference(texts: dict[str, str], references: dict[str, list[str]]) -> dict[str, str]:
    """Return captions under the references' keys: where those are COCO's numbers, by the end of the file name."""
    if set(texts) & set(references) or not all(key.isdigit() for key in references):
        return texts
    ends = {key: re.search(r"\d+$", key) for key in texts}
    return {str(int(ends[key][0])): text for key, text in texts.items() if ends[key]}


def common(systems: dict[str, dict[str, str]], *others: set[str]) -> list[str]:
    """Return the keys that every system has, sorted. Raises EvaluationError where there are none."""
    shared = set.intersection(*(set(s) for s in systems.values()), *others)
    if not shared:
        sizes = ", ".join(f"{name} {len(s)}" for name, s in systems.items())
        raise EvaluationError(f"no image is in all files ({sizes} captions): do the names of the images agree?")
    return sorted(shared)


def _records(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield file.stem, file.read_text(encoding="utf-8").strip()
        return
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = [_line(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(whole, dict) and "annotations" in whole:
        whole = whole["annotations"]
    if isinstance(whole, dict) and not ("caption" in whole or "captions" in whole):
        whole = [{"id": name, "caption": value} for name, value in whole.items()]
    for i, record in enumerate([whole] if isinstance(whole, dict) else whole, 1):
        name = next((record[n] for n in NAMES if n in record), None) if isinstance(record, dict) else None
        texts = _texts(record) if name is not None else None
        if texts is None:
            raise EvaluationError(
                f"{path}, record {i}: an image ({' or '.join(NAMES[:3])}) and its caption are expected"
            )
        for caption in texts:
            yield key(name), caption


def _texts(record: dict) -> list[str] | None:
    value = record.get("captions", record.get("caption"))
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else None


def _line(path: Path, number: int, line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}, line {number} is no JSON: {error}") from error
