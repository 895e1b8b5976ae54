"""The dispatch mode that books every multiplication to a module and to the weight it uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .operators import Pieces, pieces
from .weights import Origins, owner

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class Ledger(TorchDispatchMode):
    """Watches a model run, inside the `FlopCounterMode` it is given, so that it sees each operator first.

    Attributes:
        flops: module name to the FLOPs of its own operators.
        products: FLOPs of products with a weight, by the names of what it is made of.
        effective: FLOPs in all, products with a weight scaled by its nonzero fraction.
        counted: names of the weights met.
        entered: names of the modules that ran.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.products: dict[frozenset[str], int] = defaultdict(int)
        self.effective = 0
        self.counted: set[str] = set()
        self.entered: set[str] = set()
        self.origins = Origins(model)
        self._counter = counter
        self._names = {id(m): n for n, m in model.named_modules()}
        paths = model.named_modules(remove_duplicate=False)
        self._first_names = {n: self._names[id(m)] for n, m in paths}
        self._running = [""]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Books what runs inside."""
        handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(self._names.get(id(module), self._running[-1]))
        self.entered.add(self._running[-1])

    def _leave_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(op, torch._ops.OpOverload) and torch.is_inference_mode_enabled():
            with self:  # only there do composite operators arrive whole
                out = op.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        before = self._counter.get_total_flops()
        out = op(*args, **kwargs)
        seen = self._counter.get_total_flops() - before
        if not isinstance(op, torch._ops.OpOverload):  # higher-order: what it runs inside is out of sight
            self._book([(seen, None)] if seen else [])
            return out
        inputs = list(_tensors((*args, *kwargs.values())))
        found = pieces(op, args, kwargs) or ([(seen, self._weight(inputs))] if seen else [])
        counts = self._book(found)
        if not counts or "parametrizations" in self._running[-1].split("."):
            self.origins.follow(op, inputs, _tensors([out]))
        return out

    def _weight(self, inputs: Iterable[Tensor]) -> Tensor | None:
        """The operand that is a weight; of several one of the running module's own, then the sparsest."""
        found = [t for t in inputs if t.dim() > 1 and self.origins.names(t)]
        own = [t for t in found if self._running[-1] in self._owners(t)]
        return min(own or found, key=lambda t: self.origins.nonzeros(t) / max(t.numel(), 1), default=None)

    def _owners(self, t: Tensor) -> list[str]:
        return [self._first_names[owner(n)] for n in sorted(self.origins.names(t) or ())]

    def _book(self, found: Pieces) -> bool:
        """Adds up what one operator did; whether that was anything.

        What a fused operator does without a weight (attention scores) goes to the holder of the weight before
        it, where the operators it stands for would have run.
        """
        home = self._running[-1]
        for flops, weight in found:
            names = self.origins.names(weight) if weight is not None else None
            if flops and weight is not None and names:
                owners = self._owners(weight)
                home = next((m for m in reversed(self._running) if m in owners), owners[0])
                self.effective += flops * self.origins.nonzeros(weight) // weight.numel()
                self.counted |= names
                self.products[names] += flops
            else:
                self.effective += flops
            self.flops[home] += flops
        return any(flops for flops, _ in found)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, list | tuple):
            yield from _tensors(v)
