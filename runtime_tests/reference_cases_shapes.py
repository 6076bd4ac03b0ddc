"""More of the table of `reference_cases`: shapes, reductions, resizing, quantization, detection, the borrowed ones."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from runtime_tests.reference_cases import Case, floats, ints, normal, positive, unit, whole


def _attribute_or_input(op: str, x: Any, name: str, values: list[int], since: int, first: int = 6) -> Iterator[Case]:
    """The same call in its old form (a list as attribute) and its new one (as second input)."""
    yield Case(op, [x], {name: values}, first=first, last=since - 1)
    yield Case(op, [x, ints(*values)], first=since)


def shaping() -> Iterator[Case]:
    """Moving, cutting and joining."""
    x = normal(2, 3, 4, 5)
    yield Case("Reshape", [x, ints(0, -1, 5)], first=6)
    yield Case("Reshape", [normal(0, 3), ints(3, 0)], {"allowzero": 1}, first=14)
    for axis in (0, 1, 3, 4):
        yield Case("Flatten", [x], {"axis": axis}, first=6)
    yield Case("Flatten", [x], {"axis": -1}, first=11)
    yield from _attribute_or_input("Squeeze", normal(1, 3, 1, 2), "axes", [0, 2], 13)
    yield from _attribute_or_input("Unsqueeze", normal(3, 2), "axes", [0, 3], 13)
    yield Case("Unsqueeze", [normal(3, 2), ints(-1, 1)], first=13)
    yield Case("Squeeze", [normal(1, 3, 1)], first=6)
    yield Case("Transpose", [x], {"perm": [2, 0, 3, 1]}, first=6)
    yield Case("Transpose", [x], first=6)
    yield Case("Expand", [normal(3, 1), ints(2, 1, 4)], first=8)
    yield Case("Concat", [x, normal(2, 1, 4, 5), x], {"axis": 1}, first=6)
    yield Case("Concat", [x, x], {"axis": -1}, first=11)
    yield Case("Split", [x], {"axis": 3, "split": [1, 4]}, first=6, last=12, outputs=2)
    yield Case("Split", [x, ints(1, 0, 4)], {"axis": 3}, first=13, outputs=3)
    yield Case("Split", [x], {"axis": 2}, first=6, last=17, outputs=2)
    yield Case("Split", [x], {"axis": 3, "num_outputs": 3}, first=18, outputs=3)
    yield Case("Slice", [x], {"starts": [1, -3], "ends": [99, -1], "axes": [1, 3]}, first=6, last=9)
    yield Case("Slice", [x, ints(1, -3), ints(99, -1), ints(1, 3)], first=10)
    yield Case("Slice", [x, ints(-1, 4), ints(-99, 0), ints(2, 3), ints(-1, -2)], first=10)
    yield Case("Gather", [x, ints(2, 0, 1, 2).reshape(2, 2)], {"axis": 1}, first=6)
    yield Case("Gather", [x, ints(-1, 0)], {"axis": -2}, first=11)
    yield Case("GatherElements", [x, whole(-3, 3, 2, 2, 4, 5)], {"axis": 1}, first=11)
    yield Case("GatherND", [x, whole(0, 2, 3, 2)], first=11)
    yield Case("GatherND", [x, whole(0, 3, 2, 6, 1)], {"batch_dims": 1}, first=12)
    yield Case("Scatter", [normal(3, 4), whole(0, 3, 1, 4), normal(1, 4)], {"axis": 0}, 9, 10)
    yield Case("ScatterElements", [normal(3, 4), whole(-3, 3, 1, 4), normal(1, 4)], {"axis": 0}, 11)
    for reduction in ("add", "mul"):
        data = [normal(3, 4), whole(0, 3, 5, 4), normal(5, 4)]
        yield Case("ScatterElements", data, {"axis": 0, "reduction": reduction}, 16)
        yield Case("ScatterND", [normal(3, 4), whole(0, 3, 6, 1), normal(6, 4)], {"reduction": reduction}, 16)
    for reduction in ("max", "min"):
        yield Case("ScatterND", [normal(3, 4), whole(0, 3, 6, 1), normal(6, 4)], {"reduction": reduction}, 18)
    yield Case("ScatterND", [normal(3, 4), ints(2, 0).reshape(2, 1), normal(2, 4)], first=11)
    for mode in ("constant", "reflect", "edge"):
        pads = [0, 1, 2, 0, 0, 0, 1, 3]
        yield Case("Pad", [x], {"mode": mode, "pads": pads}, first=6, last=10)
        yield Case("Pad", [x, ints(*pads)], {"mode": mode}, first=11)
    yield Case("Pad", [x], {"value": 1.5, "pads": [0, 1, -1, 0, 0, 0, 1, -2]}, first=6, last=10)
    yield Case("Pad", [x, ints(0, 1, -1, 0, 0, 0, 1, -2), np.array(1.5, np.float32)], first=11)
    yield Case("Pad", [x, ints(1, 2, 0, 1), None, ints(-1, 2)], first=18)
    yield Case("Pad", [x, ints(0, 0, 3, 2, 0, 0, 5, 1)], {"mode": "wrap"}, first=19)
    yield Case("Tile", [normal(2, 3), ints(2, 3)], first=6)
    for mode in ("DCR", "CRD"):
        yield Case("DepthToSpace", [normal(2, 12, 3, 4)], {"blocksize": 2, "mode": mode}, first=11)
    yield Case("DepthToSpace", [normal(2, 12, 3, 4)], {"blocksize": 2}, first=6)
    yield Case("DepthToSpace", [normal(2, 18, 3, 4)], {"blocksize": 3}, first=6)
    yield Case("SpaceToDepth", [normal(2, 3, 4, 6)], {"blocksize": 2}, first=6)
    yield Case("Shape", [x], first=6)
    yield Case("Shape", [x], {"start": -3, "end": -1}, first=15)
    yield Case("Size", [x], first=6)
    yield Case("OneHot", [whole(-3, 4, 2, 3), ints(4), floats(0.5, 2.0)], {"axis": 1}, first=9)
    yield Case("Trilu", [normal(2, 4, 5), np.array(1)], {"upper": 0}, first=14)
    yield Case("Trilu", [normal(4, 5)], first=14)
    yield Case("ReverseSequence", [normal(4, 3, 2), ints(1, 4, 3)], {"batch_axis": 1, "time_axis": 0}, first=10)
    yield Case("Range", [np.array(v, np.int64) for v in (9, -4, -3)], first=11)
    yield Case("Range", [np.array(v, np.float32) for v in (0.5, 4.25, 0.75)], first=11)
    yield Case("EyeLike", [normal(3, 5)], {"k": 1}, first=9)
    yield Case("NonZero", [whole(0, 2, 3, 4)], first=9)
    yield Case("Compress", [normal(3, 4), np.array([True, False, True])], {"axis": 0}, first=9)
    yield Case("CenterCropPad", [normal(5, 4, 3), ints(3, 7)], {"axes": [0, 1]}, first=18)
    yield Case("ConstantOfShape", [ints(2, 3)], first=9)


def reduction() -> Iterator[Case]:
    """Sums, extremes, sorted prefixes."""
    for op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        x = positive(3, 4, 5) if op == "LogSum" else normal(3, 4, 5)
        since = 13 if op == "Sum" else 18
        name = f"Reduce{op}"
        yield from _attribute_or_input(name, x, "axes", [0, 2], since)
        yield Case(name, [x], {"axes": [-1], "keepdims": 0}, first=11, last=since - 1)
        yield Case(name, [x, ints(-1)], {"keepdims": 0}, first=since)
        yield Case(name, [x], {"keepdims": 0}, first=6)
        yield Case(name, [x[:1]], {"axes": [1], "keepdims": 0}, first=6, last=since - 1)
        yield Case(name, [x], {"noop_with_empty_axes": 1}, first=since)
    yield Case("ReduceSum", [whole(-9, 9, 3, 4)], {"axes": [1]}, first=6, last=12)
    yield Case("ReduceMean", [whole(-9, 9, 3, 4, dtype=np.int32)], {"axes": [1]}, first=6, last=17)
    yield Case("ReduceMax", [whole(0, 2, 3, 4, dtype=bool), ints(1)], first=20)
    for op in ("ArgMax", "ArgMin"):
        yield Case(op, [whole(0, 3, 4, 9).astype(np.float32)], {"axis": 1, "keepdims": 0}, first=6)
        yield Case(op, [whole(0, 3, 4, 9).astype(np.float32)], {"axis": 1, "select_last_index": 1}, first=12)
    yield Case("TopK", [normal(3, 9)], {"k": 4, "axis": 1}, first=6, last=9, outputs=2)
    yield Case("TopK", [normal(3, 9), ints(4)], {"axis": 1}, first=10, outputs=2)
    yield Case("TopK", [whole(0, 4, 3, 9).astype(np.float32), ints(5)], {"largest": 0, "axis": -1}, 11, outputs=2)
    for attributes in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}):
        yield Case("CumSum", [normal(3, 5), np.array(1)], attributes, first=11)
    yield Case("CumProd", [normal(3, 5), np.array(1)], {"exclusive": 1}, first=26)


def resizing() -> Iterator[Case]:
    """Resize in all its modes, Upsample."""
    image = normal(1, 2, 5, 6)
    for mode in ("nearest", "linear"):
        yield Case("Upsample", [image], {"mode": mode, "scales": [1.0, 1.0, 2.0, 3.0]}, first=7, last=8)
        yield Case("Upsample", [image, floats(1, 1, 2, 3)], {"mode": mode}, first=9, last=9)
        for scales in ((1, 1, 2, 3), (1, 1, 0.6, 0.5), (1, 1, 1.7, 0.9)):
            yield Case("Resize", [image, floats(*scales)], {"mode": mode}, first=10, last=10)
    for scales in ((1, 1, 2, 3), (1, 1, 0.6, 0.5), (1, 1, 1.7, 0.9)):
        for transform in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"):
            first = 19 if transform == "half_pixel_symmetric" else 11
            for mode in ("linear", "cubic"):
                attributes = {"mode": mode, "coordinate_transformation_mode": transform}
                yield Case("Resize", [image, None, floats(*scales)], attributes, first=13 if first == 11 else first)
                yield Case("Resize", [image, floats(), floats(*scales)], attributes, first=first)
            if transform == "half_pixel_symmetric" and scales[2] == 0.6:
                continue  # its middle sample lies on a pixel: which neighbour is nearest depends on float32 rounding
            for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
                attributes = {"coordinate_transformation_mode": transform, "nearest_mode": rounding}
                yield Case("Resize", [image, floats(), floats(*scales)], attributes, first=first)
    cubic = {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}
    yield Case("Resize", [image, floats(), floats(1, 1, 1.5, 2.5)], cubic, first=11)
    for mode in ("nearest", "linear", "cubic"):
        yield Case("Resize", [image, floats(), None, ints(1, 2, 8, 3)], {"mode": mode}, first=13)
        crop = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0, "mode": mode}
        roi = floats(0, 0, 0.1, 0.2, 1, 1, 0.7, 1.3)
        yield Case("Resize", [image, roi, None, ints(1, 2, 7, 8)], crop, first=13)
    for policy in ("not_larger", "not_smaller"):
        attributes = {"axes": [2, 3], "keep_aspect_ratio_policy": policy, "mode": "linear"}
        yield Case("Resize", [image, None, None, ints(7, 13)], attributes, first=18)
    for mode in ("linear", "cubic"):
        small = {"mode": mode, "antialias": 1}
        yield Case("Resize", [normal(1, 1, 12, 15), None, floats(1, 1, 0.4, 0.6)], small, first=18)
    yield Case("Resize", [normal(1, 2, 3, 4, 5), floats(), floats(1, 1, 2, 1, 1.5)], {"mode": "linear"}, first=11)


def quantization() -> Iterator[Case]:
    """Between floats and small integers."""
    x, scale, zero = 3 * normal(2, 3, 6), np.array(0.05, np.float32), np.array(120, np.uint8)
    yield Case("QuantizeLinear", [x, scale, zero], first=10, steps=1)
    yield Case("QuantizeLinear", [x, scale, np.array(-7, np.int8)], first=10, steps=1)
    yield Case("QuantizeLinear", [x, floats(0.1, 0.02, 0.5), whole(-9, 9, 3, dtype=np.int8)], {"axis": 1}, 13, steps=1)
    yield Case("QuantizeLinear", [x, positive(2, 3, 3)], {"axis": 2, "block_size": 2, "output_dtype": 3}, 21, steps=1)
    yield Case("DequantizeLinear", [whole(0, 255, 2, 3, 6, dtype=np.uint8), scale, zero], first=10)
    yield Case("DequantizeLinear", [whole(-99, 99, 2, 3, 6, dtype=np.int32), scale], first=10)
    per_axis = [whole(-99, 99, 2, 3, 6, dtype=np.int8), positive(3), whole(-9, 9, 3, dtype=np.int8)]
    yield Case("DequantizeLinear", per_axis, {"axis": 1}, first=13)
    blocks = [per_axis[0], positive(2, 3, 3), whole(-9, 9, 2, 3, 3, dtype=np.int8)]
    yield Case("DequantizeLinear", blocks, {"axis": 2, "block_size": 2}, first=21)
    vector = [whole(-99, 99, 12, dtype=np.int8), positive(3)]
    yield Case("DequantizeLinear", vector, {"axis": 0, "block_size": 4}, first=21)
    yield Case("DynamicQuantizeLinear", [normal(4, 5) + 1], first=11, outputs=3, steps=1)
    # Without VNNI instructions onnxruntime adds pairs of products in 16 bits: weights beyond 64 would saturate there.
    pixels, weight = whole(0, 255, 1, 4, 7, 7, dtype=np.uint8), whole(-60, 60, 6, 2, 3, 3, dtype=np.int8)
    window = {"group": 2, "pads": [1, 1, 1, 1], "strides": [2, 2]}
    yield Case("ConvInteger", [pixels, weight.view(np.uint8), zero, np.array(99, np.uint8)], window, first=10)
    eights = [np.array(0.02, np.float32), zero, weight, positive(6) / 100, np.zeros(6, np.int8)]
    outcome = [np.array(0.3, np.float32), np.array(99, np.uint8), 100 * whole(-999, 999, 6, dtype=np.int32)]
    yield Case("QLinearConv", [pixels, *eights, *outcome], window, first=10, steps=1)
    left, right = whole(0, 255, 3, 4, dtype=np.uint8), whole(-60, 60, 4, 5, dtype=np.int8)
    yield Case("MatMulInteger", [left, right, zero, np.array(3, np.int8)], first=10)
    product = [left, scale, zero, right, np.array(0.01, np.float32), np.array(3, np.int8)]
    yield Case("QLinearMatMul", [*product, np.array(0.07, np.float32), zero], first=10, steps=1)


def detection() -> Iterator[Case]:
    """Boxes, sampling grids and other rare ones."""
    corner, size = _boxes(2, 30)
    thresholds = [ints(4), floats(0.3), floats(0.2)]
    scores = positive(2, 3, 30)
    yield Case("NonMaxSuppression", [np.concatenate([corner, corner + size], -1), scores, *thresholds], first=10)
    center = np.concatenate([corner + size / 2, size], -1)
    yield Case("NonMaxSuppression", [center, scores, *thresholds], {"center_point_box": 1}, first=10)
    for mode in ("avg", "max"):
        rois = floats(0.5, 1.2, 6.3, 7.1, 1.5, 0.3, 5.2, 4.4).reshape(2, 4)
        attributes = {"mode": mode, "output_height": 3, "output_width": 2, "sampling_ratio": 2, "spatial_scale": 0.8}
        yield Case("RoiAlign", [normal(2, 3, 9, 9), rois, ints(1, 0)], attributes, first=10)
    for mode in ("linear", "nearest", "cubic"):
        for padding in ("zeros", "border", "reflection"):
            grid = 1.2 * unit(2, 4, 5, 2)
            old = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
            image = normal(2, 3, 6, 7)
            yield Case("GridSample", [image, grid], {"mode": old, "padding_mode": padding}, first=16, last=19)
            yield Case("GridSample", [image, grid], {"mode": mode, "padding_mode": padding, "align_corners": 1}, 20)
    yield Case("AffineGrid", [normal(2, 2, 3), ints(2, 3, 4, 5)], {"align_corners": 1}, first=20)
    offsets = normal(1, 18, 4, 4) / 2
    yield Case("DeformConv", [normal(1, 2, 6, 6), normal(3, 2, 3, 3), offsets], {"kernel_shape": [3, 3]}, first=19)
    wide = 2 * normal(2, 24, 3, 5)  # beyond the edges too
    inputs = [normal(2, 4, 6, 9), normal(6, 2, 2, 3), wide, normal(6), positive(2, 12, 3, 5)]
    attributes = {"strides": [2, 2], "dilations": [2, 1], "pads": [1, 1, 0, 2], "offset_group": 2, "group": 2}
    yield Case("DeformConv", inputs, attributes, first=19)
    yield Case("DeformConv", inputs[:4], attributes, first=19)
    yield Case("Col2Im", [normal(1, 18, 4), ints(4, 4), ints(3, 3)], first=18)
    yield Case("Det", [normal(2, 4, 4)], first=11)
    yield Case("Unique", [whole(0, 5, 12)], {"sorted": 1}, first=11, outputs=4)
    yield Case("Unique", [whole(0, 2, 6, 2)], {"axis": 0}, first=11, outputs=4)
    yield Case("DFT", [normal(2, 8, 1)], {"axis": 1}, first=17, last=19)
    yield Case("DFT", [normal(2, 8, 2), None, np.array(1)], {"inverse": 1}, first=20)
    for op in ("HannWindow", "HammingWindow", "BlackmanWindow"):
        yield Case(op, [np.array(9)], {"periodic": 0}, first=17)
    yield Case("MelWeightMatrix", [np.array(v) for v in (5, 16, 8192)] + [np.float32(0), np.float32(4000)], first=17)
    signal = [normal(2, 20, 1), np.array(4), positive(8)]
    yield Case("STFT", signal, first=17)
    yield Case("STFT", signal, {"onesided": 0}, first=17)
    labels, weights = whole(0, 4, 3, 5), positive(4)
    for reduction in ("none", "mean", "sum"):
        attributes = {"reduction": reduction, "ignore_index": 2}
        yield Case("NegativeLogLikelihoodLoss", [normal(3, 4, 5), labels, weights], attributes, first=12)
        yield Case("SoftmaxCrossEntropyLoss", [normal(3, 4, 5), labels, weights], attributes, first=12)
    rotary = [normal(2, 4, 3, 8), normal(5, 4), normal(5, 4), whole(0, 5, 2, 3)]
    yield Case("RotaryEmbedding", rotary, {"interleaved": 1}, first=23)
    yield Case("Attention", [normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8)], {"is_causal": 1}, first=23)
    query, keys, values = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 6)
    for mask in (normal(3, 5), normal(2, 1, 3, 5), whole(0, 2, 3, 5, dtype=bool) | np.eye(3, 5, dtype=bool)):
        yield Case("Attention", [query, keys, values, mask], {"scale": 0.4}, first=23)
    yield Case("Attention", [query, keys, values, normal(3, 5)], {"softcap": 2.5, "is_causal": 1}, first=23)
    flat = [normal(2, 3, 24), normal(2, 5, 12), normal(2, 5, 18)]
    yield Case("Attention", flat, {"q_num_heads": 6, "kv_num_heads": 3}, first=23)
    before = [query, keys, values, None, normal(2, 2, 4, 8), normal(2, 2, 4, 6)]
    yield Case("Attention", before, first=23, outputs=3)
    yield Case("Attention", before, {"qk_matmul_output_mode": 0}, first=23, outputs=4)
    for mode in (1, 2, 3):  # 0 is refused beside softcap
        parts = {"qk_matmul_output_mode": mode, "softcap": 1.5}
        yield Case("Attention", [*before[:3], normal(3, 9), *before[4:]], parts, first=23, outputs=4)
    yield Case("TensorScatter", [normal(2, 4, 5), normal(2, 1, 5), ints(1, 3)], {"axis": 1}, first=24)


def contributed() -> Iterator[Case]:
    """Operators of onnxruntime's own domain."""

    def own(op: str, inputs: list[Any], attributes: dict[str, Any] | None = None, **more: Any) -> Case:
        return Case(op, inputs, attributes or {}, domain="com.microsoft", **more)

    yield own("Gelu", [normal(3, 8)])
    yield own("BiasGelu", [normal(3, 8), normal(8)])
    yield own("FastGelu", [normal(3, 8), normal(8)])
    yield own("QuickGelu", [normal(3, 8)], {"alpha": 1.5})
    x, weight, bias = normal(2, 4, 6, 6), normal(6, 2, 3, 3), normal(6)
    for activation, parameters in (("Relu", []), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.8]), ("Tanh", [])):
        attributes = {"group": 2, "activation": activation, "pads": [1, 1, 1, 1]}
        attributes |= {"activation_params": parameters} if parameters else {}
        yield own("FusedConv", [x, weight, bias], attributes)
    yield own("FusedConv", [x, weight, bias, normal(2, 6, 4, 4)], {"group": 2, "activation": "Relu"})
    leaky = {"transB": 1, "alpha": 0.7, "activation": "LeakyRelu", "activation_alpha": 0.3}
    yield own("FusedGemm", [normal(3, 4), normal(5, 4), normal(5)], leaky)
    yield own("FusedMatMul", [normal(2, 4, 3), normal(2, 5, 4)], {"transA": 1, "transB": 1, "alpha": 0.3})
    for flags in ({"transBatchA": 1}, {"transBatchB": 1}, {"transBatchA": 1, "transBatchB": 1}):
        for transposed in (0, 1):
            yield own("FusedMatMul", [normal(4, 4, 4), normal(4, 4, 4)], {**flags, "transA": transposed})
    rows = [normal(2, 3, 8), normal(2, 3, 8), positive(8)]
    yield own("SkipLayerNormalization", [*rows, normal(8), normal(8)], {"epsilon": 1e-3})
    yield Case("SimplifiedLayerNormalization", [rows[0], rows[2]], {"axis": -1, "epsilon": 1e-3}, first=17)
    yield own("SkipSimplifiedLayerNormalization", [*rows, normal(8)], {"epsilon": 1e-3})
    scale, zero = np.array(0.05, np.float32), np.array(120, np.uint8)
    yield own("QuantizeLinear", [3 * normal(4, 5), scale, zero], steps=1)
    yield own("DequantizeLinear", [whole(0, 255, 4, 5, dtype=np.uint8), scale, zero])
    pixels = [whole(0, 255, 2, 3, 6, 6, dtype=np.uint8), scale, zero]
    result = [np.array(0.07, np.float32), np.array(99, np.uint8)]
    yield own("QLinearAdd", [*pixels, whole(0, 255, 3, 1, 1, dtype=np.uint8), scale, zero, *result], steps=1)
    yield own("QLinearMul", [*pixels, whole(0, 255, 3, 1, 1, dtype=np.uint8), scale, zero, *result], steps=1)
    yield own("QLinearSigmoid", [*pixels, np.array(0.004, np.float32), np.array(3, np.uint8)], steps=1)
    yield own("QLinearLeakyRelu", [*pixels, *result], {"alpha": 0.2}, steps=1)
    yield own("QLinearAveragePool", [*pixels, *result], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, steps=1)
    yield own("QLinearGlobalAveragePool", [*pixels, *result], steps=1)
    yield own("QLinearConcat", [*result, *pixels, pixels[0][:, :2], scale, zero], {"axis": 1}, steps=1)
    left, right = whole(0, 255, 3, 4, dtype=np.uint8), whole(-60, 60, 5, 4, dtype=np.int8)
    matrices = [left, scale, zero, right, positive(5) / 100, whole(-3, 3, 5, dtype=np.int8)]
    gemm = {"transB": 1, "alpha": 0.9}
    yield own("QGemm", [*matrices, whole(-99, 99, 5, dtype=np.int32), *result], gemm, steps=1)
    yield own("QGemm", [*matrices, whole(-99, 99, 5, dtype=np.int32)], gemm)
    for offset in (None, matrices[5]):
        inputs = [normal(3, 4), right.T.copy(), positive(5), offset, normal(5)]
        yield own("DynamicQuantizeMatMul", inputs, units=2**18)  # a step may flip
    yield own("MatMulIntegerToFloat", [left, right.T.copy(), scale, positive(5), zero, matrices[5], normal(5)])


