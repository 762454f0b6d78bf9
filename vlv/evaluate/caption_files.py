"""Read captions of any system, by image: JSON lines, a JSON object, COCO files, or a folder of .txt files.

    {"id": "photos/cat.jpg", "caption": "..."}          one a line, as serve.vllm_caption writes them
    {"cat.jpg": "...", "dog.jpg": "..."}                one object
    [{"image_id": 42, "caption": "..."}, ...]           COCO results
    {"images": [...], "annotations": [...]}             COCO captions or references; `images` names the files
    FOLDER/cat.txt                                      the caption of cat.jpg

An image's key is its file name without folder and ending, so that systems with other paths still match. Numbers in
`image_id` are keys only where no file name is given: in a COCO file with `images` they may be running numbers.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from vlv.data.image import EXTENSIONS
from vlv.data.image_files import image_files
from vlv.evaluate.results import EvaluationError

# fields with an image's name; the first that a record has counts
NAMES = ("file_name", "filename", "image_id", "image", "id", "path")


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


def coco_files(path: Path) -> dict[str, str]:
    """Return the keys of the images that a COCO file names, by its own ids; empty for other files. Raises as `read`."""
    content = None if path.is_dir() else _content(path)
    return _coco_files(path, content) if isinstance(content, dict) else {}


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


def by_number(texts: dict[str, str]) -> dict[int, str]:
    """Return captions by the number at the end of the file name, COCO's image id (COCO_val2014_000000000042.jpg).

    Captions without a number are left out. Raises EvaluationError where two have the same.
    """
    found: dict[int, str] = {}
    names: dict[int, str] = {}
    for name, text in texts.items():
        if digits := re.search(r"\d+$", name):
            number = int(digits[0])
            if number in names:
                raise EvaluationError(f"{names[number]!r} and {name!r} have the same image number {number}")
            names[number], found[number] = name, text
    return found


def match(texts: dict[str, str], keys: Collection[str], files: dict[str, str] | None = None) -> dict[str, str]:
    """Return captions under the keys of images or references, where one side has bare numbers.

    A number is an id of `files` (`coco_files` of the references), or else what a key ends with. Captions stay under
    their own keys where some match as they are, or both sides have names.
    """
    if set(texts) & set(keys):
        return texts
    if not (all(name.isdigit() for name in texts) or all(name.isdigit() for name in keys)):
        return texts
    ends = [(int(digits[0]), name) for name in keys if (digits := re.search(r"\d+$", name))]
    count = Counter(number for number, _ in ends)
    known = {number: name for number, name in ends if count[number] == 1}
    known |= {int(number): name for number, name in (files or {}).items() if number.isdigit()}
    return {known.get(number, str(number)): text for number, text in by_number(texts).items()}


def common(systems: dict[str, dict[str, str]], *others: set[str]) -> list[str]:
    """Return the keys that every system has, sorted. Raises EvaluationError where there are none."""
    shared = set.intersection(*(set(s) for s in systems.values()), *others)
    if not shared:
        sizes = ", ".join(f"{name} {len(s)}" for name, s in systems.items())
        raise EvaluationError(f"no image is in all files ({sizes} captions): do the names of the images agree?")
    return sorted(shared)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark, without the mark.

    Raises OSError, and EvaluationError for another encoding.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: expected text in UTF-8, got {error.reason} at byte {error.start}") from error


def _content(path: Path) -> object:
    """Return what a JSON file, or a file of JSON lines, holds."""
    text = read_text(path)
    try:
        return _parsed(path, text)
    except json.JSONDecodeError:
        return [_line(path, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(path: Path, text: str) -> object:
    """Return what a JSON text holds. Raises JSONDecodeError, and EvaluationError for a name twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # also of numbers too long, and of lists in lists without end
        raise EvaluationError(f"{path} cannot be read: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is twice in one object")
    return found


def _records(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            yield file.stem, read_text(file).strip()
        return
    content, files = _content(path), {}
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        files, content = _coco_files(path, content), content["annotations"]
    elif isinstance(content, dict):
        one = "caption" in content or "captions" in content
        content = [content] if one else [{"id": name, "caption": value} for name, value in content.items()]
    for i, record in enumerate(content if isinstance(content, list) else [content], 1):
        name, texts = _name(record), _texts(record)
        if name is None or texts is None:
            names = " or ".join(("image_id", "id", "image"))
            raise EvaluationError(f"{path}, record {i}: an image ({names}) and its caption are expected")
        if files and "image_id" in record:
            if str(record["image_id"]) not in files:
                raise EvaluationError(f"{path}, record {i}: image_id {record['image_id']} is not among its images")
            name = files[str(record["image_id"])]
        for caption in texts:
            if not caption.isascii():
                _require_unicode(caption, f"{path}, record {i}")
            yield key(name), caption


def _require_unicode(caption: str, where: str) -> None:
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair
        raise EvaluationError(
            f"{where}: the caption {ascii(caption)[:60]} is not Unicode text: write it again"
        ) from error


def _coco_files(path: Path, content: dict) -> dict[str, str]:
    listed = content.get("images") or []
    files: dict[str, str] = {}
    try:
        for number, name in [(str(image["id"]), key(image["file_name"])) for image in listed if "file_name" in image]:
            if files.setdefault(number, name) != name:
                raise EvaluationError(f"{path}: two of its images, {files[number]} and {name}, have the id {number}")
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: its images are expected as [{{'id': ..., 'file_name': ...}}, ...]") from error
    return files


def _name(record: object) -> str | int | None:
    if not isinstance(record, dict):
        return None
    return next((record[n] for n in NAMES if isinstance(record.get(n), str | int)), None)


def _texts(record: object) -> list[str] | None:
    if not isinstance(record, dict):
        return None
    value = record.get("captions", record.get("caption"))
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else None


def _line(path: Path, number: int, line: str) -> object:
    try:
        return _parsed(path, line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}, line {number} is no JSON: {error}") from error
