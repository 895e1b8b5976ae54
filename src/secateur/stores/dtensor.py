"""Models that are cut over processes: modules and mappings that hold DTensors, under FSDP2, tensor parallelism or both.

Every process calls the same verb. Each looks at its own shards alone and only counts are added, so that the mask is, to the bit,
the one of the whole model in one process. What several processes have (a replicated tensor, a plain one) is counted by the
first of them, and the others take the mask over from it when it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod

import torch
from torch import Tensor, nn

from secateur.core.bits import keep_, pack, unpack
from secateur.core.criteria import describe, is_elementwise
from secateur.core.heads import UnitPattern
from secateur.core.keys import CHUNK, bits_of
from secateur.core.patterns import GroupPattern, Pattern
from secateur.core.request import Request
from secateur.core.spelling import describe_allocation
from secateur.core.types import Align, Part, Spec
from secateur.engines.ranks import Ranks
from secateur.errors import BadTensor, NotDefined

from .checks import Entry
from .memory import MemoryStore, Target
from .shards import Place, here, is_sharded, place_of, reshard, why_unknown


def live(target: Target, roles: Mapping[str, str] | None = None) -> MemoryStore:
    """The store of tensors in memory: a `ShardedStore` if one of them is a DTensor.

    >>> type(live(nn.Linear(2, 2))).__name__
    'MemoryStore'
    """
    if isinstance(target, nn.Module):
        reshard(target)
        tensors: Iterable[object] = target.parameters()
    else:
        tensors = target.values() if isinstance(target, Mapping) else (target,)
    return (ShardedStore if any(map(is_sharded, tensors)) else MemoryStore)(target, roles=roles)


class ShardedStore(MemoryStore):
    """Tensors of a module, a mapping or one DTensor, of which each process holds a part.

    Args:
        target, roles: as for `MemoryStore`; some of the tensors are DTensors, over any meshes.

    Raises:
        BadInput, NothingChosen: as `MemoryStore`.
    """

    spread = True

    def __init__(self, target: Target, *, roles: Mapping[str, str] | None = None) -> None:
        super().__init__(target, roles=roles)
        self._ranks = Ranks()
        places = [place_of(e.tensor, self._ranks.rank) for e in self._entries]
        if self._ranks.size > 1:
            self.sum = self._ranks.sum
            names = repr([(e.spec.name, e.spec.aliases, e.spec.shape, e.spec.dtype) for e in self._entries])
            self._ranks.agree(names.encode(), "all processes must hold parts of the same model")
            meshes = self._ranks.told(torch.tensor([p.mesh for p in places]))
            places = [p.beside(self._ranks.rank, meshes[:, i]) for i, p in enumerate(places)]
        self._places = {e.spec.name: p for e, p in zip(self._entries, places, strict=True)}

    def together(self) -> AbstractContextManager[None]:
        """See `MemoryStore.together`."""
        return self._ranks.together()

    def every(self) -> list[Spec]:
        """See `MemoryStore.every`; of what has yet to be summed there is nothing to count."""
        return [s for s in super().every() if why_unknown(self.entry(s).tensor) is None]

    def parts(self, spec: Spec, align: Align) -> Iterator[Part]:
        """What this process holds and counts of a tensor, detached, in its memory; an empty part where it counts nothing.

        What is no run of the whole tensor has the index of every element, a few rows at a time where it may be cut.
        """
        place, t = self._place(spec), self.values(spec)
        if not place.counts:
            yield Part(spec, t.new_empty(0), resident=True)
        elif (begin := place.begin) is not None:
            yield Part(spec, t, begin, resident=True)
        else:
            rows = len(t)
            if align not in ("whole", "resident"):
                together = max(1, align // prod(place.shape[1:])) if isinstance(align, int) else 1
                rows = max(1, CHUNK * len(t) // t.numel() // together) * together
            for a in range(0, len(t), rows):
                some = slice(a, a + rows)
                yield Part(spec, t[some], place.index(some).to(t.device), resident=True)

    def write(self, part: Part) -> None:
        """Writes the same zeros where other processes have the elements too; -0.0, which is no pruned weight, stays as it is."""
        tensor, t, place = self.entry(part.spec).tensor, self.values(part.spec), self._place(part.spec)
        if self._ranks.size > 1:
            self._ranks.go_on()
            for group, source in place.copies if t.numel() else ():
                keep_(t, self._ranks.copied(pack(bits_of(t) != 0), source, group))
            if place.peers and t.numel():
                keep_(t, self._ranks.handed(pack(bits_of(t) != 0), place.peers))
        torch.autograd.graph.increment_version(tensor)

    def check(self, specs: Sequence[Spec]) -> None:
        """See `MemoryStore.check`; refuses placements too that do not say which elements lie here."""
        chosen = [self.entry(s) for s in specs if s.skip is None]
        for e in chosen:
            if reason := why_unknown(e.tensor):
                raise BadTensor(f"cannot prune {e.spec}: {reason}.")
        super().check(specs)
        self._check_places([e.spec for e in chosen])

    def _check_places(self, specs: Sequence[Spec]) -> None:
        """Refuses shards that are not those that mesh and placements tell of, or that do not make up the whole."""
        places = [(s, self._place(s), self.values(s)) for s in specs]
        odd = [
            int(place.local_shape != tuple(t.shape) and max(prod(place.local_shape), t.numel()))
            for _, place, t in places
        ]
        held = [t.numel() if place.counts else 0 for _, place, t in places]
        for spec, wrong, count in zip(specs, *self.sum(torch.tensor([odd, held])).tolist(), strict=True):
            if wrong or count != spec.numel:
                placements = getattr(self.entry(spec).tensor, "placements", "none")
                raise BadTensor(
                    f"cannot prune {spec}: the shards of its processes, {count} elements, are not those that the placements "
                    f"{placements} make of it; distribute it anew (torch.distributed.tensor.distribute_tensor)."
                )

    def check_request(self, request: Request, specs: Sequence[Spec]) -> None:
        """Refuses what cannot be decided from shards, before anything is scored.

        Raises:
            NotDefined: a criterion that looks at whole tensors, and what `check_pattern` refuses.
            BadInput: the processes do not ask for the same.
        """
        c = request.criterion
        asked = (
            request.sparsity, request.threshold, describe(c), describe_allocation(request.allocation),
            request.pattern, request.max_sparsity, request.min_keep, request.nonfinite,
        )  # fmt: skip
        self.agree(
            repr((asked, [(s.name, s.skip) for s in specs])).encode(),
            "all processes must prune the same model in the same way",
        )
        if not is_elementwise(c):
            raise NotDefined(
                f"the criterion {describe(c)} looks at whole tensors, and no process has one: mark it with "
                "secateur.elementwise if it looks at single weights, or prune before the model is sharded."
            )
        self.check_pattern(request.pattern, specs)

    def check_pattern(self, pattern: Pattern, specs: Sequence[Spec]) -> None:
        """Refuses patterns whose units or groups cannot be compared from shards.

        Raises:
            NotDefined: a maximum over units; groups or rows that lie in several processes.
        """
        if isinstance(pattern, UnitPattern) and pattern.reduce == "max":
            raise NotDefined(
                f'reduce="max" of {pattern} is not defined for DTensors: a unit may lie in several processes, whose maxima do '
                'not add up. Say "l1", "l2" or "mean".'
            )
        if isinstance(pattern, GroupPattern):
            self._check_groups(pattern, [s for s in specs if s.skip is None and pattern.why_not(s) is None])

    def _check_groups(self, pattern: GroupPattern, specs: Sequence[Spec]) -> None:
        cut = [int(self._place(s).cuts_groups(pattern.grouping(s))) for s in specs]
        for spec, several in zip(specs, self.sum(torch.tensor(cut, dtype=torch.int64)).tolist(), strict=True):
            if several:
                what = "a row" if pattern.grouping(spec).groups == 1 else f"a group of {pattern}"
                raise NotDefined(
                    f"{what} of {spec} lies in several processes, placed {getattr(self.entry(spec).tensor, 'placements', '')}, "
                    "and its weights are compared with each other: cut it along another dim, or in whole groups."
                )

    def agree(self, facts: bytes, what: str) -> None:
        """Refuses facts that are not the same in all processes."""
        self._ranks.agree(facts, what)

    def values(self, spec: Spec) -> Tensor:
        """See `MemoryStore.values`; the shard that lies here."""
        return here(self.entry(spec).tensor).detach()

    def counts(self, spec: Spec) -> bool:
        """See `MemoryStore.counts`."""
        return self._place(spec).counts

    def like(self, spec: Spec, mask: Tensor) -> Tensor:
        """See `MemoryStore.like`; a DTensor of the tensor's own mesh and placements."""
        t = self.entry(spec).tensor
        if not is_sharded(t):
            return mask
        from torch.distributed.tensor import DTensor

        stride = torch.empty(spec.shape, device="meta").stride()
        return DTensor.from_local(mask, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=stride)  # type: ignore[attr-defined]

    def bits_here(self, spec: Spec, mask: Tensor) -> Tensor | None:
        """See `MemoryStore.bits_here`; takes DTensors, and masks of the whole tensor."""
        t = self.entry(spec).tensor
        if is_sharded(mask):
            alike = is_sharded(t) and (mask.device_mesh, mask.placements) == (t.device_mesh, t.placements)  # type: ignore[attr-defined]
            if alike and mask.dtype == torch.bool and mask.shape == t.shape:
                return pack(here(mask))
            mask = mask.full_tensor()  # type: ignore[attr-defined]
        whole = super().bits_here(spec, mask)
        if whole is None:
            return None
        return pack(self._place(spec).taken(unpack(whole, 0, spec.numel).view(spec.shape)))

    def _place(self, spec: Spec) -> Place:
        return self._places[self.entry(spec).spec.name]

    def _local(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries with what lies here in place of the whole."""
        return [e._replace(tensor=here(e.tensor)) for e in entries]
