"""What a model's ``state_dict`` holds, and which tensors of a packed file go there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.packed import Packed
from secateur.errors import BadInput, BadTensor
from secateur.stores import checks, names
from secateur.stores.memory import view_of

from .format import PackedSource
from .unfilled import unfilled


@dataclass
class Slot:
    """A tensor that a model wants, tied ones once.

    Attributes:
        shape: its own.
        trained: whether a parameter asks for gradients; ``None`` for a buffer.
        names: canonical names, the first registered first.
        holders: the modules that hold it, and what they call it.
    """

    shape: tuple[int, ...]
    trained: bool | None
    names: list[str] = field(default_factory=list)
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)

    def fill(self, value: Tensor) -> None:
        """Puts a tensor wherever this one is held."""
        if self.trained is None:
            for module, leaf in self.holders:
                module._buffers[leaf] = value
        else:
            parameter = nn.Parameter(value, self.trained and value.is_floating_point())
            for module, leaf in self.holders:
                module._parameters[leaf] = parameter


def slots_of(model: nn.Module) -> list[Slot]:
    """What a model wants: its parameters and persistent buffers.

    Raises:
        BadTensor: one that cannot be filled.
    """
    tree = names.walk(model)
    out: dict[object, Slot] = {}
    wanted: list[tuple[str, Tensor, bool | None]] = [(s.name, s.tensor, s.tensor.requires_grad) for s in tree.tensors]
    wanted += [(name, t, None) for name, t, persistent in _buffers(tree) if persistent]
    for name, t, trained in wanted:
        if is_lazy(t) or type(t) not in checks.PLAIN or t.device.type not in ("cpu", "meta"):
            where = "lazy" if is_lazy(t) else f"a {type(t).__name__} on {t.device}"
            raise BadTensor(f"cannot fill {name!r}: it is {where}; a model is filled on the CPU, in plain tensors.")
        slot = out.setdefault(view_of(t), Slot(tuple(t.shape), trained))
        path, _, leaf = name.rpartition(".")
        slot.names.append(name)
        slot.holders.append((tree.modules[path], leaf))
    return list(out.values())


def _buffers(tree: names.Tree) -> list[tuple[str, Tensor, bool]]:
    """Name of each buffer, itself, and whether a ``state_dict`` holds it."""
    return [
        (f"{path}.{leaf}" if path else leaf, b, leaf not in module._non_persistent_buffers_set)
        for path, module in tree.modules.items()
        for leaf, b in module._buffers.items()
        if b is not None
    ]


def matched(source: PackedSource, slots: Sequence[Slot], model: nn.Module) -> list[list[str]] | str:
    """The file's names for each tensor of a model; or what does not agree, in words.

    There is more than one name where the file holds a tied tensor twice. What the file holds of buffers that the model does
    not store any more, as older versions of transformers did, is left.
    """
    stored = {canonical: name for name, canonical in names.canonical(source.entries).items()}
    tied = {alias: first for known in source.metadata.values() for alias, first in known.items() if first in stored}
    found, left = [], set(stored)
    for slot in slots:
        at = [n for n in slot.names if n in stored] or [tied[n] for n in slot.names if n in tied]
        if not at:
            return f"{slot.names[0]!r} {slot.shape} is in the model alone"
        entries = [source.entries[stored[n]] for n in at]
        if other := next((e.shape for e in entries if e.shape != slot.shape), None):
            return f"{slot.names[0]!r} is {slot.shape} in the model and {other} in the file"
        left -= set(at)
        found.append([e.name for e in entries])
    left -= {name for name, _, persistent in _buffers(names.walk(model)) if not persistent}
    return f"{some(sorted(left))} in the file alone" if left else found


def some(found: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(repr(n) for n in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def read(source: PackedSource, stored: Sequence[str]) -> Packed:
    """A tensor of a file, which may hold it under several names.

    Raises:
        BadInput: it contradicts itself, or the others.
    """
    first = source.read(stored[0])
    for name in stored[1:]:
        other = source.read(name)
        same = other.encoding == first.encoding and other.dtype == first.dtype
        if not same or any(not _same_bits(t, first.parts[part]) for part, t in other.parts.items()):
            raise BadInput(f"{stored[0]!r} and {name!r} are one tensor in the model, and differ in {source.path}.")
    return first


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def computed(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Values for buffers that have none and are in no file: of a model of transformers, those of another that is built.

    Raises:
        BadTensor: there are none.
    """
    tree = names.walk(model)
    empty = [name for name, b, persistent in _buffers(tree) if not persistent and b.is_meta]
    if not empty:
        return []
    values: dict[str, Tensor] = {}
    build = getattr(type(model), "_from_config", None)
    if build is not None:
        with unfilled():
            twin: nn.Module = build(copy.deepcopy(model.config))
        values = {name: b for name, b, _ in _buffers(names.walk(twin)) if not b.is_meta}
    if lacking := [name for name in empty if name not in values]:
        raise BadTensor(
            f"the buffers {some(lacking)} have no values, and no file holds them: build the model inside "
            "secateur.runtime.unfilled.unfilled() instead of torch.device('meta'), or on the CPU."
        )
    paths = [(name, *name.rpartition(".")[::2]) for name in empty]
    return [(tree.modules[path], leaf, values[name]) for name, path, leaf in paths]
