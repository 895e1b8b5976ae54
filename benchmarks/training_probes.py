"""The questions about training: what becomes of zeros, of results and of checkpoints while a pruned model learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.tools import Answer, Tool, sparsity_of
from secateur import schedules

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def _batch(step: int) -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(step))


def _step(model: nn.Module, optimizer: Optimizer, step: int) -> float:
    """One update of a model that learns to turn its input around."""
    optimizer.zero_grad()
    x = _batch(step)
    loss = (model(x) - x.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def held(tool: Tool, steps: int = 100) -> Answer:
    """P3. Pruned to 0.5 in the middle of a training, with momentum and weight decay, what is pruned and what the optimizer
    remembers of it are zero after each of 100 more steps, and once the tool has left the model."""
    seen, passed = [], True
    for name, make in OPTIMIZERS.items():
        model = _network()
        optimizer = make(model.parameters())
        for t in range(10):
            _step(model, optimizer, t)
        layers = [m for m in model if isinstance(m, nn.Linear)]
        for layer in layers:
            tool.prune(layer, 0.5)
        gone = [layer.weight.detach() == 0 for layer in layers]
        finish = tool.hold(model, optimizer)
        alive = remembered = 0
        for t in range(10, 10 + steps):
            _step(model, optimizer, t)
            alive, remembered = max(alive, _alive(layers, gone)), max(remembered, _remembered(optimizer, layers, gone))
        finish()
        alive, remembered = max(alive, _alive(layers, gone)), max(remembered, _remembered(optimizer, layers, gone))
        total = sum(int(g.sum()) for g in gone)
        passed &= not alive and not remembered
        seen.append(f"{name}: of {total:,} pruned weights {alive:,} not zero, {remembered:,} with a moment")
    return Answer(passed, "; ".join(seen))


def _alive(layers: list[nn.Linear], gone: list[Tensor]) -> int:
    """How many pruned weights are not zero where the forward pass uses them."""
    return sum(int(layer.weight.detach()[g].count_nonzero()) for layer, g in zip(layers, gone, strict=True))


def _remembered(optimizer: Optimizer, layers: list[nn.Linear], gone: list[Tensor]) -> int:
    """How many pruned weights have a moment that is not zero."""
    found = 0
    for layer, g in zip(layers, gone, strict=True):
        (parameter,) = (p for p in layer.parameters() if p.ndim == 2)
        moments = [t for t in optimizer.state[parameter].values() if t.shape == g.shape]
        found += int(torch.stack([t[g] != 0 for t in moments]).any(0).sum())
    return found


class Attention(nn.Module):
    """`nn.MultiheadAttention` over four words of four numbers."""

    names = ("inner.in_proj_weight", "inner.out_proj.weight")

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of a text to itself."""
        words = x.view(-1, 4, 4)
        out: Tensor = self.inner(words, words, words)[0]
        return out.flatten(1)


class Recurrent(nn.Module):
    """`nn.LSTM` over the same words, of which the state of each is read."""

    names = ("inner.weight_ih_l0", "inner.weight_hh_l0")

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The states, one after another."""
        out: Tensor = self.inner(x.view(-1, 4, 4))[0]
        return out.flatten(1)


def packed(tool: Tool) -> Answer:
    """P5. `nn.MultiheadAttention` and `nn.LSTM`, pruned to 0.5, train: 20 steps, a lower loss, the same zeros."""
    seen = {kind.__name__: _trained(tool, kind) for kind in (Attention, Recurrent)}
    told = ", ".join(f"{name} {answer.seen}" for name, answer in seen.items())
    return Answer(all(answer.passed for answer in seen.values()), told)


def _trained(tool: Tool, kind: type[Attention] | type[Recurrent]) -> Answer:
    torch.manual_seed(0)
    model = kind()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    for name in kind.names:
        tool.prune_named(model, name, 0.5)
    tool.hold(model, optimizer)
    losses: list[float] = []
    try:
        for t in range(20):
            losses.append(_step(model, optimizer, t))
    except RuntimeError as e:
        return Answer(False, f"raises {type(e).__name__} at step {len(losses) + 1}")
    sparsities = [sparsity_of(_weight(model, name)) for name in kind.names]
    passed = set(sparsities) == {0.5} and sum(losses[-5:]) < sum(losses[:5])
    return Answer(passed, f"{' and '.join(f'{s:g}' for s in sparsities)}, loss {losses[0]:.3f} to {losses[-1]:.3f}")


def _weight(model: nn.Module, name: str) -> Tensor:
    """A tensor as the forward pass uses it, a parameter or not."""
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def compiled(tool: Tool) -> Answer:
    """P6. Compiled as one graph and then pruned more, a model gives the result of the new mask, and is not compiled again."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, x = _network(), _batch(0)
    layer = model[0]
    tool.prune(layer, 0.25)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    try:
        before = fast(x).detach()
        tool.prune(layer, 0.75)
        after = fast(x).detach()
    except torch._dynamo.exc.Unsupported as e:
        return Answer(False, f"raises {type(e).__name__}")
    fresh = torch.equal(after, model(x)) and not torch.equal(after, before)
    times = {1: "once", 2: "twice"}.get(len(graphs), f"{len(graphs)} times")
    return Answer(fresh and len(graphs) == 1, f"{'the new' if fresh else 'a stale'} result, compiled {times}")


def resumed(tool: Tool) -> Answer:
    """P10. Interrupted in the middle of a schedule and resumed from a checkpoint, a training ends with the same bits."""
    schedule, steps, cut = schedules.cubic(0.8, begin=2, end=18, every=4), 24, 9

    def begin() -> tuple[nn.Module, Optimizer, Any]:
        model = _network()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        return model, optimizer, tool.gradual(model, optimizer, schedule)

    def go(run: tuple[nn.Module, Optimizer, Any], first: int, last: int) -> None:
        for t in range(first, last):
            _step(run[0], run[1], t)
            run[2].stepped(t + 1)

    whole = begin()
    go(whole, 0, cut)
    checkpoint = copy.deepcopy(whole[2].state())
    go(whole, cut, steps)
    again = begin()
    again[2].load(checkpoint)
    go(again, cut, steps)
    a, b = _tensors(whole[2].state()), _tensors(again[2].state())
    odd = [name for name in {*a, *b} if name not in a or name not in b or not torch.equal(a[name], b[name])]
    return Answer(
        not odd, f"{len({*a, *b}) - len(odd)} of {len({*a, *b})} tensors of the checkpoints at the end are equal"
    )


def _tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts, by its path."""
    if isinstance(value, Tensor):
        return {path: value}
    found: dict[str, Tensor] = {}
    for key, inner in value.items() if isinstance(value, dict) else ():
        found |= _tensors(inner, f"{path}/{key}")
    return found


TRAINING_PROBES: dict[str, Callable[[Tool], Answer]] = {"P3": held, "P5": packed, "P6": compiled, "P10": resumed}
