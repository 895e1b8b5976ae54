"""Statistics of whole channels and heads that are made of gradients: what the loss would change without them, to first order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.heads import Head
from secateur.core.patterns import Pattern
from secateur.core.saliency import Statistics
from secateur.core.types import Spec, units_along
from secateur.errors import BadInput
from secateur.stores.memory import MemoryStore

from .losses import Loss, differentiable, each_loss


def unit_gradients(
    name: str, model: nn.Module, store: MemoryStore, specs: Sequence[Spec], batches: Iterable[Any], loss: Loss | None,
    pattern: Pattern,
) -> Statistics:  # fmt: skip
    """``channel_taylor`` or ``head_gradient``, by name.

    Raises:
        BadInput: there is no loss, or the pattern does not say how many heads there are.
    """
    if not callable(loss):
        raise BadInput(
            f"{name} is made of gradients: say of which loss, secateur.Calibration(batches, loss=…), a function "
            f"(model, batch) -> scalar; got {loss!r}."
        )
    if name == "channel_taylor":
        return channel_taylor(model, store, specs, batches, loss)
    if not isinstance(pattern, Head):
        raise BadInput(f'{name} is of heads of attention: say how many a layer has, pattern="head:12"; got {pattern}.')
    return head_gradient(model, store, specs, batches, loss, pattern)


def channel_taylor(
    model: nn.Module, store: MemoryStore, specs: Sequence[Spec], batches: Iterable[Any], loss: Loss
) -> Statistics:
    r"""``channel_taylor``, ``1/B Σ_b (Σ_i g_bi w_i)²`` over the weights of each output channel and its bias.

    Args:
        model: runs in evaluation mode; its ``.grad`` and ``requires_grad`` are as before afterwards.
        store: of the model.
        specs: weights with an output dimension.
        batches: iterated once; each gives one gradient.
        loss: ``loss(model, batch) -> scalar``.

    Returns:
        ``{tensor name: {"channel_taylor": (out,) float32}}``.

    Raises:
        BadInput: no batches, a loss that is no finite scalar with a graph, a weight that no loss depends on.
    """
    biases = {s.name: s for s in store.specs()}
    units = [_Channels(s, store.entry(s).tensor, _bias(s, biases, store)) for s in specs]
    parameters = [t for u in units for t in u.tensors]

    def add(value: Tensor, number: int) -> None:
        found = iter(torch.autograd.grad(value, parameters, allow_unused=True))
        for u in units:
            u.add([next(found) for _ in u.tensors])

    with differentiable(model, parameters):
        count = each_loss(loss, model, batches, add)
    return {u.spec.name: {"channel_taylor": u.mean(count)} for u in units}


def _bias(spec: Spec, specs: Mapping[str, Spec], store: MemoryStore) -> Tensor | None:
    if spec.bias is None or spec.bias not in specs:
        return None
    bias = store.entry(specs[spec.bias]).tensor
    return bias if spec.out_dim is not None and bias.shape == (spec.shape[spec.out_dim],) else None


@dataclass
class _Channels:
    """The output channels of one weight, and the sum of squares so far."""

    spec: Spec
    weight: Tensor
    bias: Tensor | None
    squares: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds one batch."""
        assert self.spec.out_dim is not None
        if grads[0] is None:
            return
        product = (grads[0].detach() * self.weight.detach()).movedim(self.spec.out_dim, 0).double()
        change = product.reshape(product.shape[0], -1).sum(1)
        if self.bias is not None and grads[1] is not None:
            change += (grads[1].detach() * self.bias.detach()).double()
        self.squares = change.square() if self.squares is None else self.squares + change.square()

    def mean(self, count: int) -> Tensor:
        """The statistic."""
        if self.squares is None:
            raise BadInput(
                f"the loss does not depend on {self.spec}: no batch's loss has a gradient there. Leave it out with ignore=, or "
                "take a loss that uses it."
            )
        return (_finite(self.squares, self.spec) / count).float()


def _finite(values: Tensor, what: object) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise BadInput(
            f"the gradients of {what} are NaN or infinite: look for a loss that overflows or divides by zero."
        )
    return values


