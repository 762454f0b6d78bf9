"""Put the resize and the centre crop into an encoder's ONNX graph, so that it takes an image of any size.

The graph gives the crop of `vlv.data.decoding.crop.center`, level by level: Pillow's antialiased bilinear resize of
the short side to S, and the central S x S pixels. ONNX's own Resize is not used. Its default, exclude_outside=0, is up
to 11 grey levels off at the borders; with 1, it rounds ties otherwise, because its coordinates are float32, and the two
passes may add up to 2 levels.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto, compose, helper, parser

from vlv.data.image import MAX_PIXELS

BITS = 22  # of Pillow's integer taps

# `sides`, `targets` and so on are tensors of two, rows and columns, until the axes part: p is resized first, then q.
#   centre_j = offset + (first + j + 0.5) scale, j < S          scale = side / target, support = max(scale, 1)
#   tap_jk   = max(0, 1 - |low_j + k + 0.5 - centre_j| / support), low_j = max(0, int(centre_j - support + 0.5))
# and low_j + k < high_j = min(side, int(centre_j + support + 0.5)); the taps of a pixel are rescaled to the sum 1 and
# rounded to 22 bits, and each pass rounds its sums to 8 bits. Source: Pillow's src/libImaging/Resample.c. Pillow 13
# resizes the rows first where that removes more than twice as many lines as resizing the columns would.
_GRAPH = """
<ir_version: %(ir_version)d, opset_import: ["": %(opset)d]>
crop (uint8[height, width, 3] image) => (uint8[1, 3, %(size)d, %(size)d] crop) {
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    two = Constant<value = int64 {2}>()
    zeros = Constant<value_ints = [0]>()
    ones = Constant<value_ints = [1]>()
    minus_one = Constant<value_ints = [-1]>()
    flat = Constant<value_ints = [0, -1]>()
    lines_and_rows = Constant<value_ints = [%(size)d, 3, -1]>()
    square = Constant<value_ints = [%(size)d, 3, %(size)d]>()
    size = Constant<value = int64 {%(size)d}>()
    sizes = Constant<value_ints = [%(size)d]>()
    limit = Constant<value = int64 {%(max_pixels)d}>()
    half = Constant<value = double {0.5}>()
    unit = Constant<value = double {1.0}>()
    nothing = Constant<value = double {0.0}>()
    true = Constant<value = bool {1}>()
    steps = Constant<value = double {%(steps)d}>()
    divisor = Constant<value = int32 {%(steps)d}>()
    rounding = Constant<value = int32 {%(half_step)d}>()
    sides = Shape<end = 2>(image)
    short = ReduceMin<keepdims = 0>(sides)
    scaled = Mul(sides, size)
    full = Div(scaled, short)
    pixels = ReduceProd<keepdims = 0>(full)
    extreme = Greater(pixels, limit)
    targets = Where(extreme, size, full)
    used = Where(extreme, short, sides)
    beyond = Sub(sides, used)
    beyond_double = Cast<to = 11>(beyond)
    offsets = Mul(beyond_double, half)
    excess = Sub(targets, size)
    middle = Div(excess, two)
    odd = Mod(excess, two)
    odd_middle = Mod(middle, two)
    up = Mul(odd, odd_middle)
    firsts = Add(middle, up)
    firsts_double = Cast<to = 11>(firsts)
    used_double = Cast<to = 11>(used)
    targets_double = Cast<to = 11>(targets)
    scales = Div(used_double, targets_double)
    supports = Max(scales, unit)
    numbers = Range(zero, size, one)
    numbers_double = Cast<to = 11>(numbers)
    removed = Sub(sides, targets)
    removed_rows = Gather(removed, zero)
    removed_columns = Gather(removed, one)
    fewer_columns = Max(removed_columns, zero)
    twice = Mul(fewer_columns, two)
    rows_first = Greater(removed_rows, twice)
    axis_p = Where(rows_first, zero, one)
    axis_q = Sub(one, axis_p)
%(taps_p)s
%(taps_q)s
    begin = Concat<axis = 0>(low_p, low_q)
    end = Concat<axis = 0>(high_p, high_q)
    axes_p = Unsqueeze(axis_p, zeros)
    axes_q = Unsqueeze(axis_q, zeros)
    axes = Concat<axis = 0>(axes_p, axes_q)
    source = Slice(image, begin, end, axes)
    oriented = If<
        then_branch = rows_of_source () => (uint8[P, C, Q] rows) { rows = Transpose<perm = [0, 2, 1]>(source) },
        else_branch = columns_of_source () => (uint8[P, C, Q] columns) { columns = Transpose<perm = [1, 2, 0]>(source) }
    >(rows_first)
    lines_p = Reshape(oriented, flat)
%(pass_p)s
    narrow = Reshape(resized_p, lines_and_rows)
    turned = Transpose<perm = [2, 1, 0]>(narrow)
    lines_q = Reshape(turned, flat)
%(pass_q)s
    resized = Reshape(resized_q, square)
    upright = If<
        then_branch = of_columns () => (uint8[C, H, W] from_columns) {
            from_columns = Transpose<perm = [1, 2, 0]>(resized)
        },
        else_branch = of_rows () => (uint8[C, H, W] from_rows) { from_rows = Transpose<perm = [1, 0, 2]>(resized) }
    >(rows_first)
    crop = Unsqueeze(upright, zeros)
}
"""

# The taps of an axis, int32 [K, S, 1], and the places of their pixels from the first that is used, int64 [K, S]
_TAPS = """
    side_%(a)s = Gather(sides, axis_%(a)s)
    offset_%(a)s = Gather(offsets, axis_%(a)s)
    first_%(a)s = Gather(firsts_double, axis_%(a)s)
    scale_%(a)s = Gather(scales, axis_%(a)s)
    support_%(a)s = Gather(supports, axis_%(a)s)
    number_%(a)s = Add(numbers_double, first_%(a)s)
    middle_%(a)s = Add(number_%(a)s, half)
    distance_%(a)s = Mul(middle_%(a)s, scale_%(a)s)
    centre_%(a)s = Add(distance_%(a)s, offset_%(a)s)
    left_%(a)s = Sub(centre_%(a)s, support_%(a)s)
    left_half_%(a)s = Add(left_%(a)s, half)
    left_up_%(a)s = Max(left_half_%(a)s, nothing)
    lows_%(a)s = Cast<to = 7>(left_up_%(a)s)
    right_%(a)s = Add(centre_%(a)s, support_%(a)s)
    right_half_%(a)s = Add(right_%(a)s, half)
    right_int_%(a)s = Cast<to = 7>(right_half_%(a)s)
    highs_%(a)s = Min(right_int_%(a)s, side_%(a)s)
    low_%(a)s = ReduceMin<keepdims = 1>(lows_%(a)s)
    high_%(a)s = ReduceMax<keepdims = 1>(highs_%(a)s)
    lengths_%(a)s = Sub(highs_%(a)s, lows_%(a)s)
    count_%(a)s = ReduceMax<keepdims = 0>(lengths_%(a)s)
    range_%(a)s = Range(zero, count_%(a)s, one)
    k_%(a)s = Unsqueeze(range_%(a)s, ones)
    places_%(a)s = Add(lows_%(a)s, k_%(a)s)
    inside_%(a)s = Less(places_%(a)s, highs_%(a)s)
    places_double_%(a)s = Cast<to = 11>(places_%(a)s)
    from_centre_%(a)s = Sub(places_double_%(a)s, centre_%(a)s)
    from_middle_%(a)s = Add(from_centre_%(a)s, half)
    share_%(a)s = Div(from_middle_%(a)s, support_%(a)s)
    absolute_%(a)s = Abs(share_%(a)s)
    triangle_%(a)s = Sub(unit, absolute_%(a)s)
    positive_%(a)s = Max(triangle_%(a)s, nothing)
    weights_%(a)s = Where(inside_%(a)s, positive_%(a)s, nothing)
    sum_%(a)s = ReduceSum<keepdims = 1>(weights_%(a)s, zeros)
    rescaled_%(a)s = Div(weights_%(a)s, sum_%(a)s)
    large_%(a)s = Mul(rescaled_%(a)s, steps)
    large_half_%(a)s = Add(large_%(a)s, half)
    taps_int_%(a)s = Cast<to = 6>(large_half_%(a)s)
    taps_%(a)s = Unsqueeze(taps_int_%(a)s, minus_one)
    last_%(a)s = Sub(high_%(a)s, one)
    existing_%(a)s = Min(places_%(a)s, last_%(a)s)
    places_used_%(a)s = Sub(existing_%(a)s, low_%(a)s)"""

# A pass adds one tap of all pixels at a time. The axis that is resized comes first, so that the pixels of one place lie
# together: [P, 3 Q] -> [S, 3 Q] = [S, 3, Q], turned to [Q, 3 S] -> [S, 3 S] = [S, 3, S].
_PASS = """
    length_%(a)s = Shape<start = 1>(lines_%(a)s)
    shape_%(a)s = Concat<axis = 0>(sizes, length_%(a)s)
    start_%(a)s = Expand(rounding, shape_%(a)s)
    summed_%(a)s = Loop<body = add_tap_%(a)s (int64 i_%(a)s, bool go_%(a)s, int32[S, N] sum_in_%(a)s)
            => (bool go_on_%(a)s, int32[S, N] sum_out_%(a)s) {
        go_on_%(a)s = Identity(go_%(a)s)
        place_%(a)s = Gather(places_used_%(a)s, i_%(a)s)
        tap_%(a)s = Gather(taps_%(a)s, i_%(a)s)
        levels_%(a)s = Gather(lines_%(a)s, place_%(a)s)
        levels_int_%(a)s = Cast<to = 6>(levels_%(a)s)
        product_%(a)s = Mul(levels_int_%(a)s, tap_%(a)s)
        sum_out_%(a)s = Add(sum_in_%(a)s, product_%(a)s)
    }>(count_%(a)s, true, start_%(a)s)
    quotient_%(a)s = Div(summed_%(a)s, divisor)
    resized_%(a)s = Cast<to = 2>(quotient_%(a)s)"""


def crop_graph(size: int, opset: int = 20, ir_version: int = 10) -> ModelProto:
    """Return the model that takes an image uint8 [height, width, 3] RGB and gives its crop uint8 [1, 3, size, size]."""
    values = {
        "size": size,
        "opset": opset,
        "ir_version": ir_version,
        "max_pixels": MAX_PIXELS,
        "steps": 1 << BITS,
        "half_step": 1 << BITS - 1,
        **{f"taps_{axis}": _TAPS % {"a": axis} for axis in "pq"},
        **{f"pass_{axis}": _PASS % {"a": axis} for axis in "pq"},
    }
    return parser.parse_model(_GRAPH % values)


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