def contributed_attention() -> Iterator[Case]:
    """Attention in onnxruntime's own domain, with every kind of mask that its CPU kernel takes."""

    def own(op: str, inputs: list[Any], attributes: dict[str, Any], outputs: int = 1) -> Case:
        return Case(op, inputs, attributes, domain="com.microsoft", outputs=outputs)

    def seen(*shape: int) -> Any:
        mask = whole(0, 2, *shape, dtype=np.int32)
        mask[..., 0] = 1
        return mask

    x, weights, bias, past = normal(2, 5, 8), normal(8, 36), normal(36), normal(2, 2, 3, 4, 4)
    attention, heads = [x, weights, bias], {"num_heads": 3}
    ends, starts = whole(3, 6, 2, dtype=np.int32), whole(0, 2, 2, dtype=np.int32)
    for mask in (ends, np.concatenate((ends, starts)), seen(2, 5), seen(2, 5, 5)):
        for causal in (0, 1):
            yield own("Attention", [*attention, mask], {**heads, "unidirectional": causal})
    yield own("Attention", [*attention, seen(2, 5)], {**heads, "mask_filter_value": -1.5, "scale": 0.3})
    yield own("Attention", [*attention, None, None, normal(2, 3, 5, 5)], heads)
    yield own("Attention", [x, weights, bias, seen(2, 9), past], {**heads, "unidirectional": 1}, outputs=2)
    yield own("Attention", [x, normal(8, 30), normal(30)], {"num_heads": 3, "qkv_hidden_sizes": [12, 12, 6]})
    query, key, value, bias = normal(2, 5, 12), normal(2, 7, 12), normal(2, 7, 6), normal(30)
    for mask in (None, whole(3, 8, 2, dtype=np.int32), seen(2, 7), seen(2, 5, 7)):
        yield own("MultiHeadAttention", [query, key, value, bias, mask], heads)
        yield own("MultiHeadAttention", [query, key, value, None, mask, normal(1, 3, 5, 7)], {**heads, "scale": 0.7})
    yield own(
        "MultiHeadAttention", [normal(2, 5, 12), normal(2, 5, 12), normal(2, 5, 12)], {**heads, "unidirectional": 1}
    )
    yield own("MultiHeadAttention", [query, normal(2, 3, 7, 4), normal(2, 3, 7, 4), normal(36)], heads)
    before = [query, normal(2, 5, 12), normal(2, 5, 12), None, None, None, normal(2, 3, 4, 4), normal(2, 3, 4, 4)]
    yield own("MultiHeadAttention", before, heads, outputs=3)
    tables = [normal(9, 2), normal(9, 2)]
    for interleaved in (0, 1):
        for positions in (ints(3), whole(0, 9, 2, 5)):
            attributes = {"interleaved": interleaved}
            yield own("RotaryEmbedding", [normal(2, 5, 12), positions, *tables], attributes)
            yield own("RotaryEmbedding", [normal(2, 3, 5, 4), positions, *tables], attributes)
    part = {"rotary_embedding_dim": 4, "num_heads": 3}
    yield own("RotaryEmbedding", [normal(2, 5, 18), whole(0, 9, 2, 5), *tables], part)
    words, kinds = (whole(0, 6, 2, 5, dtype=np.int32) for _ in range(2))
    scale = [positive(8), normal(8)]
    embedded = [words, kinds, normal(6, 8), normal(7, 8), normal(6, 8), *scale]
    yield own("EmbedLayerNormalization", [*embedded, seen(2, 5)], {"epsilon": 1e-3}, outputs=3)
    yield own("EmbedLayerNormalization", [*embedded, None, whole(0, 7, 2, 5, dtype=np.int32)], {}, outputs=2)
    yield own("EmbedLayerNormalization", [words, None, normal(6, 8), normal(7, 8), None, *scale], {}, outputs=2)


