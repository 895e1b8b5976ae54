"""The matrices of a target that packing is about: of a file, a folder, a model, or a dict of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.layouts import DTYPES
from secateur.core.types import Spec
from secateur.errors import NothingChosen
from secateur.stores.base import Store
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.memory import MemoryStore

Target = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Matrix:
    """A weight that may be packed.

    Attributes:
        name: as its store calls it.
        shape: ``(out, in)``.
        dtype: of its values.
        load: the weight as a contiguous matrix of that shape.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def matrices(target: Target) -> list[Matrix]:
    """The weights of linear layers, of transformers' ``Conv1D`` and of 1×1 convolutions that pruning would choose.

    Raises:
        NothingChosen: there are none.
    """
    store = CheckpointStore(target) if isinstance(target, str | os.PathLike) else MemoryStore(target)
    found = list(_of_store(store))
    if not found:
        raise NothingChosen("there is no linear layer of float32, bfloat16 or float16 in it to pack.")
    return found


def _of_store(store: Store) -> Iterator[Matrix]:
    for spec in store.specs():
        if spec.skip is None and spec.dtype in DTYPES and (shape := _shape(spec)) and shape[0] * shape[1]:
            yield Matrix(spec.name, shape, spec.dtype, _loader(store, spec))


def _loader(store: Store, spec: Spec) -> Callable[[], Tensor]:
    def load() -> Tensor:
        (part,) = store.parts(spec, "whole")
        tensor = part.tensor.detach()
        return (tensor.t() if spec.role == "linear_transposed" else tensor.flatten(1)).contiguous()

    return load


def _shape(spec: Spec) -> tuple[int, int] | None:
    out, *others = spec.shape if spec.role != "linear_transposed" else spec.shape[::-1]
    if spec.role in ("linear", "linear_transposed") and len(others) == 1:
        return out, others[0]
    point = spec.role == "conv" and spec.groups == 1 and set(others[1:]) == {1}
    return (out, others[0]) if point else None


def file_bytes(target: Target) -> int | None:
    """Bytes on disk of a file, or of the weights' files of a folder; ``None`` for what is in memory."""
    if not isinstance(target, str | os.PathLike):
        return None
    path = Path(target)
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.suffix == ".safetensors"]
    return sum(p.stat().st_size for p in files)
