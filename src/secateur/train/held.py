"""What a `Pruner` holds: masks of one bit a weight, by name, outside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.bits import count_kept, keep_, live_bits, unpack
from secateur.core.heads import Head
from secateur.core.patterns import Channel, Pattern
from secateur.core.plan import Plan
from secateur.core.types import Spec
from secateur.core.write import write_rows
from secateur.errors import BadTensor, PlanMismatch
from secateur.stores.memory import MemoryStore
from secateur.stores.shards import here

from .gradients import Gradients
from .optimizers import STATE_KEYS, mask_state
from .parameters import parameters_by_name


class Held:
    """Packed keep-masks over the parameters of a module.

    Attributes:
        bits: name to packed mask (uint8, on the tensor's device) of what lies in this process; a tensor that is not in it is
            held nowhere.
        parameters: the parameters that go by each name.
    """

    def __init__(self, model: nn.Module, store: MemoryStore, state_keys: frozenset[str]) -> None:
        self._store, self._state_keys = store, STATE_KEYS | state_keys
        self._specs = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
        self.parameters = parameters_by_name(model, store)
        self.bits: dict[str, Tensor] = {}
        self._kept: dict[str, int] = {}
        self._gradients = Gradients()

    def over(self, model: nn.Module, store: MemoryStore) -> Held:
        """The same masks over a copy of the model."""
        other = Held(model, store, self._state_keys)
        other.bits = {name: bits.clone() for name, bits in self.bits.items()}
        other._kept = dict(self._kept)
        return other

    def spec(self, name: str) -> Spec:
        """The tensor of a name or an alias."""
        return self._specs[name]

    def tensor(self, spec: Spec) -> Tensor:
        """Its values that lie in this process, in the model's own memory."""
        return self._store.values(spec)

    def kept(self, spec: Spec) -> int:
        """How many weights of a tensor are not held at zero, over all processes. Known, so that one may ask alone."""
        return self._kept.get(spec.name, spec.numel)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Holds these masks, packed, and no others."""
        self.bits.clear()
        self._kept.clear()
        self._add(masks)

    def _add(self, masks: Mapping[str, Tensor]) -> None:
        self.bits.update(masks)
        self._kept.update(zip(masks, self._counted(masks), strict=True))

    def _counted(self, masks: Mapping[str, Tensor]) -> list[int]:
        """How many bits are set in each of some masks, over all processes."""
        mine = [count_kept(bits) if self._store.counts(self._specs[name]) else 0 for name, bits in masks.items()]
        found: list[int] = self._store.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        return found

    def mask(self, spec: Spec) -> Tensor:
        """The keep-mask of a tensor: bool, of its shape, on its device; of a DTensor another one."""
        t, bits = self.tensor(spec), self.bits.get(spec.name)
        if bits is None:
            return self._store.like(spec, torch.ones(t.shape, dtype=torch.bool, device=t.device))
        return self._store.like(spec, unpack(bits, 0, t.numel()).view(t.shape).to(t.device))

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the masks to be saved: packed; or, of a model that is cut over processes, those of all ``names``, each cut
        as its tensor is, since a checkpoint that is loaded by another number of processes cuts by elements, not by bits."""
        if self._store.spread:
            return {self._specs[n].name: self.mask(self._specs[n]) for n in names}
        return {name: bits.clone() for name, bits in self.bits.items()}

    def checked(self, masks: Mapping[str, Tensor], chosen: set[str] | None) -> dict[str, Tensor]:
        """Masks as given, packed or bool, as packed ones by the names of here.

        Raises:
            PlanMismatch: a mask of no tensor here, of another shape, or of one that is not among the ``chosen``.
        """
        found = {}
        for name, mask in masks.items():
            spec = self._specs.get(name)
            packed = None if spec is None else self._store.bits_here(spec, mask)
            if spec is None or packed is None:
                raise PlanMismatch(
                    f"the mask of {spec or repr(name)} does not have a bit for each weight of such a tensor."
                )
            if chosen is not None and spec.name not in chosen:
                raise PlanMismatch(
                    f"{spec} is not among the tensors that this pruner holds ({', '.join(sorted(chosen)[:4])}"
                    f"{', …' if len(chosen) > 4 else ''}): name it in include=, or leave its mask out."
                )
            found[spec.name] = packed.to(self.tensor(spec).device)
        return found

    @torch.no_grad()
    def take_zeros(self, specs: Iterable[Spec], pruned: bool) -> None:
        """Takes as masks what is zero now; tensors that are wholly zero only if they were ``pruned``."""
        live = {spec.name: live_bits(self.tensor(spec)) for spec in specs}
        for (name, bits), kept in zip(live.items(), self._counted(live), strict=True):
            if kept == self._specs[name].numel or (kept == 0 and name not in self.bits and not pruned):
                self.bits.pop(name, None)
                self._kept.pop(name, None)
            else:
                self.bits[name], self._kept[name] = bits, kept

    @torch.no_grad()
    def swap(self, masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Takes other masks, packed. What does not live both before and after is zeroed, and its gradient and state too."""
        masked = self._masked({name: bits & self.bits.get(name, bits) for name, bits in masks.items()})
        for parameter, bits in masked:
            keep_(here(parameter), bits)
            self._gradients.mask(parameter, bits)
        mask_state(optimizers, masked, self._state_keys)
        self._add(masks)

    def carry_out(self, made: Plan) -> None:
        """Writes the zeros of a plan."""
        store = self._store
        write_rows(made, store.parts, store.sum, lambda n: list(store.parts(self._specs[n], "whole")), store.write)

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Writes zeros wherever they are held."""
        for parameter, bits in self._masked(self.bits):
            keep_(here(parameter), bits)

    def zero_gradient(self, name: str, parameter: Tensor) -> None:
        """Writes zeros into a parameter's gradient where its weights are held."""
        bits = self.bits.get(name)
        if bits is not None:
            self._gradients.mask(parameter, bits)

    @torch.no_grad()
    def zero_changed(self) -> bool:
        """Writes zeros into gradients that were assigned or changed since they were masked. Whether there were any."""
        changed = [(p, bits) for p, bits in self._masked(self.bits) if self._gradients.changed(p)]
        for parameter, bits in changed:
            self._gradients.mask(parameter, bits)
        return bool(changed)

    @torch.no_grad()
    def zero_rest(self, optimizers: Sequence[Optimizer], gradients: bool) -> None:
        """Writes zeros into what optimizers remember of weights that are held, and into gradients that are there already."""
        masked = self._masked(self.bits)
        mask_state(optimizers, masked, self._state_keys)
        for parameter, bits in masked if gradients else ():
            self._gradients.mask(parameter, bits)

    @torch.no_grad()
    def zero_other(self, store: MemoryStore) -> None:
        """Writes zeros into another model's tensors of the same names.

        Raises:
            PlanMismatch: a tensor is missing or has another shape. Nothing has been written.
        """
        known = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
        for name in self.bits:
            mine, theirs = self._specs[name], known.get(name)
            if theirs is None or theirs.shape != mine.shape or store.values(theirs).shape != self.tensor(mine).shape:
                raise PlanMismatch(f"the pruner holds {mine}, but the model has {theirs or 'no such tensor'}.")
        for name, bits in self.bits.items():
            t = store.values(known[name])
            keep_(t, bits.to(t.device))

    def _masked(self, masks: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, bits) for name, bits in masks.items() for p in self.parameters[name]]


def refuse_not_finite(t: Tensor, what: str, step: int) -> None:
    """Raises for values that are NaN or infinite; ``what`` names the tensor."""
    bad = t.numel() - int(torch.isfinite(t).sum())
    if bad:
        raise BadTensor(
            f"at step {step}: {what} holds {bad} NaN or infinite value{'s' if bad != 1 else ''}, which cannot be compared. The "
            "masks are as they were: go back to the last good checkpoint, or skip this batch."
        )


def followers_of(made: Plan) -> list[str]:
    """Names of the tensors whose slices go along with the units of a plan."""
    return [m.name for row in made.chosen for m in row.followers] if isinstance(made.pattern, Channel | Head) else []


def may_be_held(chosen: Iterable[Spec], pattern: Pattern) -> list[str]:
    """Names of the tensors that may be held: those chosen, and the biases that go along with their units."""
    along = pattern if isinstance(pattern, Channel | Head) else None
    return [name for s in chosen for name in (s.name, *(m.name for m in (along.grid(s).followers if along else ())))]


def emptied(made: Plan, held: Held) -> str:
    """What to say of tensors that a plan leaves with nothing, and that were not held so before; or nothing."""
    names = [r.name for r in made.chosen if r.numel and r.prune == r.numel and held.kept(r.spec)]
    return f"left with nothing: {', '.join(names)}; cap with max_sparsity or min_keep, or leave out" if names else ""
