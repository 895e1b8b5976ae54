r"""Statistics made of gradients: mean gradients, squared gradients, the Hessian's diagonal, blocks of the Fisher matrix.

They hold no graph and are not kept in the model. Bytes a weight, while they are measured (of float64 ones the first twice):

=========================================== ==================================================================================
``grad``, ``fisher_diag``, ``hessian_diag`` 4 each; ``hessian_diag`` needs the graph of a gradient, some times the activations
``fisher_inverse``, ``fisher_inverse_diag`` ``8 B`` for blocks of ``B`` weights, 400 at 50, and 128 for gradients not added yet
=========================================== ==================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.criteria import random
from secateur.core.saliency import LIKE_WEIGHT
from secateur.core.solve.fisher import (
    add_gradients,
    check_damping,
    diagonal,
    fisher_bytes,
    invert,
    outer_products,
)
from secateur.errors import BadInput, SecateurWarning
from secateur.stores.memory import MemoryStore

from .losses import Loss, differentiable, each_loss

MEASURED = (*LIKE_WEIGHT, "fisher_inverse")
"""What `gradients` can measure of a tensor."""
BLOCKS = ("fisher_inverse_diag", "fisher_inverse")
PENDING = 16
"""Gradients kept until their outer products are added up together, which is faster."""


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    names: Sequence[str] | None = None,
    wanted: Iterable[str] = ("grad",),
    *,
    per_sample: bool = False,
    seed: int = 0,
    probes: int = 1,
    block: int = 50,
    damping: float = 1e-5,
    memory: int = 8 << 30,
) -> dict[str, dict[str, Tensor]]:
    r"""Measures statistics of the gradients of a loss, tensor by tensor.

    Of ``m`` gradients ``g_b``, one a batch (or a sample, with ``per_sample``), all of equal weight:

    - ``grad``: ``1/m Σ g_b``;
    - ``fisher_diag``: ``1/m Σ g_b²``, the diagonal of the empirical Fisher matrix. The gradient of a batch is a mean over its
      samples, so its square is smaller than the samples' own mean square: for the Fisher matrix proper use ``per_sample``;
    - ``hessian_diag``: ``1/m Σ v ⊙ H_b v``, Hutchinson's estimate of the Hessian's diagonal, with ``v`` of random signs, drawn
      anew for every batch and probe. It is unbiased; one draw of element i has variance ``Σ_{j≠i} H_ij²``, the mean of k draws
      a k-th of that. Signs are an integer hash of (seed, name, draw, index): the same on every device;
    - ``fisher_inverse``: inverses of blocks of ``1/m Σ g_b g_bᵀ + damping I``, see `secateur.core.solve.fisher`; and
      ``fisher_inverse_diag``, their diagonal. A weight that is zero counts as pruned: its gradient is taken as zero here.

    The model runs in eval mode, and is left as it was: flags, ``requires_grad``, every ``.grad``; on an error too.

    Args:
        model: where the loss is taken. A batch is moved to the device of its first parameter.
        batches: iterated once.
        loss: ``loss(model, batch)``, a scalar with a graph.
        names: tensors to measure, by any of their names; ``None`` for all that `secateur.prune` would choose. Tied ones are one.
        wanted: some of ``grad``, ``fisher_diag``, ``hessian_diag``, ``fisher_inverse``, ``fisher_inverse_diag``.
        per_sample: whether batches are cut along dim 0 of their tensors into batches of one sample.
        seed: draws the signs.
        probes: draws a batch, for ``hessian_diag``.
        block: weights a block, for the Fisher matrix.
        damping: what is added to its diagonal: 1e-5 in WoodFisher, 1e-7 in the optimal BERT surgeon.
        memory: the most bytes that its blocks may take.

    Returns:
        ``{name: {statistic: tensor}}``, by canonical names, on the weights' devices: float32, or float64 for float64 weights;
        the inverses are float64. ``fisher_inverse`` is ``(blocks, B, B)``, the others are of the weight's shape.

    Raises:
        BadInput: no batch, a loss that is no scalar, not finite or without a graph (saying for which batch), or that does not
            depend on one of the tensors; gradients that are not finite; blocks that take more than ``memory``.

    Warns:
        SecateurWarning: the damping of a tensor was raised, since a block was singular to working precision.

    Example:
        >>> from torch.nn import functional as F
        >>> net = nn.Linear(2, 1, bias=False)
        >>> nn.init.ones_(net.weight).requires_grad
        True
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))]
        >>> found = gradients(net, data, lambda m, b: F.mse_loss(m(b[0]), b[1]), wanted={"grad", "fisher_diag"})
        >>> found["weight"]["grad"], found["weight"]["fisher_diag"]
        (tensor([[4., 8.]]), tensor([[16., 64.]]))
    """
    asked = _Asked.of(wanted, per_sample, seed, probes, block, damping, memory)
    tensors = _tensors(model, names)
    _check_memory(tensors, asked)
    if not callable(loss):
        raise BadInput(f"loss is a function (model, batch) -> scalar; got {loss!r}.")
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise BadInput(
            f"batches is a {type(batches).__name__}: iterating it gives no batches. For a single batch pass [batch]."
        )
    # The only attention that can be differentiated twice is the one written out.
    attention = sdpa_kernel(SDPBackend.MATH) if "hessian_diag" in asked.wanted else nullcontext()
    with differentiable(model, [p for t in tensors for p in t.holders]), attention:
        sums = [_Sums.of(t, asked) for t in tensors]
        count = each_loss(loss, model, batches, lambda value, number: _add(sums, value, asked, number), per_sample)
    _refuse(sums)
    return {s.name: s.result(count, asked) for s in sums}


# What is asked for


@dataclass(frozen=True)
class _Asked:
    """The options of `gradients`, checked."""

    wanted: frozenset[str]
    seed: int
    probes: int
    block: int
    damping: float
    memory: int

    @classmethod
    def of(
        cls, wanted: Iterable[str], per_sample: Any, seed: Any, probes: Any, block: Any, damping: Any, memory: Any
    ) -> _Asked:
        """The options as they were given.

        Raises:
            BadInput: one that cannot be meant.
        """
        names = frozenset([wanted] if isinstance(wanted, str) else wanted)
        if not names or names - set(MEASURED):
            raise BadInput(
                f"wanted takes some of {', '.join(MEASURED)}; got {', '.join(map(repr, sorted(names))) or 'none'}."
            )
        if not isinstance(per_sample, bool):
            raise BadInput(f"per_sample is True or False; got {per_sample!r}.")
        for value, what in ((probes, "probes"), (block, "block"), (memory, "memory")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"{what} is a whole number of at least 1; got {value!r}.")
        random(seed)
        check_damping(damping)
        return cls(names, seed, probes, block, damping, memory)

    @property
    def blocks(self) -> bool:
        """Whether the blocks of the Fisher matrix are needed."""
        return bool(self.wanted.intersection(BLOCKS))


@dataclass(frozen=True)
class _Tensor:
    """A tensor to measure: its canonical name, and the parameters that are it, several where it is tied."""

    name: str
    holders: tuple[nn.Parameter, ...]

    @property
    def weight(self) -> nn.Parameter:
        return self.holders[0]


def _tensors(model: nn.Module, names: Sequence[str] | None) -> list[_Tensor]:
    store = MemoryStore(model)
    specs = store.specs()
    by_name = {n: s for s in specs for n in (s.name, *s.aliases)}
    chosen = [s.name for s in specs if s.skip is None] if names is None else list(names)
    if not chosen:
        raise BadInput("no tensor is to be measured: name one, or pass a model with weights that can be pruned.")
    if unknown := [n for n in chosen if n not in by_name]:
        raise BadInput(f"the model has no tensor {unknown[0]!r}; it has {', '.join(sorted(by_name)[:8])}.")
    found = {s.name: replace(s, skip=None) for s in (by_name[n] for n in chosen)}
    store.check(list(found.values()))
    held = dict(model.named_parameters(remove_duplicate=False))
    tensors = []
    for spec in found.values():
        holders = {id(held[n]): held[n] for n in (spec.name, *spec.aliases) if n in held}
        tensors.append(_Tensor(spec.name, tuple(holders.values())))
    return tensors


def _check_memory(tensors: Sequence[_Tensor], asked: _Asked) -> None:
    needed = sum(fisher_bytes(t.weight.numel(), asked.block) for t in tensors) if asked.blocks else 0
    if needed > asked.memory:
        total = sum(t.weight.numel() for t in tensors)
        raise BadInput(
            f"blocks of {asked.block} for {total:,} weights take {needed / 1e9:,.1f} GB, more than the "
            f"{asked.memory / 1e9:,.1f} GB they may take here. Make block= smaller, or choose fewer tensors at a time."
        )


# Sums


@dataclass
class _Sums:
    """What is added up of one tensor."""

    tensor: _Tensor
    sums: dict[str, Tensor]
    outer: Tensor | None
    pending: list[Tensor] = field(default_factory=list)
    reached: bool = False

    @classmethod
    def of(cls, tensor: _Tensor, asked: _Asked) -> _Sums:
        w = tensor.weight
        dtype = torch.promote_types(w.dtype, torch.float32)
        sums = {s: torch.zeros(w.shape, dtype=dtype, device=w.device) for s in sorted(asked.wanted - set(BLOCKS))}
        return cls(tensor, sums, outer_products(w.numel(), asked.block, w.device) if asked.blocks else None)

    @property
    def name(self) -> str:
        return self.tensor.name

    def add(self, grad: Tensor) -> None:
        """Adds one gradient."""
        if "grad" in self.sums:
            self.sums["grad"] += grad
        if "fisher_diag" in self.sums:
            self.sums["fisher_diag"] += grad.to(self.sums["fisher_diag"].dtype).square()
        if self.outer is not None:
            self.pending.append(torch.where(self.tensor.weight.detach() == 0, 0, grad).reshape(-1))
            if len(self.pending) == PENDING:
                self.flush()

    def flush(self) -> None:
        """Adds the outer products of the gradients that were kept."""
        if self.outer is not None and self.pending:
            add_gradients(self.outer, torch.stack(self.pending))
            self.pending.clear()

    def bad(self) -> bool:
        """Whether something that was added up is NaN or infinite."""
        self.flush()
        every = [*self.sums.values(), *([self.outer] if self.outer is not None else [])]
        return not all(bool(torch.isfinite(t).all()) for t in every)

    def result(self, count: int, asked: _Asked) -> dict[str, Tensor]:
        """Means and inverses; the sums are used up."""
        draws = {"hessian_diag": count * asked.probes}
        found = {s: t.div_(draws.get(s, count)) for s, t in self.sums.items()}
        if self.outer is None:
            return found
        used = invert(self.outer, count, asked.damping)
        if used != asked.damping:
            what = f"the Fisher matrix of {self.name!r} has blocks that are singular to working precision"
            warnings.warn(
                f"{what}: its damping was raised from {asked.damping:g} to {used:g}.", SecateurWarning, stacklevel=3
            )
        if "fisher_inverse_diag" in asked.wanted:
            found["fisher_inverse_diag"] = diagonal(self.outer, self.tensor.weight)
        if "fisher_inverse" in asked.wanted:
            found["fisher_inverse"] = self.outer
        return found


def _add(sums: Sequence[_Sums], value: Tensor, asked: _Asked, number: int) -> None:
    """Adds what one batch tells."""
    twice = "hessian_diag" in asked.wanted
    params = [p for s in sums for p in s.tensor.holders]
    found = torch.autograd.grad(value, params, create_graph=twice, allow_unused=True)
    for s, own in zip(sums, _shared_out(sums, found), strict=True):
        grads = [g.detach() for g in own if g is not None]
        if grads:
            s.reached = True
            s.add(grads[0] if len(grads) == 1 else torch.stack(grads).sum(0))
    if twice:
        curved = [(p, g) for p, g in zip(params, found, strict=True) if g is not None and g.requires_grad]
        for probe in range(asked.probes if curved else 0):
            _probe(sums, params, found, asked.seed, f"{number} {probe}")


def _probe(
    sums: Sequence[_Sums], params: Sequence[Tensor], found: Sequence[Tensor | None], seed: int, draw: str
) -> None:
    """Adds ``v ⊙ Hv`` for one draw of signs."""
    signs = [_signs(s.tensor.weight, seed, f"{s.name}\0{draw}") for s in sums]
    pairs = zip(_shared_out(sums, found), signs, strict=True)
    along = [(g * v).sum() for own, v in pairs for g in own if g is not None and g.requires_grad]
    curved = torch.autograd.grad(along, params, retain_graph=True, allow_unused=True)
    for s, v, own in zip(sums, signs, _shared_out(sums, curved), strict=True):
        for hv in own:
            if hv is not None:
                s.sums["hessian_diag"] += v * hv.detach()


def _signs(weight: Tensor, seed: int, name: str) -> Tensor:
    index = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    drawn = random(seed)(weight, name=name, index=index)
    return torch.where(drawn < 0, -1.0, 1.0).to(weight.dtype)


def _shared_out(sums: Sequence[_Sums], each: Sequence[Tensor | None]) -> Iterator[Sequence[Tensor | None]]:
    """What belongs to each tensor, of a list that has something for each of their parameters."""
    at = 0
    for s in sums:
        yield each[at : at + len(s.tensor.holders)]
        at += len(s.tensor.holders)


def _refuse(sums: Sequence[_Sums]) -> None:
    if missed := [s.name for s in sums if not s.reached]:
        raise BadInput(
            f"the loss does not depend on {', '.join(map(repr, missed[:8]))}: no batch's loss has a gradient there. Leave out "
            "what is not used, or take a loss that uses it."
        )
    for s in sums:
        if s.bad():
            raise BadInput(
                f"the gradients of {s.name!r} (shape {tuple(s.tensor.weight.shape)}) are NaN or infinite, or their squares are: "
                "look for a step of the loss that divides by zero, or overflows in a small dtype."
            )
