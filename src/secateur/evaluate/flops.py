"""What one forward pass multiplies, and how much of it meets a weight that is not zero."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from secateur.errors import BadInput
from secateur.stores.names import WRAPPERS

from .ledger import Ledger
from .mode import eager, only_training
from .weights import owner, prunable, weights_of

CONVENTION = (
    "2 per multiply-add, one forward pass. Counted: matrix products, convolutions, attention, recurrent and "
    "grouped products. Not counted: biases, norms, activations, softmax, embeddings. effective scales the "
    "products with a weight by its fraction of nonzeros; speedup is theoretical, not a measurement."
)


@dataclass(frozen=True)
class Flops:
    """What `count_flops` counted; every number is 2 per multiply-add.

    Attributes:
        total: FLOPs of one forward pass.
        by_module: module name to the FLOPs of that module's own operators, in model order; modules with none
            are left out. A product with a weight belongs to the module that holds the weight, any other to
            the module that ran it. The root's name is ``""``. The values add up to ``total``.
        effective: FLOPs left if no multiplication by a zero weight were done: products with a weight are
            scaled by the nonzero fraction of the weight as it was used, all others count in full.
        by_weight: name of each weight that was met, tied ones under the first name they have, to the FLOPs of its
            products: what they would be if it were wholly zero is saved. What several weights made together is
            shared out by their sizes.

    Example:
        >>> flops = Flops(total=4800, by_module={"0": 3200, "2": 1600}, effective=3200)
        >>> flops.macs, flops.speedup
        (2400, 1.5)
        >>> print(flops)
        4.80 kFLOPs = 2.40 k multiply-adds at 2 FLOPs each
        3.20 kFLOPs with nonzero weights: 1.50x speed-up in theory, not a measurement
        0     3.20 k   66.7%
        2     1.60 k   33.3%
    """

    total: int
    by_module: Mapping[str, int]
    effective: int
    by_weight: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def macs(self) -> int:
        """Multiply-adds: half of ``total``."""
        return self.total // 2

    @property
    def speedup(self) -> float:
        """``total / effective``: theoretical, not a measurement, since dense kernels multiply zeros too."""
        if self.effective == 0:
            return 1.0 if self.total == 0 else inf
        return self.total / self.effective

    def to_json(self) -> str:
        """All numbers as JSON, with the convention spelled out; an infinite speed-up is ``null``."""
        data = {
            "total": self.total,
            "macs": self.macs,
            "effective": self.effective,
            "speedup": None if self.speedup == inf else self.speedup,
            "by_module": dict(self.by_module),
            "by_weight": dict(self.by_weight),
            "convention": CONVENTION,
        }
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        rows = [(name or "(the model itself)", flops) for name, flops in self.by_module.items()]
        width = max((len(n) for n, _ in rows), default=0)
        lines = [f"{n:<{width}}  {_short(f):>9}  {f / max(self.total, 1):6.1%}" for n, f in rows]
        head = [
            f"{_short(self.total)}FLOPs = {_short(self.macs).strip()} multiply-adds at 2 FLOPs each",
            f"{_short(self.effective)}FLOPs with nonzero weights: {self.speedup:.2f}x speed-up in theory, "
            "not a measurement",
        ]
        return "\n".join(head + lines)


def count_flops(model: nn.Module, example_input: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Flops:
    """Counts the multiply-adds of one forward pass, 2 FLOPs each: all, and those that meet no zero weight.

    ``effective = Σ flops(op) · nonzero(w_op) / numel(w_op)`` over the operators that use a weight, plus all
    others; ``speedup = total / effective``. Torch's `FlopCounterMode` counts what it knows; recurrent layers,
    torch's fused encoder and attention, and grouped products of experts have formulas of our own.

    The model runs once as it is: in eval mode, without gradients, uncompiled, on its own device. Training
    flags are put back, also on an error. A module called twice counts twice; attention under a causal mask
    counts in full.

    Args:
        model: any module with weights in memory.
        example_input: what to call it with: a tensor, a tuple of positional inputs, or a mapping of keyword
            inputs, on the model's device. FLOPs are those of this very input, so choose the batch size to be
            reported.

    Returns:
        A `Flops`.

    Raises:
        BadInput: a module with prunable weights (linear, convolution, recurrent, attention, experts) that
            counted 0, since a total without it would be wrong in silence: it never ran on this input, or its
            operator is not counted. Also weights without values (meta device, lazy modules), packed layers, or an
            input of another kind.

    Example:
        >>> import torch, secateur
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:10].zero_()
        >>> flops = secateur.count_flops(net, torch.zeros(8, 10))
        >>> flops.total, flops.by_module, flops.effective, flops.macs
        (4800, {'0': 3200, '2': 1600}, 3200, 2400)
        >>> flops.speedup
        1.5

    Reference:
        Blalock et al., What is the State of Neural Network Pruning?, MLSys 2020, arXiv:2003.03033
        (theoretical speed-up). It counts multiply-adds of convolutions and linear layers only; we count
        attention and recurrence too.
    """
    from torch.utils.flop_counter import FlopCounterMode  # looks for Triton, which takes time

    args, kwargs = _call_with(example_input)
    _refuse_valueless(model)
    counter = FlopCounterMode(display=False)
    ledger = Ledger(model, counter)
    weights = prunable(model)
    with torch.no_grad(), only_training(model), _uncompiled(), counter, ledger.watching():
        model(*args, **kwargs)
    _refuse_uncounted(model, weights - ledger.counted, ledger.entered)
    by_module: dict[str, int] = {}
    for name, _ in model.named_modules():
        if ledger.flops.get(name):
            by_module[_plain(name)] = by_module.get(_plain(name), 0) + ledger.flops[name]
    return Flops(sum(ledger.flops.values()), by_module, ledger.effective, _by_weight(model, ledger))


def _plain(name: str) -> str:
    return ".".join(step for step in name.split(".") if step not in WRAPPERS)


def _by_weight(model: nn.Module, ledger: Ledger) -> dict[str, int]:
    """The FLOPs of each weight's products, in the order of the model; tied weights are one."""
    weights = weights_of(model)
    first = {id(w): n for n, w in reversed(weights.items())}
    found = dict.fromkeys(first[id(w)] for w in weights.values())
    shares: dict[str, int] = {}
    for names, flops in ledger.products.items():
        together = sorted({first[id(weights[n])] for n in names})
        left, of = flops, sum(weights[n].numel() for n in together)
        for n in together:
            share = left * weights[n].numel() // of
            left, of = left - share, of - weights[n].numel()
            shares[n] = shares.get(n, 0) + share
    return {_plain(n): shares[n] for n in found if n in shares}


