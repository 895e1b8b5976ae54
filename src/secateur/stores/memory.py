"""Tensors in memory: a module, a mapping of names to tensors, or a single tensor.

Parts are views of the target's own storage, so that writing them is writing the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.bits import pack
from secateur.core.select import identity
from secateur.core.types import Align, Part, Spec
from secateur.errors import BadInput, NothingChosen

from . import attention, checks, names, roles
from .checks import Entry
from .names import Held, Stored
from .roles import Fit, Owner
from .shards import here, is_sharded

Target = nn.Module | Mapping[str, Tensor] | Tensor
"""What `MemoryStore` takes."""


class MemoryStore:
    """Tensors of a module, a dict or one tensor, as a `secateur.stores.base.Store`.

    A module's parameters are listed, not its buffers. The same view of the same memory under several names is
    one tensor: it goes by the first registered name, the others are its aliases, and if one of them is an
    embedding, a position table or an output head, it is skipped like one.

    Args:
        target: an ``nn.Module`` in any wrapper; a mapping of names to tensors, such as a ``state_dict()``; or
            one tensor, which goes by the name ``"tensor"`` and is always chosen.
        roles: glob to role, for tensors whose role or orientation their names do not tell; see
            `secateur.stores.roles`. Later globs win.

    Raises:
        NothingChosen: a target without tensors.
        BadInput: a target of another type, keys or values of another type, unknown roles, names that collide.

    Example:
        >>> store = MemoryStore(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
        >>> for spec in store.specs():
        ...     print(spec.name, spec.shape, spec.role, spec.skip)
        0.bias (2,) bias a bias
        0.weight (2, 3) linear None
        1.bias (2,) bias a bias
        1.weight (2,) norm a norm or another per-channel scale
    """

    def __init__(self, target: Target, *, roles: Mapping[str, str] | None = None) -> None:
        self._single = isinstance(target, Tensor)
        stored, buffers, owners = _collect(target)
        self._entries = _entries(stored, buffers, owners, roles, self._single)
        if isinstance(target, Mapping) and not hasattr(target, "_metadata"):
            # Only a state_dict() is known to be in the order of the layers; a file's or a merged dict's order tells nothing.
            self._entries = [e._replace(spec=replace(e.spec, order=None)) for e in self._entries]
        self._by_name = {e.spec.name: e for e in self._entries}

    def specs(self) -> list[Spec]:
        """Every tensor, sorted by name; ``Spec.skip`` says why one is not chosen by default."""
        return [e.spec for e in self._entries]

    def every(self) -> list[Spec]:
        """Every parameter whose values can be counted, chosen or not: floating point and in memory."""
        return [e.spec for e in self._local(self._entries) if _countable(e)]

    def parts(self, spec: Spec, align: Align) -> Iterable[Part]:
        """One part: the whole tensor, detached, in the target's memory and with its strides. Nothing is cut.

        Raises:
            BadInput: a spec of another store.
        """
        return (Part(spec, self.values(spec), resident=True),)

    sum = staticmethod(identity)  # one worker: the core then knows that all there is lies in this memory

    def write(self, part: Part) -> None:
        """Nothing to do: a part is the target's own memory."""

    def check(self, specs: Sequence[Spec]) -> None:
        """Raises `BadTensor` for the first chosen one of ``specs`` that cannot be pruned. Reads no values.

        Refused are tensors without values (meta, lazy), of an unsupported dtype, layout or subclass, computed
        by a parametrisation or a mask, that cannot be written, or that share memory in part.
        """
        chosen = [self.entry(s) for s in specs if s.skip is None]
        checks.check(self._local(chosen), self._local(self._entries))

    def staged(self, out: None, overwrite: bool) -> AbstractContextManager[None]:
        """Memory is written in place."""
        return nullcontext()

    def entry(self, spec: Spec) -> Entry:
        """The tensor that a spec describes, and what checks know of it."""
        try:
            return self._by_name[spec.name]
        except KeyError:
            raise BadInput(f"{spec} is not a tensor of this store.") from None

    # What a `Pruner` holds goes by the values that lie in this process, which here are all there are.

    spread = False
    """Whether other processes hold parts of the tensors."""

    def together(self) -> AbstractContextManager[None]:
        """Inside it an error of one of several processes reaches all."""
        return nullcontext()

    def values(self, spec: Spec) -> Tensor:
        """The values of a tensor, detached, in the target's memory."""
        return self.entry(spec).tensor.detach()

    def counts(self, spec: Spec) -> bool:
        """Whether this process counts what it has of a tensor."""
        return True

    def like(self, spec: Spec, mask: Tensor) -> Tensor:
        """A mask of `values` as one of the tensor."""
        return mask

    def bits_here(self, spec: Spec, mask: Tensor) -> Tensor | None:
        """A mask of a tensor, bool or packed, as packed bits of `values`; ``None`` if it is none of such a tensor."""
        packed = pack(mask) if mask.dtype == torch.bool and mask.shape == spec.shape else mask
        return packed.clone() if packed.dtype == torch.uint8 and packed.numel() == (spec.numel + 7) // 8 else None

    def _local(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Entries with what lies in this process in place of the whole."""
        return entries


def _collect(target: Target) -> tuple[list[Stored], set[str] | None, dict[str, Owner]]:
    """The tensors of a target, the names of a module's buffers, and what its modules tell."""
    if isinstance(target, Tensor):
        return [Stored("tensor", "tensor", target)], None, {}
    if isinstance(target, nn.Module):
        tree = names.walk(target)
        if not tree.tensors:
            raise NothingChosen(f"this {type(target).__name__} has no parameters: there is nothing to prune.")
        return tree.tensors, tree.buffers, tree.owners
    if isinstance(target, Mapping):
        return _collect_mapping(target), None, {}
    raise BadInput(f"cannot prune {_described(target)}. {_instead(target)}")


def _collect_mapping(target: Mapping[str, Any]) -> list[Stored]:
    tensors: dict[str, Tensor] = {}
    for key, value in target.items():
        if not isinstance(key, str):
            raise BadInput(f"keys of a mapping are names of tensors; found {key!r}, {_described(key)}.")
        if isinstance(value, Tensor):
            tensors[key] = value
        elif key.rpartition(".")[2] != "_extra_state":  # from a module's get_extra_state()
            what = _described(value)
            raise BadInput(f"values of a mapping are tensors; {key!r} is {what}. {_inside(key, value)}")
    if not tensors:
        raise NothingChosen("the mapping has no tensors: there is nothing to prune.")
    canonical = names.canonical(tensors)
    return [Stored(key, canonical[key], t) for key, t in tensors.items()]


def _described(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _instead(target: object) -> str:
    """What to pass instead of a target of another type."""
    kind = type(target)
    if kind.__module__ == "numpy":
        return "Wrap it with torch.from_numpy(array): the tensor shares the array's memory."
    if kind.__name__ == "Report" and kind.__module__.startswith("secateur."):
        return "Pruning works in place and returns a report: go on with the model itself."
    if isinstance(target, torch.optim.Optimizer):
        return "Pass the model that it trains."
    if isinstance(target, (str, bytes, PathLike)):
        return "Pass a module, a dict of tensors or one tensor; a file is pruned to another, with out=."
    return "Pass an nn.Module, a dict of tensors (state_dict(), dict(named_parameters())) or one tensor."


def _inside(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return f"If these are the weights, pass target[{key!r}]."
    if isinstance(value, nn.Module):
        return f"Pass target[{key!r}] itself, or its state_dict()."
    if type(value).__module__ == "numpy":
        return "Wrap it with torch.from_numpy(array): the tensor shares the array's memory."
    if key.rpartition(".")[2] in ("_packed_params", "dtype", "param"):
        return "Quantised modules cannot be pruned; prune the floating-point model and quantise afterwards."
    return "Leave it out of the mapping."


def _shape(t: Tensor) -> tuple[int, ...]:
    return (0,) if is_lazy(t) else tuple(t.shape)


def _entries(
    stored: Sequence[Stored],
    buffers: set[str] | None,
    owners: Mapping[str, Owner],
    given: Mapping[str, str] | None,
    single: bool,
) -> list[Entry]:
    """One entry for each tensor, tied ones merged, sorted by name."""
    held = names.held({s.name: _shape(s.tensor) for s in stored}, buffers)
    found = list(stored)
    for i, s in enumerate(stored):
        if s.name in held and held[s.name].role == "weight":
            found[i] = s._replace(name=held[s.name].name)
    names.refuse_collisions((s.raw, s.name) for s in found)
    shapes = {s.name: _shape(s.tensor) for s in found}
    fits, chosen = _fits(found, shapes, owners, given, single)
    groups: dict[object, list[int]] = {}
    for i, s in enumerate(found):
        groups.setdefault(view_of(s.tensor), []).append(i)
    firsts = {found[i].name: found[group[0]].name for group in groups.values() for i in group}
    out = []
    for order, group in enumerate(groups.values()):
        spec = _spec([found[i] for i in group], fits, chosen, firsts, order, single)
        sources = [held[stored[i].name] for i in group if stored[i].name in held]
        out.append(_entry(spec, found[group[0]].tensor, sources, shapes))
    return _placed(sorted(out, key=lambda e: e.spec.name))


def _placed(entries: list[Entry]) -> list[Entry]:
    """The entries, those of projections of attention with their place in its layer."""
    found = attention.places([e.spec for e in entries])
    return [
        e._replace(spec=replace(e.spec, attention=found[e.spec.name])) if e.spec.name in found else e for e in entries
    ]


def _entry(spec: Spec, tensor: Tensor, sources: Sequence[Held], shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    """An entry, with what computes it or scales it."""
    scale = next((s for s in (f"{spec.name}_scale", f"{spec.name}_scale_inv") if s in shapes), None)
    weights = [s for s in sources if s.role == "weight"]
    if not sources or weights:
        return Entry(spec, tensor, weights[0].how if weights else None, scale)
    role = "buffer" if sources[0].role == "buffer" else "unknown"
    reason = f"belongs to {sources[0].name!r}, which is under {sources[0].how}"
    bare = replace(spec, role=role, out_dim=None, in_dim=None, batch_dims=(), bias=None, more_biases=(), skip=reason)
    return Entry(bare, tensor, sources[0].how)


def _fits(
    found: Sequence[Stored],
    shapes: Mapping[str, tuple[int, ...]],
    owners: Mapping[str, Owner],
    given: Mapping[str, str] | None,
    single: bool,
) -> tuple[dict[str, Fit], set[str]]:
    """Roles and dims of all tensors, and the names of those whose role the user gave."""
    fits = {n: roles.of_single(s) for n, s in shapes.items()} if single else roles.assign(shapes, owners)
    if given is None:
        return fits, set()
    specs = [Spec(s.name, shapes[s.name], s.tensor.dtype, fits[s.name].role, aliases=(s.raw,)) for s in found]
    resolved = roles.resolve(given, specs)
    again = roles.assign(shapes, owners, resolved)
    return fits | {name: again[name] for name in resolved}, set(resolved)


def view_of(t: Tensor) -> object:
    """A key that two tensors share exactly if they are the same view of the same memory."""
    if is_sharded(t):  # by its storage, since an empty shard has no address
        local = here(t)
        where = local.untyped_storage()._cdata, local.storage_offset(), local.shape, local.stride()
        return *where, t.shape, t.dtype, t.placements  # type: ignore[attr-defined]
    if type(t) not in checks.PLAIN or t.layout is not torch.strided or t.numel() == 0:
        return id(t)
    if t.is_meta:
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def _spec(
    group: Sequence[Stored],
    fits: Mapping[str, Fit],
    given: set[str],
    firsts: Mapping[str, str],
    order: int,
    single: bool,
) -> Spec:
    """The description of one tensor that goes by one or more names."""
    first = group[0]
    leading = first.name if len(group) == 1 else _leading([s.name for s in group], fits, given)
    fit = fits[leading]
    skip = None if single else roles.SKIPPED.get(fit.role)
    if len(group) > 1 and fit.role in roles.TABLES:
        skip = f"tied to {skip}" if leading == first.name else f"tied to {skip}, {leading!r}"
    # Of a tied weight's other layers, those whose outputs lie along the same dim.
    alike = [f for f in (fits[s.name] for s in group) if f.bias and (f.role, f.out_dim) == (fit.role, fit.out_dim)]
    more = dict.fromkeys(firsts[f.bias] for f in alike if f.bias and f.bias != fit.bias)
    t = first.tensor
    if fit.role in ("unknown", "bias") and not single and not t.is_floating_point() and not t.is_complex():
        fit, skip = Fit("buffer"), "integers, not weights"
    return Spec(
        first.name,
        _shape(t),
        t.dtype,
        fit.role,
        fit.out_dim,
        fit.in_dim,
        fit.batch_dims,
        fit.groups,
        firsts[fit.bias] if fit.bias else None,
        tuple(dict.fromkeys(n for s in group for n in (s.name, s.raw) if n != first.name)),
        skip,
        order=order,
        more_biases=tuple(n for n in more if not fit.bias or n != firsts[fit.bias]),
    )


def _leading(group: Sequence[str], fits: Mapping[str, Fit], given: set[str]) -> str:
    """The name whose role counts for a tied tensor: one the user gave, a table, a weight, or the first."""
    tables = [n for n in group if fits[n].role in roles.TABLES]
    weights = [n for n in group if fits[n].role not in roles.SKIPPED]
    return ([n for n in group if n in given] or tables or weights or list(group))[0]


def _is_parameter(entry: Entry) -> bool:
    return entry.spec.role != "buffer" and not entry.tensor.is_quantized


def _countable(entry: Entry) -> bool:
    return _is_parameter(entry) and entry.spec.dtype in checks.SUPPORTED and checks.is_plain(entry.tensor)
