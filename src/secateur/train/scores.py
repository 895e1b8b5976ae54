"""What movement pruning remembers outside the model, and the masks it makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.bits import count_kept, keep_, pack
from secateur.core.keys import nonzero
from secateur.core.plan import Plan
from secateur.core.types import Align, Part, Spec
from secateur.errors import BadTensor, PlanMismatch, SecateurWarning

from .held import Held, refuse_not_finite
from .movement import Movement, SoftMovement


class Memory:
    """What movement pruning remembers beside the masks, outside the model.

    Attributes:
        how: what `movement` or `soft_movement` made.
        scores: float32, of every chosen weight, by name.
        values: of each tensor's dtype and shape: what pruned weights were when they last lived; zero for the others, so that
            the sum of this and the model's is all weights.
    """

    def __init__(self, how: Movement, specs: Sequence[Spec], held: Held) -> None:
        self.how = how
        tensors = {s.name: held.tensor(s).detach() for s in specs}
        for s in specs:
            if tensors[s.name].element_size() == 1:
                raise BadTensor(f"{s} is float8, which torch does not calculate with: train in a wider dtype.")
        self.scores = {n: torch.zeros(t.shape, device=t.device) for n, t in tensors.items()}
        self.values = {n: torch.zeros_like(t) for n, t in tensors.items()}

    @torch.no_grad()
    def score(self, held: Held, step: int, optimizer: Optimizer) -> None:
        """Moves the scores by the gradients that an optimizer is about to use, after so many updates.

        Raises:
            BadTensor: weights or gradients that are NaN or infinite, or sparse gradients. Nothing has been touched.
        """
        gradients = {n: g for n in self.scores if (g := _gradient(held, n)) is not None}
        self._check(held, gradients, step + 1)
        # Each operation rounds on its own, as those that do two at once (alpha=, addcmul_) do not on every device.
        if isinstance(self.how, SoftMovement):
            pull = self.how.lr * self.how.penalty(step)
            for scores in self.scores.values() if pull else ():
                sigmoid = scores.sigmoid()
                scores.sub_(sigmoid.mul_(1 - sigmoid).mul_(pull))
        rate = self.how.lr if isinstance(self.how, SoftMovement) else 1.0
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:  # left to a fused optimizer to unscale
            rate /= float(scale)
        for name, gradient in gradients.items():
            whole = held.tensor(held.spec(name)).detach() + self.values[name]
            self.scores[name].sub_((gradient.float() * whole.float()).mul_(rate))

    def _check(self, held: Held, gradients: Mapping[str, Tensor], step: int) -> None:
        """Looks at everything before it looks at anything in detail, so that a GPU is waited for once."""
        found = {f"the gradient of {held.spec(n)}": g for n, g in gradients.items()}
        found |= {str(held.spec(n)): held.tensor(held.spec(n)) for n in gradients}
        fine = [torch.isfinite(t).all() for t in found.values()]
        if fine and not bool(torch.stack([f.to(fine[0].device) for f in fine]).all()):
            for what, t in found.items():
                refuse_not_finite(t, what, step)

    def movement(self, weight: Tensor, *, name: str) -> Tensor:
        """The scores, as a criterion."""
        return self.scores[name]

    def parts(self, spec: Spec, align: Align) -> tuple[Part, ...]:
        """All weights of a tensor, while they are `gathered`."""
        return (Part(spec, self.values[spec.name], resident=True),)

    @contextmanager
    def gathered(self, held: Held) -> Iterator[None]:
        """Inside it ``values`` are all weights, pruned or not. (One of the two that are added is zero, so sums are exact.)"""
        held.zero_weights()
        with torch.no_grad():
            for name, values in self.values.items():
                values.add_(held.tensor(held.spec(name)))
        try:
            yield
        finally:
            self.settle(held)

    @torch.no_grad()
    def settle(self, held: Held) -> None:
        """Forgets the values of weights that live."""
        for name, values in self.values.items():
            bits = held.bits.get(name)
            if bits is None:
                values.zero_()
            else:
                keep_(values, ~bits)

    def passing(self, held: Held, step: int) -> dict[str, Tensor]:
        """The masks, packed, of soft movement after so many updates: what is not zero and passes the threshold."""
        assert isinstance(self.how, SoftMovement)
        cut = self.how.cut(step)
        with self.gathered(held):
            return {n: pack((s > cut) & nonzero(self.values[n])) for n, s in self.scores.items()}

    def advance(
        self, held: Held, step: int, change: tuple[float, float], plan: Callable[[float], Plan],
        optimizers: Sequence[Optimizer],
    ) -> Memory | None:  # fmt: skip
        """After so many updates: makes the mask anew where it is due.

        Args:
            held: what is held.
            step: updates done.
            change: the schedule's value before and now.
            plan: makes the plan of a sparsity by the scores.
            optimizers: whose state of what goes and comes is zeroed.

        Returns:
            This, or ``None`` where the mask is fixed from now on.
        """
        before, value = change
        if self.how.due(step, value, before != value):
            if isinstance(self.how, SoftMovement):
                masks = self.passing(held, step)
            else:
                masks = dict(plan(value).masks or {})
                if not before and (still := [n for n, s in self.scores.items() if not s.any()]):
                    _warn(step, f"no gradient has moved the scores of {', '.join(still)}: their weights go by index")
            if emptied := self.turn(held, masks, optimizers):
                cure = "weaken strength" if isinstance(self.how, SoftMovement) else "cap with max_sparsity or min_keep"
                _warn(step, f"left with nothing: {', '.join(emptied)}; {cure}, or leave out")
        return self if step < self.how.end else None

    @torch.no_grad()
    def turn(self, held: Held, masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> list[str]:
        """Takes other masks, packed: what goes is remembered, what comes has its value of old. Names of emptied tensors."""
        emptied = [n for n, bits in masks.items() if not count_kept(bits) and held.kept(held.spec(n))]
        with self.gathered(held):
            held.swap(masks, optimizers)
            for name, bits in masks.items():
                weight = held.tensor(held.spec(name)).detach()
                weight.copy_(self.values[name])
                keep_(weight, bits)
        return emptied

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies of scores and values."""
        return {what: {n: t.clone() for n, t in getattr(self, what).items()} for what in ("scores", "values")}


