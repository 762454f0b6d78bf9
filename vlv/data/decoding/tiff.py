"""Decode the TIFF layouts that Pillow decodes wrongly or not at all.

These are samples of other than 8 bits (except those that Pillow reads: 16-bit colour in one plane), signed and float
samples, planes of more than 8 bits, WhiteIsZero above 8 bits, grey with alpha in planes or of 16 bits, palettes of 16
bits or with entries of 8 bits, and more samples than Pillow knows. libtiff decompresses them, through Pillow, as if the
rows were 8-bit grey pixels; the samples are then read from these bytes.

Values become 8 bits so:

| samples                  | black to white                                                                    |
|--------------------------|-----------------------------------------------------------------------------------|
| unsigned, N bits         | 0 to 2^N - 1; colour of 16 bits keeps the high byte, as Pillow and libvips do     |
| unsigned or signed of 32 | as 16 bits, where all values lie in 0 to 65,535; else the type's range            |
| signed, N bits           | -2^(N-1) to 2^(N-1) - 1                                                           |
| float                    | 0 to 1 where all values lie there, else 0 to 255, else the smallest to the largest |
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_OFFSETS, _SAMPLES, _ROWS, _COUNTS, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339
_ORIENTATION, _FILL_ORDER, _PROFILE, _COLOR_MAP = 274, 266, 34675, 320
_SHORTS = (_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _PREDICTOR, _FORMAT)
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_LOSSLESS = {
    1: "no compression",
    5: "LZW",
    8: "deflate",
    32946: "deflate",
    32773: "PackBits",
    34925: "LZMA",
    50000: "Zstandard",
}
_PALETTE = 3
# photometric interpretation -> colour samples: white or black is zero, RGB, palette, CMYK
_COLORS = {0: 1, 1: 1, 2: 3, _PALETTE: 1, 5: 4}
_MODES = {1: ("L", "LA"), 3: ("RGB", "RGBA"), 4: ("CMYK", "CMYK")}  # without and with alpha
_MAX_SAMPLES = 32
_BYTES = 8  # of samples for each pixel of the limit: RGBA of 16 bits


class TiffError(ValueError):
    """Raised for a layout that is not supported, or too large; `kind` is that of ImageError."""

    def __init__(self, message: str, kind: str = "format"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class _Layout:
    """How the samples of the first page are stored."""

    width: int
    height: int
    bits: int
    kind: int  # sample format
    photometric: int
    samples: int
    planar: bool
    compression: int
    predictor: int
    extra: tuple[int, ...]
    big_endian: bool

    @property
    def planes(self) -> int:
        """Return the number of separately stored planes."""
        return self.samples if self.planar else 1

    @property
    def together(self) -> int:
        """Return the samples that are stored together for each pixel."""
        return 1 if self.planar else self.samples

    def __str__(self) -> str:
        kinds = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOAT: "float"}
        return f"{self.samples} {kinds.get(self.kind, 'complex or unknown')} samples of {self.bits} bits"


def decode_tiff(content: bytes, max_pixels: int, refused: bool = False) -> Image.Image | None:
    """Decode the first page to an upright image of mode L, LA, RGB, RGBA or CMYK with its ICC profile in `info`.

    Returns None where Pillow decodes the file right, unless it has `refused` it, or where it is no complete TIFF.
    Raises TiffError on a layout that neither supports, and on more than `max_pixels` pixels; OSError and ValueError on
    damaged data.
    """
    tags = _tags(content)
    if tags is None or not (layout := _layout(tags, content[:1] == b"M")):
        return None
    colors = _color_map(tags, layout)
    if not refused and _pillow_is_right(layout) and (colors is None or colors.max() > 255):
        return None
    color = _COLORS.get(layout.photometric)
    if color is None or layout.samples < color or layout.kind not in (_UNSIGNED, _SIGNED, _FLOAT):
        raise TiffError(f"a TIFF of {layout}, photometric interpretation {layout.photometric}: not supported")
    if layout.compression not in _LOSSLESS:
        known = ", ".join(dict.fromkeys(_LOSSLESS.values()))
        raise TiffError(f"a TIFF of {layout}, compression {layout.compression}: not supported (those read: {known})")
    size = f"{layout.width} x {layout.height}"
    if layout.width * layout.height > max_pixels:
        raise TiffError(f"the header announces {size} pixels, more than the limit of {max_pixels:,}", "too-large")
    if layout.width * layout.height * layout.samples * max(1, layout.bits // 8) > _BYTES * max_pixels:
        message = f"the header announces {size} pixels of {layout}, more than {_BYTES * max_pixels:,} bytes"
        raise TiffError(message, "too-large")
    values = np.stack([_samples(content, tags, layout, plane) for plane in range(layout.planes)], -1)
    values = values.reshape(layout.height, layout.width, layout.samples)
    if colors is None:
        image = _image(values, layout, color)
    else:
        entries = (colors if colors.max() <= 255 else colors >> 8).astype(np.uint8)
        image = Image.fromarray(entries.T[values[..., 0]])
    if profile := tags.get(_PROFILE):
        image.info["icc_profile"] = bytes(profile)
    image.info["orientation"] = tags.get(_ORIENTATION, 1)
    return image


def tiff_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of the first page, None where they cannot be read."""
    tags = _tags(content) or {}
    size = tags.get(_WIDTH), tags.get(_HEIGHT)
    return size if all(isinstance(side, int) for side in size) else None


