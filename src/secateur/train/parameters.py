"""Which parameters of a module train, and by which names the store knows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from secateur.core.allocate import prune_count
from secateur.core.bits import count_kept, live_bits
from secateur.core.types import Spec
from secateur.errors import BadInput
from secateur.stores.memory import MemoryStore


def trainable(specs: Sequence[Spec], store: MemoryStore) -> list[Spec]:
    """Frozen parameters are left alone; one that was named is refused."""
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
        )
    return out


def check_target(target: float | None, specs: Sequence[Spec], store: MemoryStore) -> None:
    """Refuses a schedule that ends below what is zero already: pruning gives no weight back."""
    chosen = [s for s in specs if s.skip is None]
    total = sum(s.numel for s in chosen)
    if target is None or not total:
        return
    zeros = total - sum(count_kept(live_bits(store.entry(s).tensor)) for s in chosen)
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
