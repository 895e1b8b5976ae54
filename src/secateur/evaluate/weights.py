"""A model's weights, recognised where operators use them: also through casts, masks, gathers and views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from secateur.core.keys import nonzero
from secateur.stores import torch_prune
from secateur.stores.memory import MemoryStore

# A lookup takes rows of a weight, but makes activations of them: an embedding may be tied to an output head.
LOOKUPS = {
    "aten::embedding", "aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only"
}  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of two dims or more by its full name, tied ones under each of their names."""
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}


def prunable(model: nn.Module) -> set[str]:
    """Names of the weights that pruning chooses by default, tied ones under each of their names."""
    if next(model.parameters(), None) is None:
        return set()
    specs = MemoryStore(model).specs()
    return {n for s in specs if s.skip is None for n in (s.name, *s.aliases)} & weights_of(model).keys()


def owner(weight: str) -> str:
    """Name of the module that a weight belongs to.

    >>> owner("net.fc.weight"), owner("net.fc.parametrizations.weight.original0"), owner("weight")
    ('net.fc', 'net.fc', '')
    """
    path, found, _ = f".{weight}".partition(".parametrizations.")
    return (path if found else path.rpartition(".")[0]).removeprefix(".")


class Origins:
    """Knows which tensors do not depend on the input, and which weights they are made of.

    A tensor is known by its storage. Parameters and buffers are known from the start; what an operator makes
    of known tensors alone is known too. Everything else is an activation.
    """

    def __init__(self, model: nn.Module) -> None:
        # storage -> (first byte, end, names of the weights in between): one storage may hold many weights
        self._spans: dict[StorageWeakRef, list[tuple[float, float, frozenset[str]]]] = defaultdict(list)
        self._models: set[StorageWeakRef] = set()
        self._nonzeros: dict[tuple[Any, ...], int] = {}
        for t in (*model.parameters(), *model.buffers()):
            self._add_whole(t, ())
        for name, weight in weights_of(model).items():
            self._add_whole(weight, (name,))
        # what a pruning hook wrote last may be used without running the hook again
        for path, module, tensor in torch_prune.find(model):
            original = torch_prune.full_name(path, tensor + torch_prune.ORIG)
            self._add_whole(getattr(module, tensor), (original,))

    def _add_whole(self, t: Tensor, names: Iterable[str]) -> None:
        storage = _storage(t)
        if storage is not None:
            first = int(t.storage_offset()) * t.itemsize
            steps = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            self._spans[storage].append((first, first + (steps + 1) * t.itemsize, frozenset(names)))
            self._models.add(storage)

    def names(self, t: Tensor) -> frozenset[str] | None:
        """Names of the weights ``t`` is made of, perhaps none; ``None`` for an activation."""
        storage = _storage(t)
        if storage is None or storage not in self._spans:
            return None
        at = t.storage_offset() * t.itemsize
        return frozenset().union(*(names for a, b, names in self._spans[storage] if a <= at < b))

    def follow(self, op: torch._ops.OpOverload, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Remembers what an operator has made of what."""
        made = None if op._schema.name in LOOKUPS else self._made_of(list(inputs))
        for out in outputs:
            storage = _storage(out)
            if storage is None:
                continue
            if storage not in self._spans:
                if made is not None:
                    self._spans[storage].append((0, inf, made))
            elif op._schema.is_mutable and made is None:
                del self._spans[storage]  # an activation was written into it
            elif op._schema.is_mutable and storage not in self._models:
                self._spans[storage].append((0, inf, made or frozenset()))

    def _made_of(self, inputs: list[Tensor]) -> frozenset[str] | None:
        """Names of all weights among the inputs, ``None`` if one is an activation; integers are indices."""
        values = [t for t in inputs if t.is_floating_point() or t.is_complex()]
        names = [self.names(t) for t in values or inputs]
        known = [n for n in names if n is not None]
        return frozenset().union(*known) if len(known) == len(names) else None

    def nonzeros(self, t: Tensor) -> int:
        """How many elements are not zero; counted once for each view of a parameter."""
        storage = _storage(t)
        if storage not in self._models:
            return int(nonzero(t).sum())
        key = (storage, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
        if key not in self._nonzeros:
            self._nonzeros[key] = int(nonzero(t).sum())
        return self._nonzeros[key]


def _storage(t: Tensor) -> StorageWeakRef | None:
    """What identifies a tensor's memory; ``None`` for a sparse tensor, which has none of its own."""
    try:
        return StorageWeakRef(t.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
