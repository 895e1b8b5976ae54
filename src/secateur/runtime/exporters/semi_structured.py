"""2:4 on a GPU: weights of linear layers in torch's semi-structured layout, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.keys import nonzero
from secateur.errors import BadInput, NotDefined
from secateur.stores import names
from secateur.stores.base import choose
from secateur.stores.memory import MemoryStore

from .running import Call, at_rest, first_line, outputs, tolerance_of, verify
from .target import Written

FORMAT = "semi-structured"
DTYPES = (torch.float16, torch.bfloat16)
NOTES = (
    "The converted weights take less memory on the GPU, and can no longer be trained, pruned or saved as dense ones.",
    "Whether they are faster depends on the GPU and on the number of rows, and was not measured here: time both.",
)


def convert(model: Any, store: MemoryStore, example: Any, include: str | Sequence[str] | None) -> Written:
    """Puts the weights of linear layers that hold 2:4 into torch's layout, in place, and runs the model with them.

    Args:
        model: on a GPU. Afterwards it is for inference.
        store: its tensors.
        example: what the model is called with.
        include: globs of the layers that must be converted; ``None``: all that can be.

    Raises:
        BadInput: no GPU, or no layer that can be converted.
        NotDefined: a layer that ``include`` asks for cannot be converted.
        SecateurError: the model gives other outputs than before. All weights are as they were, whatever is raised.
    """
    call = Call.of(example, FORMAT)
    if not isinstance(model, nn.Module):
        raise BadInput(f"{FORMAT} changes an nn.Module in place; got a {type(model).__name__}.")
    chosen = [s for s in choose(store.specs(), include) if s.skip is None]
    if not torch.cuda.is_available():
        raise BadInput(f"{FORMAT} is a layout of tensors on a CUDA GPU, and torch finds none here.")
    owners, packed, left = _owners(model), {}, {}
    for spec in chosen:
        layer = owners.get(spec.name)
        why = "it is no plain nn.Linear's, or tied to another" if layer is None else why_not(layer.weight)
        made = _packed(layer.weight) if layer is not None and why is None else why
        if isinstance(made, Tensor):
            packed[spec.name] = made
        elif include is not None:
            raise NotDefined(f"{spec} cannot be {FORMAT}: {made}.")
        else:
            left[spec.name] = made
    if not packed:
        shown = "; ".join(f"{n!r}: {reason}" for n, reason in list(left.items())[:4])
        raise BadInput(f"no layer of the model can be {FORMAT}: {shown}.")
    return _replaced(model, call, {n: owners[n] for n in packed}, packed, left)


def why_not(weight: Tensor) -> str | None:
    """What keeps a weight ``(out, in)`` from the layout: its place, dtype or pattern; ``None`` if nothing does.

    Example:
        >>> why_not(torch.ones(32, 64))
        'it is on cpu: move the model to the GPU first'
    """
    if not weight.is_cuda:
        return f"it is on {weight.device}: move the model to the GPU first"
    if weight.dtype not in DTYPES:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, and the layout is for float16 and bfloat16"
    return broken(weight)


def broken(weight: Tensor) -> str | None:
    """What keeps a weight ``(out, in)`` from being 2:4; ``None`` if it is.

    Example:
        >>> broken(torch.tensor([[1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 5.0, 0.0]]))
        '1 of its 2 groups of 4 have more than 2 weights that are not zero: prune it with pattern="2:4"'
    """
    if weight.shape[1] % 4:
        return f"its {weight.shape[1]} inputs are no whole groups of 4"
    groups = nonzero(weight).reshape(-1, 4).sum(1)
    wrong = int((groups > 2).sum())
    if wrong:
        return (
            f"{wrong} of its {len(groups)} groups of 4 have more than 2 weights that are not zero: "
            'prune it with pattern="2:4"'
        )
    return None


def _owners(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by the name of their weight, where that is theirs alone."""
    modules = names.walk(model).modules
    held = Counter(id(p) for m in dict.fromkeys(modules.values()) for p in m._parameters.values() if p is not None)
    return {
        f"{name}.weight" if name else "weight": m
        for name, m in modules.items()
        if type(m) is nn.Linear and held[id(m.weight)] == 1
    }


def _packed(weight: Tensor) -> Tensor | str:
    """A weight in torch's layout, or why torch refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the layout is a prototype
            return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
    except (RuntimeError, ValueError) as e:  # its rules for shapes, which differ by library
        return first_line(e)


def _replaced(
    model: nn.Module,
    call: Call,
    owners: Mapping[str, nn.Linear],
    packed: Mapping[str, Tensor],
    left: Mapping[str, str | None],
) -> Written:
    before = {n: m.weight for n, m in owners.items()}
    zeros = sum(int((~nonzero(w)).sum()) for w in before.values())
    with at_rest(model):
        wanted = outputs(model, call)
        tolerance = tolerance_of(model)
        try:
            for name, t in packed.items():
                owners[name].weight = nn.Parameter(t, requires_grad=False)
            worst = verify(lambda _: wanted, lambda _: outputs(model, call), [("the example inputs", call)], tolerance)
        except BaseException:
            for name, w in before.items():
                owners[name].weight = w
            raise
    size = sum(_bytes(t) for t in packed.values())
    facts = {
        "layers": list(packed),
        "left": dict(left),
        "dense_bytes": sum(w.nbytes for w in before.values()),
        "difference": worst,
    }
    return Written(size, zeros, sum(w.numel() for w in before.values()), facts, NOTES)


def _bytes(t: Any) -> int:
    """What the parts of a tensor in torch's layout take."""
    return sum(getattr(t, name).nbytes for name in t.__tensor_flatten__()[0])
