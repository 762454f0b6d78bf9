#!/usr/bin/env bash
# MLX reads bfloat16 tensors of a GGUF file as float16: large weights become infinite, small ones zero.
#
# Guess, written before the first run: mlx.core.load gives a GGUF tensor the dtype that the file states where MLX has
#   it. MLX has bfloat16, and reads it from safetensors; the same tensor is the same array from either file.
# Versions: mlx 0.32.4 (CPU), gguf 0.19.0, safetensors 0.8.0, ml_dtypes 0.6.0, numpy 2.3.5, Linux x86-64.
# Behaviour: float32 tensors stay float32, but bfloat16 ones become float16. 99840 is read as infinity and -1e-9 as
#   zero. Nothing warns or raises. A checkpoint converted to GGUF in its own bfloat16 can so differ from its
#   safetensors in the same library.
# Output seen:
#   safetensors: bfloat16 [1.0, 99840.0, -9.968062e-10, 3.0040553e+38]
#   GGUF: float16 [1.0, inf, -0.0, inf]
#   GGUF read by gguf: [1.0, 99840.0, -9.968062e-10, 3.0040553e+38]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet 'mlx[cpu]==0.32.4' gguf==0.19.0 safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.3.5
cd "$dir"
"$dir/env/bin/python" - <<'PY'
import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import safetensors.numpy

x = np.array([1, 1e5, -1e-9, 3e38], np.float32).astype(ml_dtypes.bfloat16)
safetensors.numpy.save_file({"x": x}, "x.safetensors")
writer = gguf.GGUFWriter("x.gguf", "llama")
writer.add_tensor("x", x.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

seen = {}
for label, file in (("safetensors", "x.safetensors"), ("GGUF", "x.gguf")):
    tensor = mx.load(file)["x"]
    seen[label] = tensor.dtype, np.array(tensor.astype(mx.float32))
    print(f"{label}: {str(tensor.dtype).removeprefix('mlx.core.')} [{', '.join(map(str, seen[label][1]))}]")
(tensor,) = gguf.GGUFReader("x.gguf").tensors
reference = gguf.dequantize(tensor.data, tensor.tensor_type)
print(f"GGUF read by gguf: [{', '.join(map(str, reference))}]")

assert seen["safetensors"][0] == mx.bfloat16
assert (seen["safetensors"][1] == reference).all() and np.isfinite(reference).all() and reference.all()
assert seen["GGUF"][0] == mx.float16
assert np.isinf(seen["GGUF"][1][[1, 3]]).all() and seen["GGUF"][1][2] == 0
PY