def _call_with(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, PackedSequence):
        return (example_input,), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, Tensor | tuple):
        return (example_input if isinstance(example_input, tuple) else (example_input,)), {}
    raise BadInput(
        f"example_input is a {type(example_input).__name__}: give a tensor, a tuple of positional inputs, or "
        "a mapping of keyword inputs. An input of another type goes inside a tuple."
    )


def _refuse_valueless(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise BadInput(f"{name!r} belongs to a lazy module and has no shape yet: run the model once first.")
        if tensor.is_meta:
            raise BadInput(f"{name!r} is on the meta device: zeros can only be counted in weights that have values.")
    for name, module in model.named_modules():
        if hasattr(type(module), "packed_role"):
            raise BadInput(
                f"{name!r} is packed: count the FLOPs of the model before it is, or of secateur.unpack(model)."
            )


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled modules run as the plain ones they are made of, and torch says nothing of it."""
    with eager(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        yield


NEVER = "was never called, and no operator that is counted used its weight"


def _refuse_uncounted(model: nn.Module, uncounted: set[str], entered: set[str]) -> None:
    """Raises if there are prunable weights that multiplied nothing that was counted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    reasons: dict[str, str] = {}
    for name in sorted(uncounted):
        path = owner(name)
        where = f"{path!r}" if path else "the model itself"
        why = "ran, but by an operator that is not counted" if path in entered else NEVER
        reasons[path] = f"{where} ({type(modules[path]).__name__}): {why}"
    if reasons:
        raise BadInput(
            f"{len(reasons)} module{'s' * (len(reasons) > 1)} with prunable weights counted 0 FLOPs on this "
            f"input, so the total would be too small: {'; '.join(reasons.values())}. Give an example_input "
            "that reaches every module (enough tokens for every expert), or count the part of the model that "
            "runs."
        )


def _short(n: int) -> str:
    """``1234567`` -> ``"1.23 M"``, with a space where there is no letter."""
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.2f} {letter}"
    return f"{n} "
