"""Compare an output with the folder that it is about: python reruns_check.py captions.jsonl FOLDER

Reads nothing else, and imports nothing of this project. Prints JSON: how many images and records there are, and how
many images have no record or several, records have no image, or are of another image than the one that is there now: by
the hash of the file, where the record has one, and by that of the pixels, where the caption is one (reruns_engine.py).
"""

import collections
import hashlib
import json
import os
import sys

import numpy as np
from PIL import Image


def pixels(path: str) -> str:
    """Return the caption that reruns_engine.py gives to the image that is there now."""
    with Image.open(path) as image:
        content = np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()
    return f"Pixels {hashlib.sha256(content).hexdigest()[:16]}."


def main() -> None:
    """Compare and print."""
    output, folder = sys.argv[1:]
    images = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".png") and not name.startswith("."):
                path = os.path.realpath(os.path.join(parent, name))
                with open(path, "rb") as file:
                    images[path] = hashlib.sha256(file.read()).hexdigest()
    records = collections.defaultdict(list)
    with open(output, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            assert record["caption"].strip(), record
            records[os.path.realpath(record["path"])].append((record.get("sha256"), record["caption"]))
    here = [(path, *each) for path, found in records.items() if path in images for each in found]
    print(
        json.dumps(
            {
                "images": len(images),
                "records": sum(map(len, records.values())),
                "images_without_record": sum(path not in records for path in images),
                "images_with_several": sum(len(found) > 1 for found in records.values()),
                "records_without_image": sum(path not in images for path in records),
                "records_of_another_image": sum(
                    digest is not None and digest != images[path] for path, digest, _ in here
                ),
                "captions_of_other_pixels": sum(
                    caption.startswith("Pixels ") and caption != pixels(path) for path, _, caption in here
                ),
                "compared_by_hash": sum(digest is not None for _, digest, _ in here),
                "compared_by_pixels": sum(caption.startswith("Pixels ") for _, _, caption in here),
            }
        )
    )


if __name__ == "__main__":
    main()
