"""Write a page to look through and correct captions, which works offline: images, reconstructions, filters, a patch."""

from __future__ import annotations

import base64
import io
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from serve.core.inputs import Item, key_of
from serve.outputs.jsonl import explained
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common import html as pages
from vlv.common.files import atomic_write
from vlv.data.image import ImageError, load_crops

LIMIT = 10_000  # images on the page
EMBEDDED = 48  # images that the page itself holds; the others are files beside it
BATCH = 16  # reconstructions at once
SIDE = 192  # pixels per side of an image on the page; smaller ones are enlarged by the browser
TEMPLATE = Path(__file__).with_name("gallery.html")


def write(
    page: Path, checkpoint: Checkpoint, items: Iterable[Item], captions: Path, count: int = EMBEDDED, steps: int = 50
) -> None:
    """Write the page for the first LIMIT items that have a record in `captions`, with `NAME.images/` beside it.

    An image is shown as the model saw it: its square, or the squares of its tiles side by side, with their captions.
    The first `count` images are reconstructed by the checkpoint's text-to-image model in `steps` steps from the same
    embeddings that the captions come from; without that model, the page says so. Raises SinkError.
    """
    listed = list(itertools.islice(items, LIMIT))
    records = _records(captions, {item.key for item in listed})
    captioned, shown = [], []  # shown: of the first images their squares, uint8 [N, 3, S, S]
    for item in listed:
        if item.key in records and len(captioned) < count:
            try:
                shown.append(load_crops(item.read(), checkpoint.config.image_size, _crop(records[item.key])).pixels)
                captioned.append(item)
            except ImageError:  # removed since it was captioned
                continue
        elif item.key in records:
            captioned.append(item)
    first = np.array([squares[0] for squares in shown])
    images, about = _reconstruct(checkpoint, first, steps) if shown else ([], "No image has a caption.")
    if len(captioned) > len(shown):
        about = f"{len(captioned):,} images. The first {about}"
    entries = [_entry(records[item.key]) for item in captioned]
    for entry, squares, image in itertools.zip_longest(entries[: len(shown)], shown, images):
        entry["image"] = _data(_side_by_side(squares))
        entry["reconstruction"] = None if image is None else _data(image)
    with explained(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        _write_images(page, list(zip(captioned, entries, strict=True))[len(shown) :])
        data = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")
        template = TEMPLATE.read_text(encoding="utf-8")
        style, _, body = template.partition("</style>\n")
        body = body.replace("%ABOUT%", about).replace("%PATCH%", json.dumps(f"{page.stem}.patch.jsonl"))
        style = style.removeprefix("<style>\n")
        style += "img { image-rendering: pixelated; }\n" if checkpoint.config.image_size < SIDE else ""
        with atomic_write(page) as file:
            text = pages.page("VLV captions", body.replace("%RECORDS%", data), style)
            file.write_text(text, encoding="utf-8", errors="replace")


def _records(file: Path, keys: set[str]) -> dict[str, dict]:
    """Return the records of images, by their keys."""
    found = {}
    with open(file, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if (key := key_of(record["id"], record.get("path"))) in keys:
                found[key] = record
    return found


def _entry(record: dict) -> dict:
    tiles = [tile["caption"] for tile in record.get("tiles", ())]
    return {
        "id": record["id"], "caption": record["caption"], "cut": record.get("finish_reason") == "length",
        "crop": _crop(record), **({"tiles": tiles} if len(tiles) > 1 else {}),
    }  # fmt: skip


def _crop(record: dict) -> str:
    return record.get("crop", "center")


def _side_by_side(squares: np.ndarray) -> np.ndarray:
    """Return squares uint8 [N, 3, S, S] as one image [3, S, W]."""
    return np.concatenate(list(squares), axis=2)


def _write_images(page: Path, rest: list[tuple[Item, dict]]) -> None:
    """Write the images of the entries that have none, as files in `NAME.images/`."""
    folder = page.with_name(f"{page.stem}.images")
    for old in folder.glob("[0-9]*.jpg"):
        old.unlink()
    if not rest:
        return
    folder.mkdir(exist_ok=True)
    workers = min(len(os.sched_getaffinity(0)), 32, 1 + len(rest) // 500)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        contents: Iterator[bytes | None] = pool.map(
            thumbnail, *zip(*((item, e["crop"]) for item, e in rest), strict=True), chunksize=64
        )
        for number, ((_, entry), content) in enumerate(zip(rest, contents, strict=True)):
            if number % 1000 == 0:
                print(f"gallery: {number} of {len(rest)} images", file=sys.stderr, flush=True)
            if content:  # else removed since it was captioned
                (folder / f"{number:06}.jpg").write_bytes(content)
                entry["image"] = f"{folder.name}/{number:06}.jpg"


def thumbnail(item: Item, crop: str) -> bytes | None:
    """Return what the model saw of an image as a small JPEG file, None if it cannot be read."""
    try:
        return _encoded(_side_by_side(load_crops(item.read(), SIDE, crop).pixels), "jpeg")
    except ImageError:
        return None


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    """Return an image uint8 [3, S, W] as the content of a file."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((image.width, 2 * SIDE))
    stream = io.BytesIO()
    image.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
    return stream.getvalue()


def _data(pixels: np.ndarray) -> str:
    """Return an image uint8 [3, S, W] as a URL that contains it; small ones without loss."""
    kind = "png" if pixels.shape[1] < SIDE else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(_encoded(pixels, kind)).decode()}"


def _reconstruct(checkpoint: Checkpoint, crops: np.ndarray, steps: int) -> tuple[list[np.ndarray], str]:
    """Return reconstructions of crops [B, 3, S, S] (none if that is not possible), and a sentence for the page."""
    try:
        import torch

        from vlv.diffusion.reconstruction import TorchReconstructor

        reconstructor = TorchReconstructor.of(checkpoint)
    except CheckpointError:
        return [], f"{len(crops)} images. This checkpoint has no text-to-image model (t2i/): no reconstructions."
    except ModuleNotFoundError as error:
        return [], f"{len(crops)} images. {error.name} is not installed: no reconstructions."
    images = []
    for start in range(0, len(crops), BATCH):
        print(f"gallery: reconstructing {start} of {len(crops)} images", file=sys.stderr, flush=True)
        context = reconstructor.context(torch.from_numpy(crops[start : start + BATCH]))
        images.extend(reconstructor.reconstruct(context, steps, 2.0, 0).cpu().numpy())
    queries, width = checkpoint.config.queries, checkpoint.config.context_width
    return images, (
        f"{len(crops)} images, each beside its reconstruction by the frozen text-to-image model from the {queries} "
        f"embeddings of width {width} that the caption is written from."
    )
