"""Which parameters of a module train, and by which names the store knows them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from secateur.core.allocate import prune_count
from secateur.core.criteria import is_named
from secateur.core.elements import survey
from secateur.core.fast import settle
from secateur.core.keys import FORMATS
from secateur.core.make import eligible, make
from secateur.core.patterns import Pattern
from secateur.core.request import Request
from secateur.core.schedules import AcDc, Schedule, target_of
from secateur.core.select import Cut, identity
from secateur.core.types import Spec
from secateur.errors import BadInput, BadTensor, SecateurWarning
from secateur.stores.base import choose, matches
from secateur.stores.memory import MemoryStore

Filter = str | Sequence[str] | None
"""What ``include=`` and ``ignore=`` take."""


def can_carry(store: MemoryStore, pattern: Pattern, include: Filter, ignore: Filter) -> list[Spec]:
    """The tensors of a model, those chosen that can carry the pattern; warns of the others."""
    specs, texts = eligible(choose(store.specs(), include, ignore), pattern)
    for text in texts:
        warnings.warn(text, SecateurWarning, stacklevel=5)
    return specs


def trainable(specs: Sequence[Spec], store: MemoryStore, holds: bool = False) -> list[Spec]:
    """Frozen parameters are left alone; one that was named is refused.

    Warns one that ``holds`` what is zero where only frozen parameters are: it would hold nothing.
    """
    out = []
    for s in specs:
        if s.skip is None and not store.entry(s).tensor.requires_grad:
            if s.named:
                raise BadInput(
                    f"{s} is frozen (requires_grad=False), so it does not train: leave it out of include=, or prune it with "
                    "secateur.prune."
                )
            s = replace(s, skip="frozen")
        out.append(s)
    if all(s.skip for s in out):
        raise BadInput(
            "every parameter that could be pruned is frozen (requires_grad=False): there is nothing to train."
            + _of_merging(out, store)
        )
    if holds and not any(_has_zeros(s, store) for s in out if s.skip is None):
        text = _of_merging(out, store)
        if text:
            warnings.warn(f"this Pruner holds nothing: what it could hold has no zeros.{text}", SecateurWarning, 5)
    return out


def _of_merging(specs: Sequence[Spec], store: MemoryStore) -> str:
    """What to do about zeros in frozen weights, where there are any: adapters stand beside such weights."""
    frozen = [s.name for s in specs if s.skip == "frozen" and _has_zeros(s, store)]
    if not frozen:
        return ""
    return (
        f" Frozen weights have zeros ({', '.join(frozen[:4])}{', …' if len(frozen) > 4 else ''}), which an adapter (LoRA) "
        "beside them fills when it is merged: take masks = secateur.masks(model) now, and call secateur.apply(masks, model) "
        "after the merge."
    )


def _has_zeros(spec: Spec, store: MemoryStore) -> bool:
    """Whether some weights are zero, and not all: a tensor that begins at zero, such as LoRA's B, is not pruned."""
    return spec.dtype in FORMATS and not store.entry(spec).tensor.is_meta and 0 < _zeros(spec, store) < spec.numel


def _zeros(spec: Spec, store: MemoryStore) -> int:
    """How many weights of a tensor are zero, over all processes."""
    found = settle(spec, store.parts, Cut(1, 0)) if store.sum is identity else None
    return found.zeros if found is not None else survey(spec, store.parts, store.sum).zeros


def check_schedule(
    schedule: Schedule | None,
    specs: Sequence[Spec],
    store: MemoryStore,
    request: Callable[[float], Request],
    regrow: bool,
) -> None:
    """Refuses now what the last value of a schedule would be refused for after hours of training.

    Raises:
        BadInput: it ends below what is zero already: pruning gives no weight back; AC/DC without ``regrow``.
        NotDefined, Infeasible: the pattern or the caps do not allow as much.
    """
    if isinstance(schedule, AcDc) and not regrow:
        raise BadInput(f"{schedule!r} has dense phases, in which weights live again: say regrow=True.")
    target = target_of(schedule)
    if target is None:
        return
    asked = request(target)
    if not regrow and not isinstance(asked.allocation, Mapping) and not callable(asked.allocation):
        _check_zeros(target, specs, store)
    if is_named(asked.criterion):  # a function of the user's may look at what training brings
        make(specs, store.parts, asked, matches, store.sum)


def check_dtypes(specs: Sequence[Spec], store: MemoryStore) -> None:
    """Refuses parameters that were cast since they were described."""
    for s in specs:
        now = store.entry(s).tensor.dtype
        if s.skip is None and now != s.dtype:
            raise BadTensor(
                f"{s} is {now} now: cast the model first, and make the Pruner after it (its state can be loaded)."
            )


def _check_zeros(target: float, specs: Sequence[Spec], store: MemoryStore) -> None:
    chosen = [s for s in specs if s.skip is None]
    total = sum(s.numel for s in chosen)
    if not total:
        return
    zeros = sum(_zeros(s, store) for s in chosen)
    if zeros > prune_count(total, target):
        raise BadInput(
            f"the schedule ends at {target}, and {zeros:,} of the {total:,} chosen weights are zero already "
            f"({zeros / total:.4f}): pruning gives no weight back. End it higher, or leave it out to hold what is zero."
        )


def parameters_by_name(model: nn.Module, store: MemoryStore) -> dict[str, list[nn.Parameter]]:
    """The parameters that go by each name of the store; several where they share memory."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names = {n: s.name for s in store.specs() for n in (s.name, *s.aliases)}
    out: dict[str, list[nn.Parameter]] = {}
    for name, p in named.items():
        same = out.setdefault(names.get(name, name), [])
        if not any(p is q for q in same):
            same.append(p)
    return out