def _boxes(batch: int, count: int) -> tuple[Any, Any]:
    """Lower corners and sizes of random boxes."""
    return 4 * unit(batch, count, 2), 2 * positive(batch, count, 2)


def left_out() -> Iterator[Case]:
    """Calls that leave out what others of their kind say, and ranks, sizes and ties that are rare."""
    yield Case("Split", [normal(4, 3)], first=6, last=17, outputs=2)
    yield Case("Split", [normal(5, 3)], {"num_outputs": 2}, first=18, outputs=2)
    yield Case("Gather", [normal(4, 3), ints(2, 0)], first=6)
    yield Case("GatherElements", [normal(4, 3), whole(-4, 4, 2, 3)], first=11)
    yield Case("ScatterElements", [normal(3, 4), whole(-3, 3, 1, 4), normal(1, 4)], first=11)
    yield Case("OneHot", [whole(-3, 4, 2, 3), ints(4), floats(0.5, 2.0)], first=9)
    yield Case("ReverseSequence", [normal(4, 3, 2), ints(1, 4, 3)], first=10)
    yield Case("QuantizeLinear", [3 * normal(2, 3, 6), np.array(0.05, np.float32)], first=10, steps=1)
    for low, high in ((0.5, 2.0), (-2.0, -0.5)):
        yield Case("DynamicQuantizeLinear", [floats(low, 1.2 * low, high)], first=11, outputs=3, steps=1)
    image = normal(1, 2, 5, 6)
    for transform in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"):
        attributes = {"mode": "linear", "coordinate_transformation_mode": transform}
        yield Case("Resize", [image, None, None, ints(1, 2, 1, 1)], attributes, first=13)
    crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    roi = floats(0, 0, 0.1, 0.2, 1, 1, 0.7, 0.9)
    yield Case("Resize", [image, roi, None, ints(1, 2, 1, 1)], crop, first=13)
    ties = whole(0, 3, 2, 3, 9, 8).astype(np.float32)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    yield Case("MaxPool", [ties], window, first=8, outputs=2)
    pair = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}
    yield Case("MaxUnpool", [normal(1, 1, 2, 2), ints(0, 2, 4, 7).reshape(1, 1, 2, 2)], pair, first=9)
    yield Case("GlobalLpPool", [normal(2, 3, 5)], {"p": 3}, first=6)
    corner, size = _boxes(2, 30)
    turned = np.concatenate([corner + size, corner], -1)
    yield Case("NonMaxSuppression", [turned, positive(2, 3, 30), ints(4), floats(0.3)], first=10)
    sequence = [3 * normal(5, 2, 3), normal(1, 4, 3), normal(1, 4, 4), normal(1, 8)]
    for name, alpha, beta in (("Relu", [], []), ("Softplus", [], []), ("Affine", [0.7], [0.2])):
        attributes = {"hidden_size": 4, "activations": [name], "activation_alpha": alpha, "activation_beta": beta}
        yield Case("RNN", sequence, {k: v for k, v in attributes.items() if v}, outputs=2)
    x, weight, bias = normal(2, 4, 6, 6), normal(6, 4, 3, 3), normal(6)
    for activation, parameters in (("HardSigmoid", [0.3, 0.4]), ("Sigmoid", [])):
        attributes = {"activation": activation} | ({"activation_params": parameters} if parameters else {})
        yield Case("FusedConv", [x, weight, bias], attributes, domain="com.microsoft")
    yield Case("FusedMatMul", [normal(4, 3), normal(5, 4)], {"transA": 1, "transB": 1}, domain="com.microsoft")


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    shaping,
    reduction,
    resizing,
    quantization,
    detection,
    contributed,
    contributed_attention,
    left_out,
)
"""Generators of cases."""
