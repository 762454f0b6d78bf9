"""Write a page of image | reconstruction | caption that works offline."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from serve.core.inputs import Item
from serve.outputs.jsonl import explained
from vlv.checkpoints.folder import Checkpoint, CheckpointError
from vlv.common import html as pages
from vlv.common.files import atomic_write
from vlv.data.image import ImageError, load_crops

BATCH = 16  # reconstructions at once
SIDE = 192  # pixels per side of an image on the page; smaller ones are enlarged by the browser

# what the square of an image is, by its crop
LABELS = {"center": "centre square", "pad": "image, padded", "squash": "image, squashed", "tiles": "square"}

STYLE = """\
body { max-width: 84rem; }
h1 { margin: 0; }
p.about { margin: .2rem 0 1.5rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(24.5rem, 1fr)); }
article { background: var(--card); border-radius: .7rem; padding: .8rem; }
.pair { display: flex; gap: .6rem; }
figure { margin: 0; flex: 1; }
img { width: 100%; aspect-ratio: 1; display: block; border-radius: .4rem; }
article p { margin: .5rem 0 .2rem; }
"""


def write(
    page: Path, checkpoint: Checkpoint, items: Iterable[Item], captions: Path, count: int = 48, steps: int = 50
) -> None:
    """Write the page for the first `count` items that have a record in `captions`: the squares that the model saw.

    Images are reconstructed by the checkpoint's text-to-image model in `steps` steps from the same
    embeddings that the captions come from; without that model, the page says so. Raises SinkError.
    """
    texts = _captions(captions, first := list(itertools.islice(items, count)))
    labels, crops = [], []
    for item in first:
        if item.id in texts:
            crop, captions_of_squares = texts[item.id]
            try:
                pixels = load_crops(item.read(), checkpoint.config.image_size, crop).pixels
            except ImageError:  # removed since it was captioned
                continue
            for number, (square, caption) in enumerate(zip(pixels, captions_of_squares, strict=False), 1):
                place = f", square {number} of {len(captions_of_squares)}" if crop == "tiles" else ""
                labels.append((item.id + place, caption, LABELS[crop]))
                crops.append(square)
    images, about = _reconstruct(checkpoint, np.array(crops), steps) if crops else ([], "No image has a caption.")
    cards = [_card(*label, pixels, image) for label, pixels, image in itertools.zip_longest(labels, crops, images)]
    style = STYLE + ("img { image-rendering: pixelated; }\n" if checkpoint.config.image_size < SIDE else "")
    body = "\n".join([f'<p class="about">{about}</p>', "<main>", *cards, "</main>"])
    with explained(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(page) as file:
            file.write_text(pages.page("VLV captions", body, style), encoding="utf-8", errors="replace")


def _captions(file: Path, items: list[Item]) -> dict[str, tuple[str, list[str]]]:
    """Return for each item with a record its crop, and the captions of its squares."""
    ids, texts = {item.id for item in items}, {}
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["id"] in ids:
                squares = [tile["caption"] for tile in record.get("tiles", ())] or [record["caption"]]
                texts[record["id"]] = record.get("crop", "center"), squares
                if len(texts) == len(ids):
                    break
    return texts


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


def _card(name: str, caption: str, label: str, crop: np.ndarray, image: np.ndarray | None) -> str:
    figures = _figure(crop, label, caption) + ("" if image is None else _figure(image, "reconstruction", ""))
    return (
        f'<article><div class="pair">{figures}</div>'
        f"<p>{html.escape(caption)}</p><small>{html.escape(name)}</small></article>"
    )


def _figure(pixels: np.ndarray, label: str, alt: str) -> str:
    """Return an image uint8 [3, S, S] as HTML that contains its data; small ones without loss."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    kind, options = ("png", {"optimize": True}) if image.width < SIDE else ("jpeg", {"quality": 88})
    image.thumbnail((2 * SIDE, 2 * SIDE))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}">'
        f"<figcaption>{label}</figcaption></figure>"
    )
