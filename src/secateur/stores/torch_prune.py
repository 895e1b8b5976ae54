"""Models under `torch.nn.utils.prune`: where its masks are, and how to turn them into plain zeros.

`torch.nn.utils.prune` keeps a pruned tensor as three things: a parameter ``weight_orig``, a buffer
``weight_mask`` and a forward pre-hook that sets the plain attribute ``weight = weight_orig * weight_mask``
before every call. `find` lists such tensors, `bake` puts the parameter back under its name with the zeros
written into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from secateur.core.types import Spec
from secateur.errors import BadInput, BadTensor

from . import checks

ORIG, MASK = "_orig", "_mask"

# Registration order of fresh modules; recurrent layers carry theirs. Re-registered parameters would otherwise
# come last, and the order of `parameters()` is what an optimizer's state_dict goes by.
FRESH_ORDER = (
    "weight", "weight_ih", "weight_hh", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    "bias", "bias_ih", "bias_hh", "in_proj_bias", "bias_k", "bias_v",
)  # fmt: skip


def find(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Every tensor of a model that is under `torch.nn.utils.prune`.

    Args:
        model: any module; a module registered twice is listed once, by its first name.

    Returns:
        ``(module name, module, tensor name)`` of each, in the order of ``named_modules()``; empty where there
        is none. The root's name is ``""``; a tensor's name is the one it had before, such as ``"weight"``.

    Example:
        >>> from torch.nn.utils import prune
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> _ = prune.l1_unstructured(net[0], "weight", amount=0.5)
        >>> find(net)
        [('0', Linear(in_features=4, out_features=4, bias=True), 'weight')]
    """
    return [
        (name, module, hook._tensor_name)
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod)
    ]


def bake(model: nn.Module) -> list[str]:
    """Turns a model under `torch.nn.utils.prune` into plain parameters with exact zeros, in place.

    The very `Parameter` that trained as ``weight_orig`` is registered as ``weight`` again, so optimizers and
    ties go on holding it; where the mask is 0 it now holds 0.0, elsewhere its bits are untouched. Masks and
    their hooks are removed, other hooks stay, and the keys of ``state_dict()`` are those of a fresh module,
    in the same order.

    Zeros are written, not multiplied in: ``torch.nn.utils.prune.remove`` gives ``NaN * 0 = NaN`` and ``-0.0``
    there. Nothing holds the zeros afterwards: an optimizer with momentum or weight decay moves them at its
    next step.

    Args:
        model: any module with at least one tensor under `torch.nn.utils.prune`, of any pattern and dtype,
            pruned any number of times, biases and packed or recurrent weights included. A parameter shared by
            several modules is zero where any of their masks is 0 and stays shared: also in a module that used
            it whole.

    Returns:
        The names of the tensors baked, as ``state_dict()`` now has them, in the order of ``named_modules()``.

    Raises:
        BadInput: the model is not under `torch.nn.utils.prune`.
        BadTensor: a mask that is missing, of another shape than its tensor, or holds values other than 0 and
            1; a tensor that cannot be written in place. Raised before anything is touched.

    Example:
        >>> from torch.nn.utils import prune
        >>> net = nn.Linear(4, 2)
        >>> _ = prune.l1_unstructured(net, "weight", amount=0.5)
        >>> sorted(net.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
        >>> bake(net)
        ['weight']
        >>> list(net.state_dict()), int((net.weight == 0).sum())
        (['weight', 'bias'], 4)
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"from_torch_prune takes an nn.Module; got {type(model).__name__}.")
    found = find(model)
    if not found:
        raise BadInput(
            f"this {type(model).__name__} is not under torch.nn.utils.prune: none of its modules has a "
            "pruning hook, so there is nothing to bake. Its zeros, if it has any, are plain already."
        )
    masks = [_checked_mask(name, module, tensor) for name, module, tensor in found]
    with torch.no_grad():
        for (_, module, tensor), mask in zip(found, masks, strict=True):
            orig = module._parameters[tensor + ORIG]
            assert orig is not None
            orig.masked_fill_((mask == 0).to(orig.device), 0)
    for _, module, tensor in found:
        _restore(module, tensor)
    for module in {id(m): m for _, m, _ in found}.values():
        _reorder(module, [t for _, m, t in found if m is module])
    return [full_name(name, tensor) for name, _, tensor in found]


def full_name(module_name: str, tensor: str) -> str:
    """The name a tensor has in ``state_dict()``."""
    return f"{module_name}.{tensor}" if module_name else tensor


def _checked_mask(module_name: str, module: nn.Module, tensor: str) -> Tensor:
    """The mask of one tensor, or `BadTensor` if baking it would have to guess or could fail half-way."""
    name = full_name(module_name, tensor)
    orig, mask = module._parameters.get(tensor + ORIG), module._buffers.get(tensor + MASK)
    if orig is None or mask is None:
        missing = f"parameter {name + ORIG!r}" if orig is None else f"buffer {name + MASK!r}"
        raise BadTensor(
            f"{name!r} has a pruning hook of torch.nn.utils.prune but no {missing}: its state is broken. "
            "Remove the hook, or prune the tensor again."
        )
    if tensor in module._parameters:
        raise BadTensor(
            f"{name!r} is a parameter and {name + ORIG!r} another: the name was assigned again after "
            "pruning. Delete the one that is not meant."
        )
    spec = Spec(name, tuple(orig.shape), orig.dtype, role="unknown")
    reason = checks.why_not(checks.Entry(spec, orig))
    if reason is not None:
        raise BadTensor(f"cannot bake {spec}: {reason}.")
    if mask.shape != orig.shape or mask.is_meta:
        raise BadTensor(
            f"the mask of {spec} has the shape {tuple(mask.shape)} on {mask.device}; it must have the "
            "tensor's own shape, and values."
        )
    odd = mask[(mask != 0) & (mask != 1)]  # NaN is neither
    if odd.numel():
        raise BadTensor(
            f"the mask of {spec} holds {odd.numel()} values other than 0 and 1, such as {odd[0].item()}: it "
            "scales the weights, it does not only choose them. Make it 0 and 1, or multiply it into the "
            "weights yourself."
        )
    return mask


def _restore(module: nn.Module, tensor: str) -> None:
    """Gives the parameter its name back and removes mask, plain attribute and hook."""
    orig = module._parameters.pop(tensor + ORIG)
    del module._buffers[tensor + MASK]
    setattr(module, tensor, orig)  # replaces the attribute; recurrent layers update their flat weights here
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == tensor:
            del module._forward_pre_hooks[key]


def _reorder(module: nn.Module, baked: Sequence[str]) -> None:
    """Puts parameters in the order of a fresh module; in one of unknown kind, each weight before its bias."""
    order: Sequence[str] = getattr(module, "_flat_weights_names", FRESH_ORDER)
    names = list(module._parameters)
    if all(n in order for n in names):
        names.sort(key=order.index)
    else:
        for name in baked:
            bias = name.replace("weight", "bias")
            if bias != name and bias in names:
                names.remove(name)
                names.insert(names.index(bias), name)
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update((n, parameters[n]) for n in names)
