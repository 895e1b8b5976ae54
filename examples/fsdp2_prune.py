"""Pruning a model that is cut over processes by FSDP2, while it trains, with a checkpoint that any number of processes takes up.

``torchrun --standalone --nproc-per-node 2 examples/fsdp2_prune.py [FOLDER]``

On CPUs by gloo; on GPUs put model and batches on them and choose nccl. FOLDER gets the checkpoint; one that is there is taken up.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import secateur

STEPS = 60


def main(folder: Path | None) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
    for layer in model[::2]:
        fully_shard(layer)
    fully_shard(model)

    # After the model is cut, like the optimizer: both look at the parameters that train.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = secateur.Pruner(model, optimizer, secateur.schedules.cubic(0.9, begin=10, end=50, every=5))
    if folder is not None and folder.exists():
        load(folder, model, optimizer, pruner)

    x, target = torch.randn(256, 32), torch.randint(8, (256,))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    while pruner.steps < STEPS:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[mine]), target[mine])
        loss.backward()
        optimizer.step()
        if pruner.steps % 20 == 0 and dist.get_rank() == 0:
            print(f"step {pruner.steps}: sparsity {pruner.sparsity:.3f}, loss {float(loss):.3f}")
    if folder is not None:
        dcp.save(state_of(model, optimizer, pruner), checkpoint_id=folder)

    report = secateur.inspect(model)  # every process asks: it is counted over all of them
    if dist.get_rank() == 0:
        print(f"{report.zeros} of {report.total} weights are zero")
    dist.destroy_process_group()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: secateur.Pruner) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "pruner": pruner.state_dict()}


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: secateur.Pruner) -> None:
    state = state_of(model, optimizer, pruner)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    pruner.load_state_dict(state["pruner"])  # last: get_state_dict of a new optimizer makes a step that moves nothing


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
