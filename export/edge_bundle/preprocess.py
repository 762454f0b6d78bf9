"""Put the resize and the centre crop into an encoder's ONNX graph, so that it takes an image of any size.

The graph does what `vlv.data.image.centre` does with Pillow: an antialiased bilinear resize of the short side to S, and
the central S x S pixels, with the same rounding. exclude_outside=1 drops the taps beyond the border and rescales the
rest, as Pillow does; ONNX's default, 0, repeats the border instead and is up to 11 grey levels off there.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, compose, helper, parser

from vlv.data.image import MAX_PIXELS

# Height and width are one tensor of two: both take the same steps. A resized image of an extreme aspect ratio, of more
# than MAX_PIXELS, would not fit in memory: there, as in vlv.data.image, the middle alone is resized. It is three times
# as long as wide, because the taps of the crop's outermost pixels reach beyond the crop.
_CROP = """
<ir_version: %(ir_version)d, opset_import: ["": %(opset)d]>
crop (uint8[height, width, 3] image) => (uint8[1, 3, %(size)d, %(size)d] crop) {
    three = Constant<value_int = 3>()
    two = Constant<value_ints = [2, 2]>()
    size = Constant<value_ints = [%(size)d, %(size)d]>()
    limit = Constant<value_int = %(max_pixels)d>()
    batch_axis = Constant<value_ints = [0]>()
    image_axes = Constant<value_ints = [0, 1]>()
    crop_axes = Constant<value_ints = [2, 3]>()
    batch_and_channels = Constant<value_ints = [1, 3]>()
    sides = Shape<end = 2>(image)
    short = ReduceMin<keepdims = 0>(sides)
    full_scaled = Mul(sides, size)
    full_target = Div(full_scaled, short)
    pixels = ReduceProd<keepdims = 0>(full_target)
    extreme = Greater(pixels, limit)
    thrice = Mul(short, three)
    middle = Min(sides, thrice)
    taken = Where(extreme, middle, sides)
    beyond = Sub(sides, taken)
    first = Div(beyond, two)
    end = Add(first, taken)
    source = Slice(image, first, end, image_axes)
    scaled = Mul(taken, size)
    target = Div(scaled, short)
    planes = Transpose<perm = [2, 0, 1]>(source)
    row = Unsqueeze(planes, batch_axis)
    sizes = Concat<axis = 0>(batch_and_channels, target)
    resized = Resize<mode = "linear", antialias = 1, exclude_outside = 1,
                     coordinate_transformation_mode = "half_pixel">(row, , , sizes)
    excess = Sub(target, size)
    half = Div(excess, two)
    odd = Mod(excess, two)
    half_odd = Mod(half, two)
    up = Mul(odd, half_odd)
    start = Add(half, up)
    stop = Add(start, size)
    crop = Slice(resized, start, stop, crop_axes)
}
"""


def crop_graph(size: int, opset: int = 20, ir_version: int = 10) -> ModelProto:
    """Return the model that takes an image uint8 [height, width, 3] RGB and gives its crop uint8 [1, 3, size, size]."""
    values = {"size": size, "opset": opset, "ir_version": ir_version, "max_pixels": MAX_PIXELS}
    return parser.parse_model(_CROP % values)


def with_crop(encoder: ModelProto, metadata: dict[str, str]) -> ModelProto:
    """Return an encoder that takes one image uint8 [height, width, 3] and gives `crop` and `embeddings` [1, Q, H].

    encoder: takes `pixels` uint8 [B, 3, S, S] and gives `prompts`, as `export.onnx` writes it; its weights may be
    in a file beside it, which is not read. metadata: what a program needs beside the graph, kept in the model.
    """
    size = encoder.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    prompts = next(value for value in encoder.graph.output if value.name == "prompts")
    _, queries, width = (dim.dim_value for dim in prompts.type.tensor_type.shape.dim)
    opset = next(entry.version for entry in encoder.opset_import if entry.domain == "")
    # the names in between get a prefix, because the encoder's graph may have the same
    crop = compose.add_prefix(
        crop_graph(size, opset, encoder.ir_version), "crop/", rename_inputs=False, rename_outputs=False
    )
    model = ModelProto()
    model.CopyFrom(encoder)
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["crop" if name == "pixels" else name for name in node.input]
    nodes = [*crop.graph.node, *graph.node, helper.make_node("Identity", ["prompts"], ["embeddings"])]
    outputs = [*crop.graph.output, helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, queries, width])]
    for field, values in (("node", nodes), ("input", crop.graph.input), ("output", outputs)):
        kept = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(field)
        getattr(graph, field).extend(kept)
    helper.set_model_props(model, metadata)
    return model
