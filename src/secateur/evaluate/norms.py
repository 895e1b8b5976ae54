"""Norms that wake pruned channels: a channel that is zero before a norm need not be zero after it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU)
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_PASSES = {operator.getitem, torch.relu, torch.flatten, nn.functional.relu, nn.functional.dropout, nn.functional.gelu}


def firing_norms(model: nn.Module, gone: Mapping[str, Tensor]) -> list[str]:
    """Warnings about norms that turn pruned output channels into something other than zero.

    Args:
        model: the pruned module.
        gone: for each pruned layer, by module name, which of its output channels are zero (bool).

    Returns:
        One text for each such norm; one text if the model cannot be traced and holds norms at all.
    """
    if not any(isinstance(m, (_BatchNorm, *_MIXING)) for m in model.modules()):
        return []
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # tracing runs the user's code symbolically: anything can come out of it
        return [
            "whether norms after the pruned channels still make them fire is not known, since the model cannot be traced; "
            "a norm's bias in a pruned channel should be zero too"
        ]
    modules = dict(model.named_modules())
    out = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in gone and bool(gone[node.target].any()):
            for norm in _norms_after(node, modules):
                out += _fires(str(norm), modules[norm], node.target, gone[node.target])
    return out


def _norms_after(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of norms that get a layer's output, through modules and functions that keep a zero channel zero."""
    for user in node.users:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, (_BatchNorm, *_MIXING)):
            yield str(user.target)
        elif isinstance(module, _TRANSPARENT) or (user.op == "call_function" and user.target in _PASSES):
            yield from _norms_after(user, modules)


def _fires(name: str, norm: nn.Module, layer: str, gone: Tensor) -> list[str]:
    if isinstance(norm, _BatchNorm):
        if norm.running_mean is None or norm.num_features != gone.numel():
            return []
        assert norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale = norm.weight.double() if norm.weight is not None else torch.ones_like(mean)
        shift = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
        after = shift - mean * scale / torch.sqrt(variance + norm.eps)
        loud = (after != 0) & gone.to(after.device)
        if not bool(loud.any()):
            return []
        return [
            f"{name!r} ({type(norm).__name__}) makes {int(loud.sum())} of the {int(gone.sum())} pruned channels of {layer!r} "
            f"fire with up to {float(after[loud].abs().max()):.3g}: set its bias and running mean to zero there, or "
            f"call recalibrate_batchnorm and set the bias to zero"
        ]
    bias = getattr(norm, "bias", None)
    mixes = not isinstance(norm, nn.RMSNorm) or bias is not None
    if not mixes:
        return []
    return [
        f"{name!r} ({type(norm).__name__}) normalises across channels, so the {int(gone.sum())} pruned channels of {layer!r} "
        "come out as something other than zero"
    ]
