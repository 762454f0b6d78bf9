"""Compare an output with the folder that it is about: python reruns_check.py captions.jsonl FOLDER

Reads nothing else, and imports nothing of this project. Prints JSON: how many images and records there are, and how
many images have no record or several, records have no image, or are of another image than the one that is there now.
"""

import collections
import hashlib
import json
import os
import sys


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
            records[os.path.realpath(record["path"])].append(record["sha256"])
    print(
        json.dumps(
            {
                "images": len(images),
                "records": sum(map(len, records.values())),
                "images_without_record": sum(path not in records for path in images),
                "images_with_several": sum(len(found) > 1 for found in records.values()),
                "records_without_image": sum(path not in images for path in records),
                "records_of_another_image": sum(
                    digest != images[path] for path, found in records.items() if path in images for digest in found
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
