"""Valid image files of many layouts, written here sample by sample, for test_pixels.py.

    python tests/vlv/data/pixel_cases.py          # writes expected_pixels.json anew; needs pyvips and tifffile

expected_pixels.json holds what libvips shows for each file. Where libvips has no rule of its own (floats, 32 bits,
CMYK without a profile), it holds tifffile's samples, scaled here by the table in
vlv/data/decoding/tiff.py.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16
EXPECTED = Path(__file__).with_name("expected_pixels.json")


def shares(channels: int) -> np.ndarray:
    """Return smooth values [SIDE, SIDE, channels] from 0 to 1 that differ in every channel and corner."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    return np.stack([x, y, (x + 2 * y) / 3, 1 - (2 * x + y) / 4, x * y][:channels], -1)


def levels(channels: int, bits: int) -> np.ndarray:
    return np.rint(shares(channels) * (2**bits - 1)).astype(np.uint64)


def packed(rows: np.ndarray, bits: int, big: bool = True) -> bytes:
    """Return unsigned samples [H, N] as rows of `bits` each, padded to whole bytes."""
    if bits % 8 == 0:
        return rows.astype(f"{'>' if big else '<'}u{bits // 8}").tobytes()
    flags = (rows[:, :, None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(flags.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def png(samples: np.ndarray, bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of samples [H, W, C]; kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = samples.shape
    lines = packed(samples.reshape(height, -1), bits)
    step = len(lines) // height
    data = b"".join(b"\0" + lines[i * step : (i + 1) * step] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in body)


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    bits: int | None = None,
    big: bool = False,
    planar: bool = False,
    deflate: bool = False,
    predictor: int = 1,
    tile: int = 0,
    strips: int = 1,
    extra: tuple[int, ...] = (),
    tags: dict[int, tuple[int, list[int] | bytes]] | None = None,
) -> bytes:
    """Return a TIFF file of samples [H, W, C], unsigned, signed or float by their dtype.

    bits: fewer than the dtype's. tags: further ones, number -> (type, values).
    """
    height, width, count = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    order = ">" if big else "<"
    parts = []
    for plane in np.split(samples, count, -1) if planar else [samples]:
        if tile:
            plane = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            blocks = [plane[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
        else:
            blocks = np.split(plane, strips)
        for block in blocks:
            unsigned = block.view(f"u{samples.dtype.itemsize}") if bits % 8 == 0 else block
            if predictor == 2:
                unsigned = np.concatenate([unsigned[:, :1], np.diff(unsigned, axis=1)], 1)
            data = packed(unsigned.reshape(len(block), -1), bits, big)
            if predictor == 3:
                lines = np.frombuffer(data, np.uint8).reshape(len(block), -1, samples.dtype.itemsize)
                lines = (lines if big else lines[..., ::-1]).transpose(0, 2, 1).reshape(len(block), -1)
                stride = block.shape[-1]
                data = np.concatenate([lines[:, :stride], lines[:, stride:] - lines[:, :-stride]], 1).tobytes()
            parts.append(zlib.compress(data) if deflate else data)
    fields: dict[int, tuple[int, list[int] | bytes]] = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * count), 259: (3, [8 if deflate else 1]),
        262: (3, [photometric]), 277: (3, [count]), 284: (3, [2 if planar else 1]), 317: (3, [predictor]),
        339: (3, [kind] * count), **({338: (3, [*extra])} if extra else {}), **(tags or {}),
    }  # fmt: skip
    offsets, sizes = (324, 325) if tile else (273, 279)
    fields |= {322: (3, [tile]), 323: (3, [tile])} if tile else {278: (3, [height // strips])}
    fields |= {offsets: (4, [0] * len(parts)), sizes: (4, [len(part) for part in parts])}
    start = 8 + 2 + 12 * len(fields) + 4
    fields[offsets] = (4, [])
    lengths = {tag: len(value) * {3: 2, 4: 4, 7: 1}[code] for tag, (code, value) in fields.items()}
    lengths[offsets] = 4 * len(parts)
    first = start + sum(n + n % 2 for n in lengths.values() if n > 4)
    fields[offsets] = (4, [first + sum(map(len, parts[:i])) for i in range(len(parts))])
    directory, values = struct.pack(order + "H", len(fields)), b""
    for tag, (code, value) in sorted(fields.items()):
        data = value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}{'HI'[code == 4]}", *value)
        directory += struct.pack(order + "HHI", tag, code, len(value))
        if len(data) <= 4:
            directory += data.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", start + len(values))
            values += data + b"\0" * (len(data) % 2)
    return (
        (b"MM" if big else b"II") + struct.pack(order + "HI", 42, 8) + directory + bytes(4) + values + b"".join(parts)
    )


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """Return an ICC profile of version 2 with these tags."""
    offset, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    header = struct.pack(
        ">I4sI4s4s4s12x4s", offset + len(data), b"vlv ", 0x02400000, b"mntr", space, connection, b"acsp"
    )
    return header.ljust(68, b"\0") + white + bytes(48) + struct.pack(">I", len(tags)) + table + data


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def point(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


WHITE = {b"wtpt": point(0.9642, 1.0, 0.8249)}
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # columns, D50


def rgb_profile(columns: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    primaries = {f"{c}XYZ".encode(): point(*column) for c, column in zip("rgb", columns, strict=True)}
    return profile(b"RGB ", {**WHITE, **primaries, **{f"{c}TRC".encode(): curve(gamma) for c in "rgb"}})


PROFILES = {
    "wide": rgb_profile(((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)), 1.8),
    "swapped": rgb_profile((SRGB[1], SRGB[0], SRGB[2]), 2.2),
    "grey": profile(b"GRAY", {**WHITE, b"kTRC": curve(1.4)}),
}


def cmyk_profile() -> bytes:
    """Return a CMYK profile whose table has two points for each ink, in Lab of 8 bits."""
    table = b""
    for index in range(16):
        c, m, y, k = (index >> 3 & 1, index >> 2 & 1, index >> 1 & 1, index & 1)
        lightness = max(0, 255 - 90 * c - 100 * m - 20 * y - 200 * k)
        table += bytes([lightness, 128 + (60 * m - 40 * c) * (1 - k), 128 + (80 * y - 50 * c) * (1 - k)])
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", {**WHITE, b"A2B0": lut, b"A2B1": lut}, b"Lab ").replace(b"mntrCMYK", b"prtrCMYK")


def pillow(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cases() -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file."""
    for bits in (1, 2, 4, 8, 16):
        grey = levels(1, bits)
        yield f"png grey {bits}", png(grey, bits, 0)
        key = struct.pack(">H", int(grey[5, 5, 0]))
        yield f"png grey {bits} transparent", png(grey, bits, 0, (b"tRNS", key))
    for bits in (8, 16):
        rgb = levels(3, bits)
        yield f"png rgb {bits}", png(rgb, bits, 2)
        yield f"png rgb {bits} transparent", png(rgb, bits, 2, (b"tRNS", struct.pack(">3H", *map(int, rgb[5, 5]))))
        yield f"png rgba {bits}", png(levels(4, bits), bits, 6)
        yield f"png grey alpha {bits}", png(levels(2, bits), bits, 4)
    # colours that differ in their low bytes only
    near = np.full((SIDE, SIDE, 3), 0x8040, np.uint64)
    near[:, 8:] += 1
    yield "png rgb 16 transparent by its low byte", png(near, 16, 2, (b"tRNS", struct.pack(">3H", *[0x8041] * 3)))
    for bits in (1, 2, 4, 8):
        entries = (np.arange(3 * 2**bits) * 37 % 256).astype(np.uint8).tobytes()
        indices = levels(1, bits)
        yield f"png palette {bits}", png(indices, bits, 3, (b"PLTE", entries))
        alphas = bytes(range(0, 255, 254 // 2**bits or 1))[: 2**bits]
        yield f"png palette {bits} transparent", png(indices, bits, 3, (b"PLTE", entries), (b"tRNS", alphas))

    for big in (False, True):
        word = "big" if big else "little"
        for bits in (1, 2, 4, 8, 12, 16):
            dtype = np.uint16 if bits > 8 else np.uint8
            for photometric, name in ((1, "black"), (0, "white")):
                if not (big and bits == 12 and photometric == 0):
                    grey = levels(1, bits).astype(dtype)
                    yield f"tiff grey {bits} {name} is zero {word}", tiff(grey, photometric, bits=bits, big=big)
        for dtype in (np.uint8, np.uint16):
            bits = np.dtype(dtype).itemsize * 8
            for planar in (False, True):
                rgb = levels(3, bits).astype(dtype)
                layout = f"{bits} {'planes' if planar else 'pixels'} {word}"
                yield f"tiff rgb {layout}", tiff(rgb, 2, big=big, planar=planar)
                for kind, alpha in ((1, "premultiplied"), (2, "alpha")):
                    share = shares(4)
                    if kind == 1:
                        share[..., :3] *= share[..., 3:]
                    rgba = np.rint(share * (2**bits - 1)).astype(dtype)
                    yield f"tiff rgb {alpha} {layout}", tiff(rgba, 2, big=big, planar=planar, extra=(kind,))
                pair = levels(2, bits).astype(dtype)
                yield f"tiff grey alpha {layout}", tiff(pair, 1, big=big, planar=planar, extra=(2,))
        yield f"tiff signed 16 {word}", tiff((levels(1, 16).astype(np.int64) - 2**15).astype(np.int16), 1, big=big)
        yield f"tiff signed 8 {word}", tiff((levels(1, 8).astype(np.int64) - 2**7).astype(np.int8), 1, big=big)
        yield f"tiff unsigned 32 {word}", tiff(levels(1, 32).astype(np.uint32), 1, big=big)
        yield f"tiff unsigned 32 of 16 bits {word}", tiff(levels(1, 16).astype(np.uint32), 1, big=big)
        yield f"tiff signed 32 {word}", tiff((levels(1, 32).astype(np.int64) - 2**31).astype(np.int32), 1, big=big)
        for dtype in (np.float16, np.float32, np.float64):
            name = f"tiff {np.dtype(dtype).name}"
            yield f"{name} {word}", tiff(shares(1).astype(dtype), 1, big=big)
            yield f"{name} rgb {word}", tiff(shares(3).astype(dtype), 2, big=big)
            yield f"{name} planes {word}", tiff(shares(3).astype(dtype), 2, big=big, planar=True)
        yield f"tiff float32 to 255 {word}", tiff((shares(1) * 255).astype(np.float32), 1, big=big)
        yield f"tiff float32 constant {word}", tiff(np.full((SIDE, SIDE, 1), 0.5, np.float32), 1, big=big)
        yield f"tiff float32 white is zero {word}", tiff(shares(1).astype(np.float32), 0, big=big)
    sixteen = levels(3, 16).astype(np.uint16)
    for planar in (False, True):
        word = "planes" if planar else "pixels"
        yield f"tiff rgb 16 deflate {word}", tiff(sixteen, 2, planar=planar, deflate=True)
        yield f"tiff rgb 16 predictor {word}", tiff(sixteen, 2, planar=planar, deflate=True, predictor=2)
        yield f"tiff rgb 16 predictor big {word}", tiff(sixteen, 2, planar=planar, deflate=True, predictor=2, big=True)
        yield f"tiff rgb 16 strips {word}", tiff(sixteen, 2, planar=planar, strips=4)
        yield (
            f"tiff float32 predictor {word}",
            tiff(shares(3).astype(np.float32), 2, planar=planar, deflate=True, predictor=3),
        )
    wide = np.tile(sixteen, (2, 2, 1))
    yield "tiff rgb 16 tiles planes", tiff(wide, 2, planar=True, tile=16)
    yield "tiff rgb 16 tiles predictor planes", tiff(wide, 2, planar=True, tile=16, deflate=True, predictor=2)
    yield "tiff grey 16 tiles white is zero predictor", tiff(wide[..., :1], 0, tile=16, deflate=True, predictor=2)
    for planar in (False, True):
        floats = np.tile(shares(3), (2, 2, 1))[:24, :24].astype(np.float32)
        content = tiff(floats, 2, planar=planar, tile=16, deflate=True, predictor=3)
        yield f"tiff float32 tiles predictor {'planes' if planar else 'pixels'}", content
    for bits in (2, 4):
        yield f"tiff rgb {bits}", tiff(levels(3, bits).astype(np.uint8), 2, bits=bits)
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        five = tiff(levels(5, bits).astype(dtype), 2, extra=(0, 2))
        yield f"tiff rgb {bits} spare sample and alpha", five
        yield f"tiff cmyk {bits} and a sample", tiff(levels(5, bits).astype(dtype), 5, extra=(0,))
        entries = np.stack([np.arange(2**bits), np.arange(2**bits)[::-1], np.arange(2**bits) // 2]) << (16 - bits)
        palette = {320: (3, entries.ravel().tolist())}
        yield f"tiff palette {bits}", tiff(levels(1, bits).astype(dtype), 3, tags=palette)
    palette = {320: (3, (entries >> 8)[:, ::256].ravel().tolist())}
    yield "tiff palette 8 of 8 bits", tiff(levels(1, 8).astype(np.uint8), 3, tags=palette)
    share = shares(2)
    content = tiff(levels(1, 16).astype(np.uint16), 0)
    without = content.replace(struct.pack("<HHI", 279, 4, 1), struct.pack("<HHI", 280, 4, 1))  # MinSampleValue
    yield "tiff grey 16 white is zero without byte counts", without
    for deflate in (False, True):
        content = tiff(levels(1, 16).astype(np.uint16), 0, deflate=deflate, tags={266: (3, [2])})
        if deflate:  # FillOrder 2 reverses the bits of the compressed bytes, too
            start = content.index(packed_strip := zlib.compress(levels(1, 16).astype("<u2").tobytes()))
            content = content[:start] + bytes(int(f"{b:08b}"[::-1], 2) for b in packed_strip)
        yield f"tiff grey 16 white is zero, bits reversed{' and deflate' * deflate}", content
    yield "tiff grey alpha 8 white is zero", tiff(levels(2, 8).astype(np.uint8), 0, extra=(2,))
    share[..., :1] *= share[..., 1:]
    yield "tiff grey premultiplied 8", tiff(np.rint(share * 255).astype(np.uint8), 1, extra=(1,))
    yield "tiff cmyk 8", tiff(levels(4, 8).astype(np.uint8), 5)
    yield "tiff cmyk 16 planes", tiff(levels(4, 16).astype(np.uint16), 5, planar=True)
    yield "tiff rgb 16 spare sample planes", tiff(levels(4, 16).astype(np.uint16), 2, planar=True, extra=(0,))
    for orientation in range(1, 9):
        tags = {274: (3, [orientation])}
        yield f"tiff rgb 16 planes orientation {orientation}", tiff(sixteen, 2, planar=True, tags=tags)
        yield f"tiff rgb 8 orientation {orientation}", tiff(levels(3, 8).astype(np.uint8), 2, tags=tags)

    image = Image.fromarray(levels(3, 8).astype(np.uint8))
    grey = Image.fromarray(levels(1, 8)[..., 0].astype(np.uint8))
    alpha = Image.fromarray(levels(4, 8).astype(np.uint8))
    for name in ("wide", "swapped"):
        icc = PROFILES[name]
        for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
            quality = {"quality": 100} | ({"lossless": True} if kind == "WEBP" else {"subsampling": 0})
            yield (
                f"{kind.lower()} rgb {name}",
                pillow(image, kind, icc_profile=icc, **({} if kind in ("PNG", "TIFF") else quality)),
            )
        yield f"png rgba {name}", pillow(alpha, "PNG", icc_profile=icc)
        yield f"png palette {name}", pillow(image.quantize(64), "PNG", icc_profile=icc)
        tags = {34675: (7, icc)}
        yield f"tiff rgb 16 planes {name}", tiff(sixteen, 2, planar=True, tags=tags)
    yield "png grey with a profile", pillow(grey, "PNG", icc_profile=PROFILES["grey"])
    yield "jpeg grey with a profile", pillow(grey, "JPEG", icc_profile=PROFILES["grey"], quality=100)
    tags = {34675: (7, PROFILES["grey"])}
    yield "tiff grey 16 white is zero with a profile", tiff(levels(1, 16).astype(np.uint16), 0, tags=tags)
    yield "tiff cmyk with a profile", tiff(levels(4, 8).astype(np.uint8), 5, tags={34675: (7, cmyk_profile())})


OWN_RULE = ("float", "32", "tiff signed", "tiff cmyk 8", "tiff cmyk 16", "spare sample")
# by libvips: samples that are no whole bytes, planes in tiles; grey and alpha in planes are mixed up
NOT_READ = ("tiff grey 12", "tiff rgb 2", "tiff rgb 4", "tiles", "grey alpha 8 planes", "grey alpha 16 planes")


def reference(name: str, content: bytes) -> tuple[str, np.ndarray]:
    """Return the decoder's name and uint8 [H, W, 3] of a file, transparency on white."""
    import pyvips
    import tifffile

    if not any(word in name for word in OWN_RULE + NOT_READ):
        image = pyvips.Image.new_from_buffer(content, "").autorot()
        if "rgb 16 planes wide" in name or "rgb 16 planes swapped" in name:  # littleCMS converts 8 bits here
            image = (image >> 8).cast("uchar").copy(interpretation="srgb")
        tagged = bool(image.get_typeof("icc-profile-data"))
        image = image.icc_transform("srgb", depth=8) if tagged else image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=255)
        return f"libvips {pyvips.version(0)}.{pyvips.version(1)}.{pyvips.version(2)}", image.cast("uchar").numpy()
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        values = page.asarray().astype(np.float64)
        transparent = 2 in page.extrasamples
        bits, kind, photometric = page.bitspersample, page.dtype.kind, int(page.photometric)
        if int(page.planarconfig) == 2 and values.ndim == 3:
            values = values.transpose(1, 2, 0)
    values = values.reshape(values.shape[0], values.shape[1], -1)
    if kind == "f":
        values = values * 255 if values.max() <= 1 else values
    elif kind == "i":
        values = (values + 2 ** (bits - 1)) * 255 / (2**bits - 1)
    elif bits == 32:
        values = values * 255 / (2**32 - 1 if values.max() > 65535 else 65535)
    else:
        values = values // 256 if bits == 16 else values * 255 / (2**bits - 1)
    values = 255 - values if photometric == 0 else values
    if photometric == 5:  # the plain conversion of Pillow, and of the published preprocessing
        values = (255 - values[..., :3]) * (255 - values[..., 3:4]) / 255
    if transparent:
        alpha = values[..., -1:] / 255
        values = values[..., :-1] * alpha + 255 * (1 - alpha)
    values = values[..., :3] if values.shape[-1] > 1 else np.repeat(values, 3, -1)
    return f"tifffile {tifffile.__version__}", np.rint(values).astype(np.uint8)


def write() -> None:
    """Write the pixels of every file, compressed RGB in hexadecimal, with the name of the decoder."""
    found = {}
    for name, content in cases():
        decoder, pixels = reference(name, content)
        found[name] = {"decoder": decoder, "pixels": zlib.compress(pixels.tobytes(), 9).hex()}
    EXPECTED.write_text(json.dumps(found, indent=0) + "\n")
    print(f"{len(found)} files", file=sys.stderr)


if __name__ == "__main__":
    write()
