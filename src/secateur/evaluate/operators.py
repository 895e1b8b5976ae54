"""Operators that torch's counter does not see: their multiply-adds, taken apart by the weight they use.

Every formula gets the operator's own arguments and returns ``[(flops, weight), …]``; ``weight`` is ``None``
where two activations are multiplied (attention scores). Products with weights are ``2 · rows ·
weight.numel()``: every weight meets every row once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Pieces = list[tuple[int, Tensor | None]]


def _rows(x: Tensor) -> int:
    """How many vectors ``x`` holds in its last dim, over all sequences of a nested tensor too."""
    return sum(_lengths(x)) if x.is_nested else prod(x.shape[:-1])


def _lengths(x: Tensor) -> list[int]:
    """Length of every sequence of a batch ``(batch, length, width)``."""
    if x.is_nested:
        return [t.shape[0] for t in x.unbind()]
    return [x.shape[1]] * x.shape[0]


def _scores(q: Tensor, k: Tensor, width: int) -> int:
    """Scores ``q kᵀ`` and their product with the values, over all heads, together ``width`` wide."""
    return sum(2 * 2 * a * b * width for a, b in zip(_lengths(q), _lengths(k), strict=True))


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv: Tensor, qkv_bias: Tensor, proj: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm1: Tensor, norm1_bias: Tensor,
    norm2: Tensor, norm2_bias: Tensor, ffn1: Tensor, ffn1_bias: Tensor, ffn2: Tensor,
    *rest: Any, **kwargs: Any,
) -> Pieces:  # fmt: skip
    rows = _rows(src)
    attention: Pieces = [(2 * rows * qkv.numel(), qkv), (_scores(src, src, embed_dim), None)]
    return attention + [(2 * rows * w.numel(), w) for w in (proj, ffn1, ffn2)]


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, qkv: Tensor, qkv_bias: Tensor,
    proj: Tensor, *rest: Any, **kwargs: Any,
) -> Pieces:  # fmt: skip
    rows = _rows(query) + _rows(key) + _rows(value)
    return [
        (2 * rows * qkv.numel() // 3, qkv),
        (_scores(query, key, embed_dim), None),
        (2 * _rows(query) * proj.numel(), proj),
    ]


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Pieces:
    """``softmax(q kᵀ) v`` on ``(batch, heads, length, width)``; masks save nothing, as torch counts too."""
    batch_heads_queries = prod(query.shape[:-1])
    return [(2 * batch_heads_queries * key.shape[-2] * (query.shape[-1] + value.shape[-1]), None)]


def _recurrent_layer(x: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any, **kwargs: Any) -> Pieces:
    return [(2 * _rows(x) * w.numel(), w) for w in (w_ih, w_hh)]


def _recurrent(x: Tensor, weight: Sequence[Tensor], *rest: Any, **kwargs: Any) -> Pieces:
    """All layers and directions; the rows of ``x``, packed or padded, are the steps of all sequences."""
    return [(2 * _rows(x) * w.numel(), w) for w in weight if w.dim() > 1]


def _recurrent_mps(x: Tensor, hx: Sequence[Tensor], weight: Sequence[Tensor], *rest: Any, **kwargs: Any) -> Pieces:
    return _recurrent(x, weight)


def _bilinear(x1: Tensor, weight: Tensor, x2: Tensor, *rest: Any, **kwargs: Any) -> Pieces:
    return [(2 * x1.shape[0] * weight.numel(), weight)]


def _matrix_vector(matrix: Tensor, vector: Tensor, **kwargs: Any) -> Pieces:
    return [(2 * matrix.numel(), matrix)]


def _added_matrix_vector(out: Tensor, matrix: Tensor, vector: Tensor, **kwargs: Any) -> Pieces:
    return _matrix_vector(matrix, vector)


def _grouped(x: Tensor, weight: Tensor, offs: Tensor | None = None, *rest: Any, **kwargs: Any) -> Pieces:
    """Rows up to ``offs[0]`` meet ``weight[0]``, those up to ``offs[1]`` ``weight[1]``, and so on."""
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        return [(2 * x.shape[-2] * weight.numel(), weight)]
    ends = offs.tolist()
    return [(2 * (b - a) * w.numel(), w) for a, b, w in zip([0, *ends], ends, weight, strict=False)]


_FORMULAS: dict[str, Callable[..., Pieces]] = {
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::_native_multi_head_attention": _native_attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    "aten::_cudnn_rnn": _recurrent,
    "aten::miopen_rnn": _recurrent,
    "aten::_lstm_mps": _recurrent_mps,
    "aten::_trilinear": _bilinear,
    "aten::mv": _matrix_vector,
    "aten::addmv": _added_matrix_vector,
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
}


def pieces(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Pieces | None:
    """What one call multiplies, by weight; ``None`` for an operator without a formula here."""
    formula = _FORMULAS.get(op._schema.name)
    return None if formula is None else formula(*args, **kwargs)
