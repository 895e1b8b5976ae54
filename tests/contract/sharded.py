"""Ways to cut the test network over processes, and what must hold of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import secateur
from tests.contract.nets import bits
from tests.contract.table import expected_warnings

Cut = Callable[[nn.Module], object]


class Odd(nn.Module):
    """Shapes that no two processes share evenly: 13 rows, 3 rows, one row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.one = nn.Linear(7, 13), nn.Linear(13, 3), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(self.down(self.up(x).relu()).relu())
        return out


class Tied(nn.Module):
    """Two layers of one weight, and an output that is an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.b, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.b.weight, self.head.weight = self.a.weight, self.emb.weight


@cache
def whole_mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def square(*names: str) -> Any:
    """A mesh of two by two. Meshes are made once: each is several process groups."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


@cache
def pair() -> Any:
    """A mesh of two processes, which are not the first."""
    return DeviceMesh("cpu", [1, 3])


def fsdp(model: nn.Module) -> None:
    """All in one."""
    fully_shard(model, mesh=whole_mesh())


def layers(model: nn.Module) -> None:
    """Every other layer cut, the rest plain."""
    for i, child in enumerate(model.children()):
        if i % 2 == 0 and list(child.parameters()):
            fully_shard(child, mesh=whole_mesh())


def tensor_parallel(model: nn.Module) -> None:
    """The first linear layer by its outputs, the second by its inputs; the rest plain."""
    parallelize_module(model, whole_mesh(), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}, src_data_rank=None)


def replicated(model: nn.Module) -> None:
    """The first linear layer whole everywhere, the second in columns, the rest plain."""
    for name, placement in (("fc1", Replicate()), ("fc2", Shard(1))):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(
            distribute_tensor(layer.weight.detach(), whole_mesh(), [placement], src_data_rank=None)
        )


def both(model: nn.Module) -> None:
    """FSDP2 over tensor parallelism, on a mesh of two by two."""
    mesh = square("dp", "tp")
    parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["dp"])


def hybrid(model: nn.Module) -> None:
    """Copies of shards, on a mesh of two by two."""
    fully_shard(model, mesh=square("copies", "shards"))


def several_meshes(model: nn.Module) -> None:
    """One layer on all processes, one on each half of them, one on two of them alone."""
    fully_shard(model.get_submodule("fc1"), mesh=square("dp", "tp")["tp"])
    fully_shard(model.get_submodule("conv"), mesh=whole_mesh())
    layer = model.get_submodule("fc2")
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), pair(), [Shard(1)], src_data_rank=None))


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what lies here of one that is cut as ``like``, by torch's own doing."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def local(t: Tensor) -> Tensor:
    with torch.no_grad():
        return t.to_local() if isinstance(t, DTensor) else t.detach()


def same_values(model: nn.Module, want: Mapping[str, Tensor], what: str = "") -> None:
    """Every parameter is, where it lies here, what it is in the model in one process."""
    for name, p in model.named_parameters():
        assert bits(local(p)) == bits(shard_of(want[name].detach(), p)), f"{what} {name}"


def facts(report: secateur.Report) -> list[tuple[Any, ...]]:
    return [(r.name, r.shape, r.dtype, r.role, r.zeros, r.threshold, r.asked, r.skip) for r in report]


def the_same_as_alone(make: Callable[[], nn.Module], cut: Cut, what: str = "", **asked: Any) -> nn.Module:
    """Prunes a model cut and whole, and compares all that comes of it; the model that is cut."""
    alone, model = make(), make()
    cut(model)
    before = {n: (id(p), local(p).data_ptr()) for n, p in model.named_parameters()}
    with expected_warnings():
        want, got = secateur.prune(alone, **asked), secateur.prune(model, **asked)
    assert facts(got) == facts(want), what
    same_values(model, dict(alone.named_parameters()), what)
    assert before == {n: (id(p), local(p).data_ptr()) for n, p in model.named_parameters()}, what
    return model


def failure(call: Callable[[], object]) -> Exception:
    """The error of a call that must fail; all processes must fail."""
    try:
        call()
    except Exception as e:
        return e
    raise AssertionError("nothing was refused")


def everywhere(value: object) -> list[Any]:
    """A value of each process."""
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return told