def _tags(content: bytes) -> TiffImagePlugin.ImageFileDirectory_v2 | None:
    """Return the tags of the first page, None where they cannot be read."""
    try:
        header = content[: 16 if content[2:4] in (b"+\0", b"\0+") else 8]
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        stream = io.BytesIO(content)
        stream.seek(tags.next)
        tags.load(stream)
        return tags
    except Exception:  # Pillow's parser raises many types; its decoder then says what is wrong
        return None


def _layout(tags: TiffImagePlugin.ImageFileDirectory_v2, big_endian: bool) -> _Layout | None:
    """Return the layout, None where samples differ in depth or format, or a tag is missing."""
    try:
        bits, kinds = tags.get(_BITS, (1,)), tags.get(_FORMAT, (_UNSIGNED,))
        samples = tags.get(_SAMPLES, 1)
        if not isinstance(tags[_WIDTH], int) or not isinstance(tags[_HEIGHT], int):
            return None
        if len(set(bits)) != 1 or len(set(kinds)) != 1 or not 1 <= samples <= _MAX_SAMPLES:
            return None
        return _Layout(
            width=tags[_WIDTH],
            height=tags[_HEIGHT],
            bits=bits[0],
            kind=kinds[0],
            photometric=tags[_PHOTOMETRIC],
            samples=samples,
            planar=samples > 1 and tags.get(_PLANAR, 1) == 2,
            compression=tags.get(_COMPRESSION, 1),
            predictor=tags.get(_PREDICTOR, 1),
            extra=tuple(tags.get(_EXTRA, ())),
            big_endian=big_endian,
        )
    except (KeyError, TypeError, IndexError):
        return None


def _color_map(tags: TiffImagePlugin.ImageFileDirectory_v2, layout: _Layout) -> np.ndarray | None:
    """Return the entries [3, 2 ** bits] of a palette, of 16 bits each, or in some files of 8; None without one."""
    entries = np.array(tags.get(_COLOR_MAP, ()), np.uint16)
    if layout.photometric != _PALETTE or layout.kind != _UNSIGNED or entries.size != 3 << layout.bits:
        return None
    return entries.reshape(3, -1)


def _pillow_is_right(layout: _Layout) -> bool:
    """Return True for a layout that Pillow decodes as it should."""
    if layout.kind != _UNSIGNED:
        return False
    if layout.photometric not in _COLORS or layout.photometric == _PALETTE:  # palettes, YCbCr, Lab, masks
        return layout.bits <= 8
    color = layout.samples >= 3
    if layout.bits <= 8:
        return layout.bits in (1, 2, 4, 8) and not (layout.planar and (layout.samples == 2 or 1 in layout.extra))
    if layout.bits == 16:
        return (color and not layout.planar) or (layout.samples == 1 and layout.photometric == 1)
    return False


