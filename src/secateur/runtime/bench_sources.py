"""The matrices of a target that packing is about: of a file or folder, packed or plain, of a model, or of a dict of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.lay_out import arranged, lay_out
from secateur.core.layouts import DTYPES, Layout, Parts
from secateur.core.packed import decode
from secateur.core.types import Spec
from secateur.errors import NothingChosen
from secateur.stores.base import Store
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.memory import MemoryStore
from secateur.stores.safetensors_file import DTYPES as CODES
from secateur.stores.safetensors_file import PACKED, SUFFIX, read_metadata, read_source

from .format import PackedSource
from .layers import PackedLayer
from .sites import Site, survey
from .weight import PackedWeight

Target = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Matrix:
    """A weight that may be packed.

    Attributes:
        name: as its store calls it.
        shape: ``(out, in)``.
        dtype: of its values.
        load: the weight as a contiguous matrix of that shape.
        file_bytes: that it takes in the file; ``None`` where it is in memory.
        layout: the one that it lies in already, in a packed model.
        lay: its parts in a layout, where they need not come from the whole matrix.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file_bytes: int | None = None
    layout: Layout | None = None
    lay: Callable[[Layout], Parts] | None = None

    def parts(self, layout: Layout) -> Parts:
        """The matrix in a layout."""
        return arranged(self.load(), layout) if self.lay is None else self.lay(layout)


@dataclass(frozen=True)
class Found:
    """What is in a target.

    Attributes:
        matrices: weights that may be packed.
        others: how to load each of the other tensors.
        nbytes: of the files.
    """

    matrices: list[Matrix]
    others: list[Callable[[], Tensor]] = field(default_factory=list)
    nbytes: int | None = None


def opened(target: Target) -> Found:
    """The weights of linear layers, of transformers' ``Conv1D`` and of 1×1 convolutions that packing would look at.

    Raises:
        NothingChosen: there are none.
    """
    if isinstance(target, nn.Module):
        found = Found(list(_of_model(target)))
    elif isinstance(target, Mapping):
        found = _of_store(MemoryStore(target))
    else:
        found = _of_path(Path(target))
    if not found.matrices:
        raise NothingChosen("there is no linear layer of float32, bfloat16 or float16 in it to pack.")
    return found


def _of_model(model: nn.Module) -> Iterator[Matrix]:
    specs, sites = survey(model)
    store = MemoryStore(model)
    for spec in specs:
        weight = store.entry(spec).tensor
        if site := sites.get(spec.name):
            rows, columns = site.matrix.shape
            yield Matrix(spec.name, (rows, columns), spec.dtype, partial(_of_site, site))
        elif isinstance(weight, PackedWeight):
            layer = weight.layer
            load, lay = partial(_of_layer, layer), partial(_parts_of, layer)
            yield Matrix(spec.name, layer.packed_shape, spec.dtype, load, layout=layer.packed_layout, lay=lay)


def _of_site(site: Site) -> Tensor:
    return site.matrix.contiguous()


def _of_layer(layer: PackedLayer) -> Tensor:
    return layer.as_matrix(layer.dense()).contiguous()


def _parts_of(layer: PackedLayer, layout: Layout) -> Parts:
    return layer.parts


def _of_path(path: Path) -> Found:
    folder, stored = read_source(path)
    files = {s.file for s in stored.values()}
    nbytes = sum((folder / f).stat().st_size for f in files)
    if any(PACKED in read_metadata(folder / f) for f in files if f.endswith(SUFFIX)):
        return _of_packed(PackedSource(path), nbytes)
    found = _of_store(CheckpointStore(path), in_file=True)
    return Found(found.matrices, found.others, nbytes)


def _of_store(store: Store, in_file: bool = False) -> Found:
    found = Found([])
    for spec in store.specs():
        read = partial(_read, store, spec)
        if shape := _shape(spec):
            nbytes = spec.numel * spec.dtype.itemsize if in_file else None
            found.matrices.append(Matrix(spec.name, shape, spec.dtype, partial(_as_matrix, spec, read), nbytes))
        else:
            found.others.append(read)
    return found


def _of_packed(source: PackedSource, nbytes: int) -> Found:
    known = {n: e for n, e in source.entries.items() if e.code in CODES}
    described = {n: torch.empty(e.shape, dtype=CODES[e.code], device="meta") for n, e in known.items()}
    found = Found([], nbytes=nbytes)
    for spec in MemoryStore(described).specs():
        read = partial(_decoded, source, spec.name)
        if shape := _shape(spec):
            lay = None if spec.role == "linear_transposed" else partial(_laid, source, spec.name)
            load, size = partial(_as_matrix, spec, read), known[spec.name].nbytes
            found.matrices.append(Matrix(spec.name, shape, spec.dtype, load, size, lay=lay))
        else:
            found.others.append(read)
    return found


def _decoded(source: PackedSource, name: str) -> Tensor:
    return decode(source.read(name))


def _laid(source: PackedSource, name: str, layout: Layout) -> Parts:
    return lay_out(source.read(name), layout)


def _read(store: Store, spec: Spec) -> Tensor:
    (part,) = store.parts(spec, "whole")
    return part.tensor.detach()


def _as_matrix(spec: Spec, read: Callable[[], Tensor]) -> Tensor:
    t = read()
    return (t.t() if spec.role == "linear_transposed" else t.flatten(1)).contiguous()


def _shape(spec: Spec) -> tuple[int, int] | None:
    """The shape of the matrix that a tensor is, where it may be packed."""
    if spec.skip is not None or spec.dtype not in DTYPES or not spec.numel:
        return None
    out, *others = spec.shape if spec.role != "linear_transposed" else spec.shape[::-1]
    if spec.role in ("linear", "linear_transposed") and len(others) == 1:
        return out, others[0]
    point = spec.role == "conv" and spec.groups == 1 and set(others[1:]) == {1}
    return (out, others[0]) if point else None
