"""A run that is killed again and again: python killed_writer.py FORMAT OUTPUT IMAGES KILLS SEED.

Forks a process that writes records without a pause and kills it after a random time, KILLS times; then lets one
come to its end. Prints how many records each killed one had found. No model is loaded.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from serve.core.inputs import Item
from serve.outputs.factory import sink_class
from serve.outputs.formats import ParquetSink


class JsonParts(ParquetSink):
    """Parquet's parts and pending lines, with parts of JSON: the mechanism without pyarrow."""

    suffix = ".json"

    def write_part(self, file, records):
        file.write_text(json.dumps(records))

    def read_part(self, file):
        return json.loads(file.read_text())


def write(kind: str, output: str, images: list[Path], found=None) -> None:
    """One run: everything that is not finished yet, every tenth image as an error."""
    cls = JsonParts if kind == "parts" else sink_class(kind)
    sink = type("Small", (cls,), {"rows": 7, "shard_bytes": 20_000})(output, "m")
    if found:
        os.write(found, b"%d\n" % len(sink.finished))
    for number, image in enumerate(images):
        record = {"id": str(image), "path": str(image), "model": "m"}
        item = Item(str(image), str(image))
        if not sink.is_finished(item, None):
            if number % 10 == 9:
                sink.error({**record, "kind": "damaged"})
            else:
                sink.caption({**record, "caption": f"Picture {image.stem}."}, item)
    sink.close()


def main() -> None:
    """Kill, kill, and come to an end."""
    kind, output, folder, kills, seed = sys.argv[1:]
    images, draw = sorted(Path(folder).glob("*.png")), random.Random(int(seed))
    counts, found = os.pipe()
    so_far = []
    for _ in range(int(kills)):
        child = os.fork()
        if not child:
            write(kind, output, images, found)
            os._exit(0)
        if draw.random() < 0.3:  # while it reads what there is
            time.sleep(draw.uniform(0, 0.004))
        else:  # while it writes
            so_far.append(int(os.read(counts, 100)))
            time.sleep(draw.uniform(0, 0.005))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([counts], [], [], 0)[0]:
            os.read(counts, 100)
    print(*so_far)
    write(kind, output, images)


if __name__ == "__main__":
    main()
