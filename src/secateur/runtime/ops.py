"""The operators that packed modules run: `torch.ops.secateur.packed_linear` and `packed_weight`.

They are operators of torch, so that ``torch.compile``, ``torch.export`` and everything that watches operators know them by
name. A model that was exported with them needs ``import secateur`` before ``torch.export.load``.

Gradients are refused where they are asked for, in the forward pass, compiled or not: there are none for what is packed, and
an optimizer would have nothing to write to. No kernel is registered for autograd, since it would cost more than the rest of a
call: the kernels themselves look at ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secateur.core.expand import expanded
from secateur.core.lay_out import restored
from secateur.core.layouts import DTYPES, LAYOUTS, PAD
from secateur.core.products import product
from secateur.errors import BadInput, NotDefined

from .grid import named
from .table import route

INFERENCE_ONLY = (
    "Packed layers are for inference and have no gradients. Run the model under torch.inference_mode() or torch.no_grad(); to "
    "train it, take its weights back with secateur.unpack(model)."
)

_LIBRARY = torch.library.Library("secateur", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] parts, Tensor? bias, str layout, int columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define("packed_weight(Tensor[] parts, str layout, int columns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _linear(x: Tensor, parts: Any, bias: Tensor | None, layout: Any, columns: int) -> Tensor:
    """``x @ weight.T + bias`` along the last dim of ``x``."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        _refuse_gradients(x, bias)
    where, values, starts = parts
    shape, rows, count = x.shape, starts.shape[0] - 1, values.shape[0]
    if x.dtype is not values.dtype or not shape or shape[-1] != columns:
        _refuse_input(x, values, columns)
    if where.shape != _where_shape(layout, rows, columns, count):
        _refuse_parts(parts, layout, columns)
    if bias is not None and (bias.dtype is not values.dtype or bias.shape != (rows,)):
        _refuse_bias(bias, values, rows)
    flat = x if len(shape) == 2 else x.reshape(-1, columns)
    way = route(layout, flat.shape[0], (count - PAD) / max(1, rows * columns), rows, columns, x.dtype)
    out = (product if way == "kernel" else expanded)(flat.contiguous(), (where, values, starts), layout, columns, bias)
    return out if len(shape) == 2 else out.view(*shape[:-1], rows)


def _linear_shape(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        _refuse_gradients(x, bias)
    _, values, starts = parts
    if x.device != values.device:
        raise BadInput(
            f"the packed weight is on {values.device}, and the input on {x.device}: packed layers run on the CPU."
        )
    if x.dtype != values.dtype or x.dim() == 0 or x.shape[-1] != columns:
        _refuse_input(x, values, columns)
    return x.new_empty((*x.shape[:-1], starts.shape[0] - 1))


def _weight(parts: Any, layout: Any, columns: int) -> Tensor:
    """The weight ``(out, in)`` itself."""
    where, values, starts = parts
    rows = starts.shape[0] - 1
    if where.shape != _where_shape(layout, rows, columns, values.shape[0]):
        _refuse_parts(parts, layout, columns)
    return restored((where, values, starts), layout, columns)


def _where_shape(layout: object, rows: int, columns: int, count: int) -> tuple[int, ...] | None:
    """The shape of a layout's first part; none of what is no layout."""
    return (count,) if layout == "csr" else (rows, (columns + 63) // 64 * 8) if layout == "bitmask" else None


def _weight_shape(parts: list[Tensor], layout: str, columns: int) -> Tensor:
    return parts[1].new_empty((parts[2].shape[0] - 1, columns))


def _refuse_gradients(x: Tensor, bias: Tensor | None) -> None:
    asked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if asked or forward_ad._current_level >= 0:
        raise NotDefined(INFERENCE_ONLY)


def _refuse_input(x: Tensor, values: Tensor, columns: int) -> NoReturn:
    if x.dtype != values.dtype:
        raise BadInput(
            f"the packed weight is {named(values.dtype)}, and the input {named(x.dtype)} of shape {tuple(x.shape)}: convert "
            f"one of them, input.to({values.dtype}) or model.to({x.dtype})."
        )
    raise BadInput(f"the packed weight takes {columns} features in the last dim; the input is {tuple(x.shape)}.")


def _refuse_parts(parts: Sequence[Tensor], layout: object, columns: int) -> NoReturn:
    shapes = ", ".join(str(tuple(p.shape)) for p in parts)
    raise BadInput(
        f"parts of shapes {shapes} are no {layout} of {columns} columns; layouts are {' and '.join(LAYOUTS)}: see "
        "secateur.core.layouts."
    )


def _refuse_bias(bias: Tensor, values: Tensor, rows: int) -> NoReturn:
    raise BadInput(
        f"the packed weight has {rows} rows of {named(values.dtype)}; the bias is {tuple(bias.shape)} of {named(bias.dtype)}."
    )


def _elsewhere(*args: Any) -> NoReturn:
    raise BadInput(
        "packed layers run on the CPU, and the input or the packed weight is elsewhere: move it with .cpu()."
    )


def _transformed(*args: Any) -> NoReturn:
    raise NotDefined(f"packed layers do not run inside transforms of torch.func (grad, vmap, jvp, …). {INFERENCE_ONLY}")


def _autocast(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    """What a linear layer gives under ``torch.autocast``; the product itself has the precision of the weight."""
    lower = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        out = packed_linear(x.to(parts[1].dtype) if x.dtype in DTYPES else x, parts, bias, layout, columns)
    return out.to(lower)


def _nested(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    """Sequences of several lengths, as ``nn.TransformerEncoder`` makes of a padded batch."""
    return torch.nested.as_nested_tensor([packed_linear(t, parts, bias, layout, columns) for t in x.unbind()])


def _register(name: str, kernel: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _LIBRARY.impl(name, _elsewhere, "CompositeExplicitAutograd")
    # Below this key a transform's tensors are plain ones, and its gradients would be zero without a word.
    _LIBRARY.impl(name, _transformed, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"secateur::{name}", shape, lib=_LIBRARY)
    return cast(Callable[..., Tensor], getattr(torch.ops.secateur, name).default)


packed_linear = _register("packed_linear", _linear, _linear_shape)
"""``(x, parts, bias, layout, columns) -> x @ weight.T + bias``; ``x`` of any rank and strides."""
_LIBRARY.impl("packed_linear", _autocast, "AutocastCPU")
_LIBRARY.impl("packed_linear", _nested, "NestedTensorCPU")

packed_weight = _register("packed_weight", _weight, _weight_shape)
"""``(parts, layout, columns) -> weight``."""