def head_gradient(
    model: nn.Module, store: MemoryStore, specs: Sequence[Spec], batches: Iterable[Any], loss: Loss, pattern: Head
) -> Statistics:
    r"""``head_gradient``, ``1/N Σ_x |∂L(x) / ∂ξ_h|`` with ``ξ_h`` a factor at 1 on the output of each head, divided by the norm
    of the layer's.

    An input is one entry of a batch along dim 0; of outputs that have no other dim than features, one row. Where heads share
    keys and values, ``ξ`` is on the outputs of all of them.

    Args:
        model: runs in evaluation mode, with a hook on each output projection, which is gone afterwards; no ``.grad`` changes.
        store: of the model.
        specs: projections of attention that carry ``pattern``.
        batches: iterated once.
        loss: ``loss(model, batch) -> scalar``, a mean over the batch.
        pattern: how many heads a layer has.

    Returns:
        ``{tensor name: {"head_gradient": tensor}}``, float32, of a shape that broadcasts to the weight's: one value for a head.

    Raises:
        BadInput: no batches, a loss that is no finite scalar with a graph, an output projection that is not called as a module
            (that of `torch.nn.MultiheadAttention`) or that no loss depends on.
    """
    layers = {s.attention.layer: _Gates(s, pattern) for s in specs if s.attention and s.attention.dim == s.in_dim}
    owners = _owners(model, {id(store.entry(g.spec).tensor): g for g in layers.values()})

    def add(value: Tensor, number: int) -> None:
        gates = {g.gate: g for g in layers.values() if g.gate is not None}
        found = torch.autograd.grad(value, [*gates], allow_unused=True) if gates else ()
        for g, grad in zip(gates.values(), found, strict=True):
            g.add(grad)

    with differentiable(model), _hooked(owners):
        each_loss(loss, model, batches, add)
    means = {layer: g.mean() for layer, g in layers.items()}
    return {s.name: {"head_gradient": _spread(s, means[s.attention.layer])} for s in specs if s.attention}


@dataclass
class _Gates:
    """The factors on the heads of one layer, one for each input of the batch at hand, and what they tell."""

    spec: Spec
    pattern: Head
    gate: Tensor | None = None
    total: Tensor | None = None
    inputs: int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook: the input of the output projection times the factors."""
        x: Tensor = args[0]
        grid = self.pattern.grid(self.spec)
        if self.gate is None or len(self.gate) != len(x):
            self.gate = torch.ones(len(x), grid.units, dtype=x.dtype, device=x.device, requires_grad=True)
        at = units_along(grid.sections, grid.units).to(x.device)
        factors = self.gate[:, at].view(len(x), *(1,) * (x.dim() - 2), -1)
        return (x * factors, *args[1:])

    def add(self, grad: Tensor | None) -> None:
        """Adds one batch: the loss is a mean over its inputs, which weigh the same over all batches."""
        if grad is not None:
            own = grad.detach().abs().sum(0, dtype=torch.float64) * len(grad)
            self.total = own if self.total is None else self.total + own
            self.inputs += len(grad)
        self.gate = None

    def mean(self) -> Tensor:
        """One value for each head."""
        if self.total is None:
            raise BadInput(
                f"the loss does not depend on what comes into {self.spec}, or no batch reached it. Leave its layer out with "
                "ignore=, or take a loss that uses it."
            )
        mean = _finite(self.total, self.spec) / self.inputs
        return (mean / mean.norm().clamp_min(torch.finfo(torch.float64).tiny)).float()


def _owners(model: nn.Module, wanted: Mapping[int, _Gates]) -> list[tuple[nn.Module, _Gates]]:
    """The modules that hold the output projections.

    Raises:
        BadInput: one lies in `torch.nn.MultiheadAttention`, which computes with it without calling it.
    """
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = [(m, wanted[id(m.weight)]) for m in model.modules() if id(getattr(m, "weight", None)) in wanted]
    for m, g in found:
        if id(m) in inside:
            raise BadInput(
                f"{g.spec} belongs to torch.nn.MultiheadAttention, which does not call it as a module: gradients of its heads "
                "cannot be had. Leave it out with ignore=, or take another criterion."
            )
    return found


@contextmanager
def _hooked(owners: Sequence[tuple[nn.Module, _Gates]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, gates in owners:
            stack.callback(module.register_forward_pre_hook(gates).remove)
        yield


def _spread(spec: Spec, heads: Tensor) -> Tensor:
    """One value for each head, at each of its features, of as many dims as the weight."""
    assert spec.attention is not None
    at = units_along(spec.attention.sections, len(heads)).to(heads.device)
    return heads[at].view([len(at) if d == spec.attention.dim else 1 for d in range(len(spec.shape))])
