"""Tensors that are to be packed, wherever they are: a name, what is known of each, and how to come by its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from secateur.errors import BadInput, BadTensor, NothingChosen
from secateur.stores import names
from secateur.stores.checks import is_plain
from secateur.stores.memory import view_of
from secateur.stores.safetensors_file import PACKED, Stored, read_metadata, read_raw, read_source, read_tensor

from .format import CODES


class Item(NamedTuple):
    """One tensor: ``read`` gives its values on the CPU, of a dtype that torch does not know its bytes."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


class Source(NamedTuple):
    """The tensors that go into one file, and its metadata."""

    file: str
    items: list[Item]
    metadata: dict[str, str]


def on_disk(path: Path) -> list[Source]:
    """The weight files of a path.

    Raises:
        BadInput: as `secateur.stores.safetensors_file.read_source`; or a file that is packed already.
        NothingChosen: no tensors.
    """
    folder, stored = read_source(path)
    if not stored:
        raise NothingChosen(f"{path} holds no tensors.")
    found = []
    for file in sorted({s.file for s in stored.values()}):
        metadata = read_metadata(folder / file)
        if PACKED in metadata:
            raise BadInput(f"{file} is packed already.")
        items = [_stored(n, folder / file, s) for n, s in stored.items() if s.file == file]
        found.append(Source(file, items, metadata))
    return found


def _stored(name: str, path: Path, s: Stored) -> Item:
    read = read_raw if s.dtype is None else read_tensor
    return Item(name, s.code, s.shape, s.stop - s.start, partial(read, path, s))


def in_memory(target: nn.Module | Mapping[str, Tensor], file: str) -> Source:
    """The tensors of a module or a dict.

    A module's go by the names they have without wrappers. Of those that are the same view of the same memory the first in
    order of names is taken, and the metadata says of each other which that is, as ``safetensors.torch.save_model`` does.

    Raises:
        BadInput: a target of another type, or one that holds something else than tensors.
        BadTensor: a tensor without plain values in memory, or of a dtype that safetensors does not have.
        NothingChosen: no tensors.
    """
    held: Mapping[str, Any]
    if isinstance(target, nn.Module):
        raw = target.state_dict()
        canonical = names.canonical(raw)
        names.refuse_collisions((r, canonical[r]) for r in raw)
        held = {canonical[r]: t for r, t in raw.items()}
    elif isinstance(target, Mapping):
        held = target
    else:
        raise BadInput(f"a module, a dict of tensors or a path can be packed; got a {type(target).__qualname__}.")
    if not held:
        raise NothingChosen(f"this {type(target).__name__} holds no tensors.")
    items, metadata = [], {"format": "pt"}
    seen: dict[object, str] = {}
    for name in sorted(held, key=str):
        item = _held(name, held[name])
        first = seen.setdefault(view_of(held[name]), name) if isinstance(target, nn.Module) else name
        if first == name:
            items.append(item)
        else:
            metadata.setdefault(name, first)
    return Source(file, items, metadata)


def _held(name: Any, t: Any) -> Item:
    if name == "__metadata__":
        raise BadInput("a tensor cannot be called '__metadata__', which is what safetensors calls something else.")
    if not isinstance(name, str) or not isinstance(t, Tensor):
        raise BadInput(f"only tensors under their names can be packed; {name!r} is a {type(t).__qualname__}.")
    if not is_plain(t) or t.is_quantized or t.dtype not in CODES:
        raise BadTensor(
            f"cannot pack {name!r} ({type(t).__qualname__}, {t.layout}, {t.dtype}, {t.device}): only plain tensors that "
            "have values and a dtype of safetensors can be stored."
        )
    nbytes = t.numel() * t.element_size()
    return Item(name, CODES[t.dtype], tuple(t.shape), nbytes, lambda: t.detach().resolve_conj().resolve_neg().cpu())
