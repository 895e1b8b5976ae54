"""What a `Pruner` holds: masks of one bit a weight, by name, outside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.bits import count_kept, keep_, live_bits, pack, unpack
from secateur.core.heads import Head
from secateur.core.patterns import Channel
from secateur.core.plan import Plan
from secateur.core.types import Spec
from secateur.core.write import write_rows
from secateur.errors import BadTensor, PlanMismatch
from secateur.stores.memory import MemoryStore

from .gradients import Gradients
from .optimizers import mask_state
from .parameters import parameters_by_name


class Held:
    """Packed keep-masks over the parameters of a module.

    Attributes:
        bits: name to packed mask (uint8, on the tensor's device); a tensor that is not in it is held nowhere.
        parameters: the parameters that go by each name.
    """

    def __init__(self, model: nn.Module, store: MemoryStore, state_keys: frozenset[str]) -> None:
        self._store, self._state_keys = store, state_keys
        self._specs = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
        self.parameters = parameters_by_name(model, store)
        self.bits: dict[str, Tensor] = {}
        self._gradients = Gradients()

    def over(self, model: nn.Module, store: MemoryStore) -> Held:
        """The same masks over a copy of the model."""
        other = Held(model, store, self._state_keys)
        other.bits = {name: bits.clone() for name, bits in self.bits.items()}
        return other

    def spec(self, name: str) -> Spec:
        """The tensor of a name or an alias."""
        return self._specs[name]

    def tensor(self, spec: Spec) -> Tensor:
        """Its values, in the model's own memory."""
        return self._store.entry(spec).tensor

    def kept(self, spec: Spec) -> int:
        """How many weights of a tensor are not held at zero."""
        bits = self.bits.get(spec.name)
        return spec.numel if bits is None else count_kept(bits)

    def mask(self, spec: Spec) -> Tensor:
        """The keep-mask of a tensor: bool, of its shape, on its device."""
        device, bits = self.tensor(spec).device, self.bits.get(spec.name)
        if bits is None:
            return torch.ones(spec.shape, dtype=torch.bool, device=device)
        return unpack(bits, 0, spec.numel).view(spec.shape).to(device)

    def checked(self, masks: Mapping[str, Tensor], chosen: set[str] | None) -> dict[str, Tensor]:
        """Masks as given, packed or bool, as packed ones by the names of here.

        Raises:
            PlanMismatch: a mask of no tensor here, of another shape, or of one that is not among the ``chosen``.
        """
        found = {}
        for name, mask in masks.items():
            spec = self._specs.get(name)
            packed = pack(mask) if spec is not None and mask.dtype == torch.bool and mask.shape == spec.shape else mask
            if spec is None or packed.dtype != torch.uint8 or packed.numel() != (spec.numel + 7) // 8:
                raise PlanMismatch(
                    f"the mask of {spec or repr(name)} does not have a bit for each weight of such a tensor."
                )
            if chosen is not None and spec.name not in chosen:
                raise PlanMismatch(
                    f"{spec} is not among the tensors that this pruner holds ({', '.join(sorted(chosen)[:4])}"
                    f"{', …' if len(chosen) > 4 else ''}): name it in include=, or leave its mask out."
                )
            found[spec.name] = packed.clone().to(self.tensor(spec).device)
        return found

    @torch.no_grad()
    def take_zeros(self, specs: Iterable[Spec], pruned: bool) -> None:
        """Takes as masks what is zero now; tensors that are wholly zero only if they were ``pruned``."""
        for spec in specs:
            bits = live_bits(self.tensor(spec))
            kept = count_kept(bits)
            if kept == spec.numel or (kept == 0 and spec.name not in self.bits and not pruned):
                self.bits.pop(spec.name, None)
            else:
                self.bits[spec.name] = bits

    @torch.no_grad()
    def swap(self, masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Takes other masks, packed. What does not live both before and after is zeroed, and its gradient and state too."""
        masked = self._masked({name: bits & self.bits.get(name, bits) for name, bits in masks.items()})
        for parameter, bits in masked:
            keep_(parameter, bits)
            self._gradients.mask(parameter, bits)
        mask_state(optimizers, masked, self._state_keys)
        self.bits.update(masks)

    def carry_out(self, made: Plan) -> None:
        """Writes the zeros of a plan."""
        store = self._store
        write_rows(made, store.parts, store.sum, lambda n: list(store.parts(self._specs[n], "whole")), store.write)

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Writes zeros wherever they are held."""
        for parameter, bits in self._masked(self.bits):
            keep_(parameter, bits)

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
            if theirs is None or theirs.shape != mine.shape:
                raise PlanMismatch(f"the pruner holds {mine}, but the model has {theirs or 'no such tensor'}.")
        for name, bits in self.bits.items():
            t = store.entry(known[name]).tensor
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


def emptied(made: Plan, held: Held) -> str:
    """What to say of tensors that a plan leaves with nothing, and that were not held so before; or nothing."""
    names = [r.name for r in made.chosen if r.numel and r.prune == r.numel and held.kept(r.spec)]
    return f"left with nothing: {', '.join(names)}; cap with max_sparsity or min_keep, or leave out" if names else ""
