"""What one of several processes does to train: a `Pruner` on a model under FSDP2, saved by several and taken up by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import secateur
from secateur import Pruner, schedules
from secateur.train.optimizers import STATE_KEYS
from tests.contract.sharded import Cut, everywhere, failure, fsdp, hybrid, local, same_values
from tests.contract.training import STEPS, net, train

HALF = STEPS // 2
TARGETS = {"unstructured": 0.75, "2:4": 0.5, "channel": 0.5}


def begun(pattern: str, cut: Cut | None, seed: int = 0) -> tuple[nn.Module, Optimizer, Pruner]:
    """A network, its optimizer and its pruner, made after it was cut."""
    model = net(seed)
    if cut is not None:
        cut(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    schedule = schedules.cubic(TARGETS[pattern], begin=1, end=6, every=2)
    return model, optimizer, Pruner(model, optimizer, schedule, pattern=pattern)


def check_zeros(model: nn.Module, pruner: Pruner, optimizer: Optimizer) -> None:
    """What is masked is zero where it lies, and so is what the optimizer remembers of it."""
    for name, mask in pruner.masks().items():
        p = model.get_parameter(name)
        dead = ~local(mask)
        assert not local(p)[dead].count_nonzero(), name
        for key, value in optimizer.state[p].items():
            if key in STATE_KEYS:
                assert not local(value)[dead].count_nonzero(), (name, key)


def trained(cut: Cut, patterns: Iterable[str] = TARGETS) -> None:
    """Cut and alone, training comes to the same, to the bit; zeros stay zeros all the way."""
    for pattern in patterns:
        alone, its_optimizer, its_pruner = begun(pattern, None)
        model, optimizer, pruner = begun(pattern, cut)
        for t in range(STEPS):
            train(alone, its_optimizer, range(t, t + 1))
            train(model, optimizer, range(t, t + 1))
            check_zeros(model, pruner, optimizer)
            assert pruner.sparsity == its_pruner.sparsity
            same_values(model, dict(alone.named_parameters()), f"{pattern} {t}")
        masks = its_pruner.masks()
        for name, mask in pruner.masks().items():
            assert isinstance(mask, DTensor)
            assert torch.equal(mask.full_tensor(), masks[name])
        assert abs(pruner.sparsity - TARGETS[pattern]) < 0.05


def held_without_schedule() -> None:
    """The fine-tuning line: what was pruned after it was cut stays at zero."""
    model = net()
    fsdp(model)
    secateur.prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = Pruner(model, optimizer)
    train(model, optimizer, range(STEPS))
    check_zeros(model, pruner, optimizer)
    assert pruner.sparsity == 0.5
    assert secateur.inspect(model).sparsity == 0.5


def state_of(model: nn.Module, optimizer: Optimizer, pruner: Pruner) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "pruner": pruner.state_dict()}


def saved(folder: Path) -> None:
    """Saves in the middle, goes on to the end, and leaves what came out."""
    for pattern in TARGETS:
        model, optimizer, pruner = begun(pattern, fsdp)
        train(model, optimizer, range(HALF))
        dcp.save(state_of(model, optimizer, pruner), checkpoint_id=folder / pattern)
        train(model, optimizer, range(HALF, STEPS))
        end = {n: p.full_tensor() for n, p in model.named_parameters() if isinstance(p, DTensor)}
        if dist.get_rank() == 0:
            torch.save({n: t.detach() for n, t in end.items()}, folder / f"{pattern}.pt")
        dist.barrier()


def taken_up(folder: Path, patterns: Iterable[str] = TARGETS) -> None:
    """Loads what other processes have saved, goes on, and comes to the same end, to the bit."""
    for pattern in patterns:
        model, optimizer, pruner = begun(pattern, fsdp, seed=1)
        state = state_of(model, optimizer, pruner)
        dcp.load(state, checkpoint_id=folder / pattern)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        assert pruner.steps == HALF
        check_zeros(model, pruner, optimizer)
        train(model, optimizer, range(HALF, STEPS))
        check_zeros(model, pruner, optimizer)
        same_values(model, torch.load(folder / f"{pattern}.pt"), pattern)


def refused_rewiring() -> None:
    """Masks that move look at whole tensors."""
    model = net()
    fsdp(model)
    how = secateur.dynamic.random_growth(every=2, end=8)
    error = failure(lambda: Pruner(model, None, schedules.constant(0.5), rewire=how))
    assert isinstance(error, secateur.errors.NotDefined)


def data_parallel() -> None:
    """Processes with whole copies of the model look once whether their masks agree."""
    rank = dist.get_rank()

    def pruner(seed: int) -> tuple[nn.Module, Optimizer, Pruner]:
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = schedules.one_shot(0.5, at=2)
        return model, optimizer, Pruner(model, optimizer, schedule, criterion=secateur.random(seed))

    model, optimizer, held = pruner(seed=3)
    train(model, optimizer, range(4))
    masks: list[dict[str, Tensor]] = everywhere(held.masks())
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    model, optimizer, held = pruner(seed=rank)
    error = failure(lambda: train(model, optimizer, range(4)))
    assert isinstance(error, secateur.BadInput)
    assert "holds other masks" in str(error)
    assert held.steps == 2


CASES: dict[int, dict[str, Callable[[Path], None]]] = {
    1: {"taken up": taken_up},
    2: {
        "trained": lambda folder: trained(fsdp),
        "held without schedule": lambda folder: held_without_schedule(),
        "saved": saved,
        "refused rewiring": lambda folder: refused_rewiring(),
        "data parallel": lambda folder: data_parallel(),
    },
    4: {
        "trained, hybrid": lambda folder: trained(hybrid, ["unstructured"]),
        "taken up": lambda folder: taken_up(folder, ["unstructured", "channel"]),
    },
}
