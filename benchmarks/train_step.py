"""What holding zeros costs a training step: AdamW on a residual MLP of 28 M weights, 90 % sparse, beside the dense step.

Flush-to-zero is on: Adam's second moments of weights that get no gradient decay through the denormals, which would slow
every candidate down and say nothing of masks.

AdamW comes twice: fused, and as torch makes it by default, where the square root of the second moments is MKL's, which is six
times slower on zeros than on other numbers: whoever masks gradients pays that, whatever the masks cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import secateur
from benchmarks import machine
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import spread, take_turns

WIDTH, BLOCKS, CLASSES = 1024, 13, 10
NARROW, STEPS, UPDATES, MOST_OF_A_RUN = 256, 1000, 100, 1.03
"""A run that prunes gradually: width, batch and steps of it, how often its masks change, and the bar for the whole."""
SPARSITY = 0.9
MOST = {64: 1.10, 256: 1.05, 1024: 1.02}
"""The bar for each batch size: our step as a multiple of the dense one."""


class ResidualMLP(nn.Module):
    """13 blocks ``x + W2 relu(W1 norm(x))``, all 1024 wide if not told otherwise, and an output: 27.3 M weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(BLOCKS)
        )
        self.output = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width)`` to logits ``(n, 10)``."""
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


def _network(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return ResidualMLP(width)


def _step_of(model: nn.Module, batch: int, fused: bool, width: int = WIDTH) -> Callable[[], None]:
    """One update, on the same batch each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, width, generator=generator)
    y = torch.randint(CLASSES, (batch,), generator=generator)
    return partial(_update, model, optimizer, x, y)


def _update(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def ours(batch: int, fused: bool) -> Callable[[], None]:
    """With a `secateur.Pruner`."""
    model = _network()
    secateur.prune(model, SPARSITY)
    step = _step_of(model, batch, fused)
    secateur.Pruner(model, step.args[1])  # type: ignore[attr-defined]
    return step


def torchs(batch: int, fused: bool) -> Callable[[], None]:
    """With ``torch.nn.utils.prune``, which multiplies by a mask in every forward pass."""
    model = _network()
    pairs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=SPARSITY)
    return _step_of(model, batch, fused)


def boolean(batch: int, fused: bool) -> Callable[[], None]:
    """With a bool mask a weight and ``masked_fill_`` after the step."""
    model = _network()
    secateur.prune(model, SPARSITY)
    gone = [(p, p == 0) for p in model.parameters() if p.ndim == 2]
    step = _step_of(model, batch, fused)

    def update() -> None:
        step()
        with torch.no_grad():
            for p, where in gone:
                p.masked_fill_(where, 0.0)

    return update


def whole_run(steps: int, pruned: bool) -> None:
    """Trains from scratch; pruned, it is gradual pruning to 90 % in 100 changes of the masks."""
    model = _network(NARROW)
    step = _step_of(model, NARROW, True, NARROW)
    if pruned:
        every = max(1, steps // 2 // UPDATES)
        schedule = secateur.schedules.cubic(SPARSITY, begin=steps // 10, end=steps // 10 + UPDATES * every, every=every)
        secateur.Pruner(model, step.args[1], schedule)  # type: ignore[attr-defined]
    for _ in range(steps):
        step()


CANDIDATES = {
    "dense": lambda batch, fused: _step_of(_network(), batch, fused), "secateur.Pruner": ours,
    "bool masks, masked_fill_": boolean, "torch.nn.utils.prune": torchs,
}  # fmt: skip


def run(full: bool) -> Result:
    """Measures everything this page is about, on one thread."""
    before, threads, repeats = machine.load(), torch.get_num_threads(), 15 if full else 5
    rows, bars = [], []
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    try:
        for fused, (batch, most) in product((True, False), MOST.items()):
            kind = "fused" if fused else "default"
            steps = {name: make(batch, fused) for name, make in CANDIDATES.items()}
            times = take_turns(steps, lambda: None, repeats)
            ratios = {name: t.per(times["dense"]) for name, t in times.items()}
            rows.append(
                (f"{kind}, {batch}", times["dense"].milliseconds(), *(spread(ratios[n]) for n in list(CANDIDATES)[1:]))
            )
            bars.append(
                Bar(
                    f"{kind} AdamW, batch {batch}: step, of the dense one",
                    statistics.median(ratios["secateur.Pruner"]),
                    most,
                )
            )
        steps = STEPS if full else STEPS // 4
        runs = take_turns(
            {"dense": partial(whole_run, steps, False), "gradual": partial(whole_run, steps, True)}, lambda: None, 5
        )
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    weights = sum(p.numel() for p in _network().parameters() if p.ndim == 2)
    title = (
        f"AdamW, {weights / 1e6:.1f} M weights, {SPARSITY:.0%} sparse, one thread, {repeats} turns: median (min–max)"
    )
    tables = [Table(title, ("<AdamW, batch", "dense step, ms", *(f"× dense: {n}" for n in list(CANDIDATES)[1:])), rows)]
    ratios_of_runs = runs["gradual"].per(runs["dense"])
    title = f"Gradual pruning with {UPDATES} changes of the masks: {steps} steps, fused AdamW, batch and width {NARROW}"
    tables.append(Table(title, ("dense, ms", "× dense"), [(runs["dense"].milliseconds(), spread(ratios_of_runs))]))
    whole = statistics.median(ratios_of_runs)
    bars.append(Bar(f"{UPDATES} changes of the masks in {steps} steps: run, of the dense one", whole, MOST_OF_A_RUN))
    command = f"python -m benchmarks train_step{' --full' if full else ''}"
    return Result("train_step", command, machine.machine(before), tables, bars)