def restored(how: Any, specs: Sequence[Spec], held: Held, state: Mapping[str, Any]) -> Memory | None:
    """The memory in the state of a `Pruner`, checked; ``None`` where there is none to be.

    Raises:
        PlanMismatch: the state is of another kind of training, or of other tensors.
    """
    found = state.get("movement")
    if not isinstance(how, Movement) or state["steps"] >= how.end:
        if found is not None:
            raise PlanMismatch(
                "the state has scores of movement pruning, for which there is no use here: give the same rewire=."
            )
        return None
    memory = Memory(how, specs, held)
    for what, mine in (("scores", memory.scores), ("values", memory.values)):
        theirs = found.get(what) if isinstance(found, Mapping) else None
        same = isinstance(theirs, Mapping) and theirs.keys() == mine.keys()
        if not same or not all(_alike(theirs[n], t) for n, t in mine.items()):  # type: ignore[index]
            raise PlanMismatch(
                f"movement pruning goes on until update {how.end}, and at update {state['steps']} it takes the {what} of "
                f"{', '.join(sorted(mine)[:4])}{', …' if len(mine) > 4 else ''}, which the state does not have."
            )
        for n, t in mine.items():
            t.copy_(theirs[n])  # type: ignore[index]
    return memory


def _warn(step: int, text: str) -> None:
    warnings.warn(f"at step {step}: {text}", SecateurWarning, stacklevel=5)


def _alike(found: Any, mine: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == mine.shape and found.dtype == mine.dtype


def _gradient(held: Held, name: str) -> Tensor | None:
    """The gradient of a tensor, of all parameters that share its memory."""
    gradients = [p.grad for p in held.parameters[name] if p.grad is not None]
    if any(g.layout is not torch.strided for g in gradients):
        raise BadTensor(
            f"the gradient of {held.spec(name)} is sparse, and says nothing of weights without an entry: make it dense "
            "(nn.Embedding(sparse=False)), or leave the tensor out with ignore=."
        )
    return reduce(torch.add, gradients) if gradients else None
