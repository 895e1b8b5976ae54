"""Which elements of a DTensor lie in this process, from its mesh and placements alone.

Along each dim that is cut the elements are found by cutting the dim's indices as the placements cut the tensor, so that it
costs as much as the dim is long. ``Shard`` cuts as `torch.chunk` does; ``_StridedShard``, which FSDP2 leaves on what tensor
parallelism has cut before, cuts each of ``split_factor`` chunks and takes one piece of every one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.core.patterns import Grouping


def is_sharded(t: object) -> bool:
    """Whether a tensor is a DTensor. Where nobody has imported them, nothing is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def here(t: Tensor) -> Tensor:
    """The values of a tensor that lie in this process, in their own memory: all of them, or a DTensor's shard."""
    if not is_sharded(t):
        return t
    with torch.no_grad():
        local: Tensor = t.to_local()  # type: ignore[attr-defined]
    return local.detach()


def reshard(model: nn.Module) -> None:
    """Takes modules under ``fully_shard`` back to their shards: a forward pass may have left whole, short-lived copies."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def why_unknown(t: Tensor) -> str | None:
    """Why nobody can say which elements lie here, or ``None``."""
    for p in t.placements if is_sharded(t) else ():  # type: ignore[attr-defined]
        if not p.is_replicate() and not _cuts(p):
            return (
                f"its placement {p!r} is not one of values at hand (a Partial has yet to be summed); redistribute it to Shard "
                "or Replicate"
            )
    return None


@dataclass(frozen=True)
class Place:
    """The elements of one tensor that lie in this process.

    Attributes:
        shape: of the whole tensor.
        along: for each dim that is cut, the indices that lie here, ascending.
        counts: whether this process counts them. Where several have the same ones, the first does.
        copies: where others of the mesh have them too: ``(group, source)`` of `torch.distributed`, to be gone through in order.
        mesh: the first process of the mesh, counted from 1, and which of the mesh's this one is; zeros where it has none.
        peers: processes that have them on meshes of their own, the one that counts first. So it is with what tensor parallelism
            leaves alone and FSDP2 cuts: each column of the mesh has its copy.
    """

    shape: tuple[int, ...]
    along: dict[int, Tensor] = field(default_factory=dict)
    counts: bool = True
    copies: tuple[tuple[Any, int], ...] = ()
    mesh: tuple[int, int] = (0, 0)
    peers: tuple[int, ...] = ()

    def beside(self, rank: int, meshes: Tensor) -> Place:
        """With the ``peers`` that the ``mesh`` of every process (one in a row) shows."""
        first, at = meshes.unbind(1)
        peers = ((first > 0) & (at == self.mesh[1])).nonzero().flatten().tolist() if self.mesh[0] else []
        peers.sort(key=first.tolist().__getitem__)
        return replace(self, counts=self.counts and peers[0] == rank, peers=tuple(peers)) if len(peers) > 1 else self

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what lies here."""
        return tuple(len(self.along[d]) if d in self.along else size for d, size in enumerate(self.shape))

    @property
    def begin(self) -> int | None:
        """The flat index of the first element that lies here, if they are one run in the whole; else ``None``."""
        if not self.along or not prod(self.local_shape):
            return 0
        first = min(self.along)
        at = self.along[first]
        one_run = len(self.along) == 1 and prod(self.shape[:first]) == 1 and int(at[-1] - at[0]) == len(at) - 1
        return int(at[0]) * prod(self.shape[first + 1 :]) if one_run else None

    def index(self, rows: slice = slice(None)) -> Tensor:
        """The flat index of each element of what lies here, or of some rows of it (along dim 0); int64, of their shape."""
        index = torch.zeros((), dtype=torch.int64)
        for d, size in enumerate(self.shape):
            own = self.along[d] if d in self.along else torch.arange(size)
            own = own[rows] if d == 0 else own
            index = index.unsqueeze(-1) + own * prod(self.shape[d + 1 :])
        return index

    def taken(self, whole: Tensor) -> Tensor:
        """Of a tensor of the whole shape, what lies here."""
        for d, at in self.along.items():
            whole = whole.index_select(d, at.to(whole.device))
        return whole

    def cuts_groups(self, grouping: Grouping) -> bool:
        """Whether some group lies here in part."""
        for d, at in self.along.items():
            inner = prod(self.shape[d + 1 :])
            size = min(self.shape[d], max(1, grouping.run // max(1, inner)))
            if len(at) % size:
                return True
            runs = at.view(-1, size)
            if bool((runs[:, 0] % size != 0).any()) or bool((runs[:, -1] - runs[:, 0] != size - 1).any()):
                return True
        return False


def place_of(t: Tensor, rank: int) -> Place:
    """Where a tensor lies. A plain one is whole in every process, and the one of ``rank`` 0 counts it.

    >>> place_of(torch.zeros(2, 3), rank=1).counts
    False
    """
    if not is_sharded(t):
        return Place(tuple(t.shape), counts=rank == 0, copies=((None, 0),))
    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    where = mesh.get_coordinate()
    if where is None:
        return Place(tuple(t.shape), {d: torch.arange(0) for d in range(t.ndim)}, counts=False)
    copied = [i for i, p in enumerate(placements) if p.is_replicate() and mesh.size(i) > 1]
    copies = [(mesh.get_group(i), int(mesh.mesh[(*where[:i], 0, *where[i + 1 :])])) for i in copied]
    ways = [(p, mesh.size(i), where[i]) for i, p in enumerate(placements) if _cuts(p)]
    mine = int(mesh.mesh.min()) + 1, int((mesh.mesh.flatten() == dist.get_rank()).nonzero()[0])
    return Place(tuple(t.shape), _along(t.shape, ways), all(where[i] == 0 for i in copied), tuple(copies), mine)


def _along(shape: Sequence[int], ways: Sequence[tuple[Any, int, int]]) -> dict[int, Tensor]:
    """For each dim that is cut, the indices that are left after cuts ``(placement, into how many, which one)`` in turn."""
    found: dict[int, Tensor] = {}
    for placement, pieces, which in ways:
        at = found.get(placement.dim, torch.arange(shape[placement.dim]))
        blocks = at.chunk(getattr(placement, "split_factor", 1))
        found[placement.dim] = torch.cat([_chunk(b, pieces, which) for b in blocks])
    return {d: at for d, at in found.items() if len(at) != shape[d]}


def _chunk(at: Tensor, pieces: int, which: int) -> Tensor:
    """One piece of `torch.chunk`, which leaves the last ones out where there is nothing for them."""
    found = at.chunk(pieces)
    return found[which] if which < len(found) else at[:0]


def _cuts(placement: Any) -> bool:
    return type(placement).__name__ in ("Shard", "_StridedShard")
