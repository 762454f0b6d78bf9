"""Make mutated image files and requests, for benchmarks/serve_faults.py and its short version in the tests."""

from __future__ import annotations

import base64
import io
import json
import random

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
LARGEST = 1 << 16  # bytes of a mutated file or request


def scene(number: int, kind: str = "PNG") -> bytes:
    """Return a held-out scene as an image file."""
    from PIL import Image

    from vlv.data import scenes

    stream = io.BytesIO()
    Image.fromarray(scenes.render(scenes.sample(scenes.HELD_OUT + number))).save(stream, kind)
    return stream.getvalue()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, and insert, remove, repeat or replace bytes, at one to eight positions."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 200)), max(len(data) - at, 1))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case _:
                del data[rng.randrange(len(data) + 1) :]
    return bytes(data[:LARGEST])


def fuzzed_images(count: int, seed: int) -> list[tuple[str, bytes]]:
    """Mutated files of all kinds."""
    rng = random.Random(seed)
    sound = [scene(i, kind) for kind in KINDS for i in range(4)]
    return [(f"{i}.img", mutate(rng.choice(sound), rng)) for i in range(count)]


def fuzzed_requests(count: int, seed: int) -> list[dict]:
    """Arguments of requests: JSON of wrong types, mutated JSON, mutated multipart, wrong heads."""
    rng = random.Random(seed)
    image = "data:image/png;base64," + base64.b64encode(scene(1)).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]
    odd = [
        None,
        True,
        -1,
        2**70,
        1.5e308,
        "",
        "x" * 3000,
        [],
        {},
        [[]],
        {"url": 5},
        "\ud800",
        "http://169.254.169.254/",
    ]
    names = ["messages", "model", "max_tokens", "temperature", "seed", "stop", "n", "stream", "raw", "images", "input"]
    boundary = "b0undary"
    form = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'.encode()
        + scene(2)
        + f"\r\n--{boundary}--\r\n".encode()
    )
    requests = []
    for _ in range(count):
        path = rng.choice(("/v1/chat/completions", "/v1/captions", "/v1/embeddings"))
        body = {"messages": messages, "images": [image], "input": image, "max_tokens": 4}
        for name in rng.sample(names, rng.randint(0, 3)):
            body[name] = rng.choice(odd)
        content, kind = json.dumps(body).encode(), "application/json"
        if rng.random() < 0.4:
            content, kind = form, f"multipart/form-data; boundary={boundary}"
        if rng.random() < 0.7:
            content = mutate(content, rng)
        if rng.random() < 0.1:
            kind = rng.choice(
                ("", "multipart/form-data", "text/\x7fplain", "multipart/form-data; boundary=" + "x" * 999)
            )
        requests.append({"url": path, "content": content, "headers": {"Content-Type": kind}})
    return requests
