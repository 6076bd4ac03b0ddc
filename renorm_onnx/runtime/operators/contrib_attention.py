"""Attention and what surrounds it in ``com.microsoft``, as onnxruntime's tools for transformers write it into files.

Source: onnxruntime, docs/ContribOperators.md, and for masks its CPU kernel (contrib_ops/cpu/bert/attention_helper.h).
Letters in shapes: B batch, S queries, L new keys, P past keys, T = P + L all keys, N heads, H size of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from renorm_onnx.runtime.operators import normalization
from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError


def _heads(x: Array, count: int) -> Array:
    """(B, S, N * H) -> (B, N, S, H)."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def _mask(mask: Array | None, batch: int, total: int, masked: float) -> Array:
    """What is added to the scores: `masked` where a key is hidden; broadcasts to (B, N, S, T).

    Args:
        mask: 1 for each key to see, (B, T) or (B, S, T); or where the keys to see end, (B,), and start, then (2 B,).
        batch: B.
        total: T.
        masked: Added to the score of a hidden key.
    """
    if mask is None:
        return np.zeros((1, 1, 1, 1))
    if mask.ndim == 1 and mask.size in (batch, 2 * batch):
        keys = np.arange(total)
        seen = keys < mask[:batch, None]
        seen &= keys >= (mask[batch:, None] if mask.size > batch else 0)
        mask = seen.astype(np.int32)
    if mask.ndim not in (2, 3):
        raise UnusableError(f"a mask of shape {mask.shape} is not covered")
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    return np.where(mask > 0, 0.0, masked)


def _attend(call: Call, query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None) -> Array:
    """softmax(scale q k' + mask + bias) v, from (B, N, S or T, H) to (B, S, N * H)."""
    scale = call.number("scale", 0.0) or 1 / math.sqrt(query.shape[-1])
    queries, total = query.shape[2], key.shape[2]
    scores = scale * np.matmul(query, key.swapaxes(-1, -2))
    scores = scores + _mask(mask, len(query), total, call.number("mask_filter_value", -10000.0))
    if call.integer("unidirectional", 0):
        later = np.arange(total) > np.arange(queries)[:, None] + total - queries
        scores = np.where(later, -np.inf, scores)
    scores = scores if bias is None else scores + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result = np.matmul(weights / weights.sum(axis=-1, keepdims=True), value)
    return np.asarray(result.swapaxes(1, 2).reshape(len(query), queries, -1))


def _attention(call: Call) -> Result:
    """Queries, keys and values are one product of the input; the past is (2, B, N, P, H)."""
    if call.input(6) is not None or call.integer("do_rotary", 0) or call.integer("past_present_share_buffer", 0):
        raise UnusableError("do_rotary and a past that shares its buffer are not covered")
    x, weights, bias = call.inputs[0], call.inputs[1], call.input(2)
    sizes = call.integers("qkv_hidden_sizes") or (weights.shape[1] // 3,) * 3
    projected = np.matmul(x, weights) + (0.0 if bias is None else bias)
    parts = np.split(projected, (sizes[0], sizes[0] + sizes[1]), axis=-1)
    query, key, value = (_heads(part, call.integer("num_heads", 1)) for part in parts)
    if call.input(4) is not None:
        key, value = (np.concatenate(pair, axis=2) for pair in zip(call.inputs[4], (key, value), strict=True))
    result = _attend(call, query, key, value, call.input(3), call.input(5))
    return (result, np.stack((key, value))) if call.wants(1) else result


def _multi_head_attention(call: Call) -> Result:
    """Queries, keys and values are given apart, the latter as (B, L, N * H) or as heads already."""
    if any(call.input(index) is not None for index in (8, 9)):
        raise UnusableError("a past that shares its buffer, and beams, are not covered")
    query, key, value, bias = call.inputs[0], call.input(1), call.input(2), call.input(3)
    count = call.integer("num_heads", 1)
    if key is None or value is None or 5 in (query.ndim, key.ndim):
        raise UnusableError("packed keys and values are not covered")
    width = query.shape[-1]
    parts = (0.0, 0.0, 0.0) if bias is None else (bias[:width], bias[width : 2 * width], bias[2 * width :])
    query = _heads(query + parts[0], count)
    key = key if key.ndim == 4 else _heads(key + parts[1], count)
    value = value if value.ndim == 4 else _heads(value + parts[2], count)
    if call.input(6) is not None:
        key, value = np.concatenate((call.inputs[6], key), axis=2), np.concatenate((call.inputs[7], value), axis=2)
    result = _attend(call, query, key, value, call.input(4), call.input(5))
    return (result, key, value)[: len(call.outputs)] if call.wants(1) else result


def _rotary_embedding(call: Call) -> Result:
    """Turns pairs of elements by angles whose sines and cosines are given for each position."""
    if call.integer("is_packed_batching", 0) or call.number("scale", 1.0) != 1:
        raise UnusableError("is_packed_batching and a scale are not covered")
    x, positions, cosines, sines = call.inputs
    half = cosines.shape[1]
    by_heads = x.ndim == 4  # (B, N, S, H)
    count = call.integer("num_heads", 0) or x.shape[-1] // (2 * half)
    rows = x if by_heads else _heads(x, count)
    if positions.size == 1:
        positions = positions.reshape(()) + np.arange(rows.shape[2])[None]
    cosine, sine = cosines[positions][:, None], sines[positions][:, None]
    turned, rest = rows[..., : 2 * half], rows[..., 2 * half :]
    if call.integer("interleaved", 0):
        real, imaginary = turned[..., ::2], turned[..., 1::2]
    else:
        real, imaginary = turned[..., :half], turned[..., half:]
    pair = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    joined = np.stack(pair, axis=-1 if call.integer("interleaved", 0) else -2).reshape(turned.shape)
    result = np.concatenate((joined, rest), axis=-1)
    return result if by_heads else result.swapaxes(1, 2).reshape(x.shape)


def _embed_layer_normalization(call: Call) -> Result:
    """Embeddings of words, positions and segments, summed and normalized; and how many words the mask shows."""
    words, segments, word_table, position_table, segment_table, gamma, beta, mask, positions = (
        call.input(index) for index in range(9)
    )
    total = word_table[words] + position_table[np.arange(words.shape[1])[None] if positions is None else positions]
    total = total if segments is None else total + segment_table[segments]
    attributes = {"axis": -1, "epsilon": call.number("epsilon", 1e-12)}
    inner = replace(call, inputs=(total, gamma, beta), outputs=("y",), attributes=attributes)
    shown = np.zeros(len(words), np.int32) if mask is None else mask.sum(axis=1, dtype=np.int32)
    return normalization.OPERATORS["LayerNormalization"](inner), shown, total


OPERATORS: Mapping[str, Kernel] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    "RotaryEmbedding": _rotary_embedding,
    "EmbedLayerNormalization": _embed_layer_normalization,
}
"""Operators of ``com.microsoft`` by name."""