def _samples(content: bytes, tags: TiffImagePlugin.ImageFileDirectory_v2, layout: _Layout, plane: int) -> np.ndarray:
    """Return the samples of a plane [H, W * together] as they are stored, unsigned, signed or float."""
    count = layout.width * layout.together
    tile = tags.get(_TILE_WIDTH)
    whole = -(-layout.width // tile) * tile if tile and layout.predictor == 3 else layout.width  # of the last tile, all
    rows = _rows(content, tags, layout, plane, -(-whole * layout.together * layout.bits // 8))
    if layout.bits % 8:
        flags = np.unpackbits(rows, axis=1)[:, : count * layout.bits].reshape(len(rows), count, layout.bits)
        values = flags @ (1 << np.arange(layout.bits - 1, -1, -1, dtype=np.int64))
        if layout.kind == _SIGNED:
            values = np.where(values >= 1 << (layout.bits - 1), values - (1 << layout.bits), values)
        return values
    size = layout.bits // 8
    if size not in (1, 2, 4, 8) or (layout.kind == _FLOAT and size == 1):
        raise TiffError(f"a TIFF of {layout}: not supported")
    letter = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}[layout.kind]
    if layout.predictor == 3:
        return _undo_float_predictor(rows, layout, size, tile).view(f"<f{size}")[:, :count]
    values = rows.view(f"{'>' if layout.big_endian else '<'}u{size}").astype(f"<u{size}")
    if layout.predictor == 2:
        values = _accumulate(values, layout.together, tile and tile * layout.together)
    return values.view(f"<{letter}{size}")


def _rows(
    content: bytes, tags: TiffImagePlugin.ImageFileDirectory_v2, layout: _Layout, plane: int, width: int
) -> np.ndarray:
    """Return the decompressed bytes [H, width] of a plane: Pillow decodes them as an 8-bit grey image."""
    tiled = _TILE_OFFSETS in tags
    offsets, counts = tags[_TILE_OFFSETS if tiled else _OFFSETS], tags.get(_TILE_COUNTS if tiled else _COUNTS)
    share = len(offsets) // layout.planes
    part = slice(plane * share, (plane + 1) * share)
    entries: dict[int, list[int]] = {
        _WIDTH: [width],
        _HEIGHT: [layout.height],
        _BITS: [8],
        _COMPRESSION: [layout.compression],
        _PHOTOMETRIC: [1],
        _FILL_ORDER: [tags.get(_FILL_ORDER, 1)],
        _SAMPLES: [1],
        _TILE_OFFSETS if tiled else _OFFSETS: [*offsets[part]],
    }
    if counts:  # old files lack them, and samples without compression need none
        entries[_TILE_COUNTS if tiled else _COUNTS] = [*counts[part]]
    if tiled:
        bits = tags[_TILE_WIDTH] * layout.together * layout.bits
        if bits % 128:  # libtiff takes tiles of a multiple of 16 pixels
            raise TiffError(f"a TIFF of {layout} in tiles of {tags[_TILE_WIDTH]}: not supported")
        entries |= {_TILE_WIDTH: [bits // 8], _TILE_HEIGHT: [tags[_TILE_HEIGHT]]}
    else:
        entries[_ROWS] = [min(tags.get(_ROWS, layout.height), layout.height)]
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(_with_directory(content, entries)))
    image.load()
    return np.asarray(image)


def _with_directory(content: bytes, entries: dict[int, list[int]]) -> bytes:
    """Return the file with these tags (name -> whole numbers) as its only page."""
    order = "big" if content[:1] == b"M" else "little"
    start = len(content) + len(content) % 2
    place = start + 2 + 12 * len(entries) + 4
    directory, values = len(entries).to_bytes(2, order), b""
    for tag, numbers in sorted(entries.items()):
        size = 2 if tag in _SHORTS else 4
        data = b"".join(number.to_bytes(size, order) for number in numbers)
        directory += tag.to_bytes(2, order) + (3 if size == 2 else 4).to_bytes(2, order)  # SHORT, LONG
        directory += len(numbers).to_bytes(4, order)
        if len(data) <= 4:
            directory += data.ljust(4, b"\0")
        else:
            directory += (place + len(values)).to_bytes(4, order)
            values += data
    header = content[:1] * 2 + (42).to_bytes(2, order) + start.to_bytes(4, order)
    return header + content[8:] + b"\0" * (start - len(content)) + directory + bytes(4) + values


def _accumulate(values: np.ndarray, stride: int, tile: int | None) -> np.ndarray:
    """Undo horizontal differences between the samples [H, W] of neighbouring pixels, within each tile."""
    result = np.empty_like(values)
    for start in range(0, values.shape[1], tile or values.shape[1]):
        part = values[:, start : start + (tile or values.shape[1])]
        for sample in range(stride):
            result[:, start + sample : start + part.shape[1] : stride] = np.cumsum(
                part[:, sample::stride], axis=1, dtype=values.dtype
            )
    return result


def _undo_float_predictor(rows: np.ndarray, layout: _Layout, size: int, tile: int | None) -> np.ndarray:
    """Return the little-endian bytes [H, W * size] of floats whose bytes were separated and differenced."""
    width = (tile or layout.width) * layout.together * size
    parts = []
    for start in range(0, rows.shape[1], width):
        part = _accumulate(rows[:, start : start + width], layout.together, None)
        planes = part.reshape(len(rows), size, -1)[:, ::-1]  # the highest byte is stored first
        parts.append(planes.transpose(0, 2, 1).reshape(len(rows), -1))
    return np.ascontiguousarray(np.concatenate(parts, 1))


def _image(values: np.ndarray, layout: _Layout, color: int) -> Image.Image:
    """Return samples [H, W, samples] as an image of 8 bits with the alpha channel that the tags name."""
    alpha_kind = next((kind for kind in layout.extra if kind in (1, 2)), 0)  # 1: premultiplied, 2: plain
    scaled = _scale(values[..., :color], layout, color)
    if layout.photometric == 0:
        scaled = 255 - scaled
    mode = _MODES[color][0]
    if alpha_kind and color != 4:
        mode, index = _MODES[color][1], color + layout.extra.index(alpha_kind)
        alpha = _scale(values[..., index : index + 1], layout, color)
        if alpha_kind == 1:
            scaled = np.minimum(scaled * (255 / np.maximum(alpha, 1e-9)), 255)
        scaled = np.concatenate([scaled, alpha], -1)
    levels = np.rint(scaled).astype(np.uint8)
    return Image.frombytes(mode, (layout.width, layout.height), levels.tobytes())


def scale_floats(values: np.ndarray) -> np.ndarray:
    """Return float samples on the scale from 0 to 255; the module's table says how. Raises ValueError on NaN or Inf."""
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are not finite")
    low, high = values.min(), values.max()
    if low >= 0 and high <= 255:
        return values * (255 if high <= 1 else 1)
    return values.clip(0, 255) if low == high else (values - low) * (255 / (high - low))


def _scale(values: np.ndarray, layout: _Layout, color: int) -> np.ndarray:
    """Return the values on the scale from 0 to 255, as floats; the module's table says how."""
    if layout.kind == _FLOAT:
        return scale_floats(values.astype(np.float32 if layout.bits <= 32 else np.float64))
    if layout.bits == 16 and layout.kind == _UNSIGNED and color > 1:
        return (values >> 8).astype(np.float32)
    low = 0 if layout.kind == _UNSIGNED else -(2 ** (layout.bits - 1))
    high = low + 2**layout.bits - 1
    if layout.bits == 32 and values.min() >= 0 and values.max() <= 65535:
        low, high = 0, 65535
    return (values.astype(np.float32 if layout.bits <= 16 else np.float64) - low) * (255 / (high - low))
