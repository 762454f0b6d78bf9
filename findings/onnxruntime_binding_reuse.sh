#!/usr/bin/env bash
# With I/O binding ONNX Runtime writes the second run's result over the first one, and keeps the first run's shape.
#
# Guess, written before the first run: bind_output(name), which gives no buffer and no shape, leaves the allocation to
#   the session, anew in each run, as run() does; a result taken from get_outputs() stays what it is, and a run with
#   another batch size or number of boxes has an output of that size.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.3.5, Python 3.11, CPU provider.
# Behaviour: the output that the first run allocates stays bound as if the caller had given it. get_outputs()[0].numpy()
#   is a view of it, so results collected over three requests are all the last one; nothing warns, and a loop over equal
#   inputs or one that writes each result at once does not show it. A later run whose output has another shape is
#   refused, also where the shape follows from the data (NonZero, NMS), which the documentation names as the use of
#   binding a device alone. Binding the output again before each run, or copy_outputs_to_cpu, keeps the results.
# Output seen (results of the inputs 1, 2 and 3, doubled by the graph):
#   run: 2 4 6
#   bound once, get_outputs: 6 6 6
#   bound once, copy_outputs_to_cpu: 2 4 6
#   bound before each run, get_outputs: 2 4 6
#   bound once, batch 3 then 5: refused; bound before each run: 3 5
#   NonZero of [1 1 1] then [0 1 0], bound once: 3 places, then refused
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5
"$dir/env/bin/python" - 2>"$dir/log" <<'PY' || { cat "$dir/log" >&2; exit 1; }
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def session(node, rank, dtype):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])
    y = helper.make_tensor_value_info("y", dtype, [f"d{i}" for i in range(rank)])
    graph = helper.make_graph([node], "graph", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def view(binding):
    return binding.get_outputs()[0].numpy()


def copy(binding):
    return binding.copy_outputs_to_cpu()[0]


def bound(model, inputs, take, again=False):
    """Return the results of `inputs`, and None for each that is refused."""
    binding, results = model.io_binding(), []
    binding.bind_output("y")
    for x in inputs:
        binding.bind_cpu_input("x", x)
        if again:
            binding.bind_output("y")
        try:
            model.run_with_iobinding(binding)
        except Exception:
            results.append(None)
        else:
            results.append(take(binding))
    return results


def show(label, results):
    values = [int(y[0]) for y in results]
    print(f"{label}:", *values)
    return values


double = session(helper.make_node("Add", ["x", "x"], ["y"]), 1, TensorProto.FLOAT)
inputs = [np.full(3, value, np.float32) for value in (1, 2, 3)]
assert show("run", [double.run(None, {"x": x})[0] for x in inputs]) == [2, 4, 6]
assert show("bound once, get_outputs", bound(double, inputs, view)) == [6, 6, 6]
assert show("bound once, copy_outputs_to_cpu", bound(double, inputs, copy)) == [2, 4, 6]
assert show("bound before each run, get_outputs", bound(double, inputs, view, again=True)) == [2, 4, 6]

batches = [np.ones(size, np.float32) for size in (3, 5)]
once, again = bound(double, batches, view), bound(double, batches, view, again=True)
assert len(once[0]) == 3 and once[1] is None
print("bound once, batch 3 then 5: refused; bound before each run:", *map(len, again))
assert [len(y) for y in again] == [3, 5]

places = session(helper.make_node("NonZero", ["x"], ["y"]), 2, TensorProto.INT64)
found = bound(places, [np.array(x, np.float32) for x in ([1, 1, 1], [0, 1, 0])], view)
assert found[0].shape == (1, 3) and found[1] is None
print("NonZero of [1 1 1] then [0 1 0], bound once: 3 places, then refused")
PY
