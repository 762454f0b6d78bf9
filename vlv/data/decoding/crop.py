"""Cut the squares that the model sees out of an image: the centre as published, or all of it in one of three ways.

    center   resize the short side, cut the centre square                 (published; the rest is not seen)
    pad      resize the long side, and centre the image on a square of PAD_COLOR
    squash   resize both sides, which changes the proportions
    tiles    resize the short side, cut overlapping squares along the long side

All resize as Pillow's BILINEAR does: linear, antialiased.
"""

from __future__ import annotations

from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright image
Extent = tuple[float, float, float, float]  # the same, in pixels of an image that was decoded at a part of its size

CROPS = ("center", "pad", "squash", "tiles")
PAD_COLOR = (124, 116, 104)  # the mean of ImageNet, which the model's normalisation maps to zero
MAX_TILES = 8  # of one image; beyond 8 : 1 they leave gaps


def squares(image: Image.Image, size: int, crop: str, max_pixels: int, extent: Extent) -> list[Image.Image]:
    """Return the squares of an image for one of CROPS, one but for tiles, each of size x size pixels.

    Of "pad" the square is not filled up yet (`padded` does that), since the image may not be RGB yet. No intermediate
    image has more than `max_pixels`. `extent`: the part of `image` that is the image, whose last column and row may
    count in part.
    """
    if crop == "center":
        return [center(image, size, max_pixels, extent)]
    if crop == "squash":
        return [image.resize((size, size), Image.Resampling.BILINEAR, extent)]
    if crop == "pad":
        return [image.resize(_fitted(sides_of(extent), size), Image.Resampling.BILINEAR, extent)]
    return _tiles(image, size, max_pixels, extent)


def sides_of(extent: Extent) -> tuple[float, float]:
    """Return width and height."""
    left, top, right, bottom = extent
    return right - left, bottom - top


def boxes(width: int, height: int, crop: str) -> list[Box]:
    """Return the part of an image of this size that each of its squares shows."""
    if crop in ("pad", "squash"):
        return [(0, 0, width, height)]
    side = min(width, height)
    count = _tile_count(width, height) if crop == "tiles" else 1
    found = []
    for index in range(count):
        start = (max(width, height) - side) * ((index / (count - 1)) if count > 1 else 0.5)
        left, top = (start, 0) if width > height else (0, start)
        found.append((round(left), round(top), round(left) + side, round(top) + side))
    return found


def padded(image: Image.Image, size: int) -> Image.Image:
    """Return an RGB image of at most size x size pixels, centred on a square of PAD_COLOR."""
    if image.size == (size, size):
        return image
    canvas = Image.new("RGB", (size, size), PAD_COLOR)
    canvas.paste(image, (round((size - image.width) / 2), round((size - image.height) / 2)))
    return canvas


def center(image: Image.Image, size: int, max_pixels: int, extent: Extent | None = None) -> Image.Image:
    """Resize the short side to `size` and crop the centre, with torchvision's rounding. `extent`: None for all."""
    extent = extent or (0, 0, *image.size)
    sides = sides_of(extent)
    width, height = _scaled(sides, size)
    if width * height > max_pixels:
        # an extreme aspect ratio: resize only what the crop keeps, or it would not fit in memory
        short = min(image.size)  # it is enlarged: it was decoded at its size
        left, top = (image.width - short) / 2, (image.height - short) / 2
        return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short))
    image = image.resize((width, height), Image.Resampling.BILINEAR, extent)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _tiles(image: Image.Image, size: int, max_pixels: int, extent: Extent) -> list[Image.Image]:
    sides = sides_of(extent)
    width, height = _scaled(sides, size)
    if width * height > max_pixels:
        found = boxes(*image.size, "tiles")
        return [image.resize((size, size), Image.Resampling.BILINEAR, box) for box in found]
    count = _tile_count(*sides)
    if count == 1:
        return [center(image, size, max_pixels, extent)]
    image = image.resize((width, height), Image.Resampling.BILINEAR, extent)
    corners = [
        (round((width - size) * index / (count - 1)), round((height - size) * index / (count - 1)))
        for index in range(count)
    ]
    return [image.crop((left, top, left + size, top + size)) for left, top in corners]


def _tile_count(width: float, height: float) -> int:
    """Return the fewest squares that cover the long side with an overlap of at least a fifth, at most MAX_TILES."""
    short, long = sorted((width, height))
    return min(int(-(-(5 * long - short) // (4 * short))), MAX_TILES)


def _scaled(sides: tuple[float, float], size: int) -> tuple[int, int]:
    """Return width and height once the short side is `size`."""
    short, long = sorted(sides)
    scaled = int(size * long / short)
    return (size, scaled) if sides[0] <= sides[1] else (scaled, size)


def _fitted(sides: tuple[float, float], size: int) -> tuple[int, int]:
    """Return width and height once the long side is `size`."""
    long = max(sides)
    width, height = (max(1, round(size * side / long)) for side in sides)
    return width, height
