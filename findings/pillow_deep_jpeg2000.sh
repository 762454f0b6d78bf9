#!/usr/bin/env bash
# Pillow opens colour JPEG 2000 files of more than 8 bits with white as black, and opaque alpha as transparent.
#
# Guess, worded once another decoder had shown a difference: a lossless 16-bit sample v is reduced to 8 bits as v >> 8
#   or as round(v / 257); either way 65535 is 255, and the order of levels is kept. Grey, RGB and alpha alike.
# Versions: Pillow 13.0.0, imagecodecs 2026.3.6, numpy 2.3.5, Python 3.11.
# Behaviour: with two or more components Pillow adds half a level before it shifts, and keeps the lower 8 bits of the
#   result: samples from 65408 on become 256, stored as 0. So the highlights of a scan or satellite image turn black
#   channel by channel, and an opaque alpha channel becomes transparent. 12 bits wrap at 4088. One component (grey)
#   keeps its 16 bits and is right. imagecodecs, which has the same OpenJPEG, reads back what was written.
# Output seen:
#   RGB, 16 bits: 65407 is 255, 65408 is 0, 65535 is 0; imagecodecs 65407, 65408, 65535
#   RGB, 12 bits: 4087 is 255, 4088 is 0, 4095 is 0; imagecodecs 4087, 4088, 4095
#   grey and alpha, 16 bits: alpha of 65535 is 0
#   grey, 16 bits: 65535 is 65535
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet pillow==13.0.0 imagecodecs==2026.3.6 numpy==2.3.5
cat >"$dir/deep.py" <<'PY'
import io

import numpy as np
from imagecodecs import jpeg2k_decode, jpeg2k_encode
from PIL import Image


def levels(values, channels, bits):
    """Write a row of values, the same in every channel; return what Pillow and imagecodecs read of the last channel."""
    row = np.array(values, np.uint16)
    pixels = np.broadcast_to(row[None, :, None], (2, len(row), channels)).copy()
    file = jpeg2k_encode(pixels if channels > 1 else pixels[..., 0], level=0, bitspersample=bits, reversible=True)
    read, truth = np.asarray(Image.open(io.BytesIO(file))), jpeg2k_decode(file)
    return [image.reshape(2, len(row), channels)[0, :, -1].tolist() for image in (read, truth)]


wrapped = []
for bits, values in (16, (65407, 65408, 65535)), (12, (4087, 4088, 4095)):
    found, truth = levels(values, 3, bits)
    texts = [f"{value} is {level}" for value, level in zip(values, found)]
    print(f"RGB, {bits} bits: {', '.join(texts)}; imagecodecs {', '.join(map(str, truth))}")
    assert truth == list(values)
    wrapped.append(found)
alpha = levels((0, 65535), 2, 16)[0][-1]
print(f"grey and alpha, 16 bits: alpha of 65535 is {alpha}")
grey = levels((0, 65535), 1, 16)[0][-1]
print(f"grey, 16 bits: 65535 is {grey}")
assert wrapped == [[255, 0, 0], [255, 0, 0]] and alpha == 0 and grey == 65535
PY
"$dir/env/bin/python" "$dir/deep.py"
