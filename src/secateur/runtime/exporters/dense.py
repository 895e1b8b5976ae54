"""Safetensors with the zeros in it: what every tool loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.core.keys import nonzero
from secateur.errors import BadInput, BadTensor, SecateurError
from secateur.stores import checks, names
from secateur.stores.memory import MemoryStore
from secateur.stores.safetensors_file import SUFFIX
from secateur.stores.staging import readable_by_all, staged

from .target import Written, same_bits

NOTE = "Zeros are stored like any other weight: the file is as large as the dense model's, and is loaded as one."


def write(target: nn.Module | Mapping[str, Any], store: MemoryStore, path: Path, overwrite: bool) -> Written:
    """Writes every tensor of a module's or dict's state, and reads all of it back.

    A tied tensor is written once, under its first name; the header's metadata gives the others, as
    `safetensors.torch.save_model` writes them and `safetensors.torch.load_model` reads them.

    Raises:
        BadInput: a path without the suffix, or a state that is not of tensors alone.
        BadTensor: a tensor that safetensors cannot hold.
    """
    if path.suffix != SUFFIX:
        raise BadInput(f"a safetensors file's name ends in {SUFFIX}; got {str(path)!r}.")
    tensors, tied = _state(target)
    with staged(path, overwrite, sum(t.nbytes for t in tensors.values())) as stage:
        try:
            save_file({n: _own(t) for n, t in tensors.items()}, stage, {"format": "pt", **tied})
        except (SafetensorError, ValueError, KeyError) as e:
            raise BadTensor(f"safetensors cannot hold this state: {e}") from e
        readable_by_all(stage)
        zeros, total = _read_back(stage, tensors, {s.name for s in store.specs() if s.skip is None})
        size = stage.stat().st_size
    return Written(size, zeros, total, {"tensors": len(tensors), "tied": tied}, (NOTE,))


def _state(target: nn.Module | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by canonical name, and of those that are tied to another the name of that one."""
    state = target.state_dict() if isinstance(target, nn.Module) else target
    canonical = names.canonical(state)
    names.refuse_collisions(canonical.items())
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for key, t in state.items():
        if not isinstance(t, Tensor):
            raise BadInput(f"{key!r} of the state is a {type(t).__name__}, and safetensors holds tensors alone.")
        if not checks.is_plain(t):
            raise BadTensor(f"cannot export {key!r} {tuple(t.shape)}: it has no plain values in memory.")
        view = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else key
        owner = first.setdefault(view, canonical[key])
        if owner == canonical[key]:
            tensors[owner] = t.detach()
        else:
            tied[canonical[key]] = owner
    return tensors, tied


def _own(t: Tensor) -> Tensor:
    """A tensor with a storage of its own size: a view of a larger one counts as sharing memory."""
    t = t.cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _read_back(path: Path, tensors: Mapping[str, Tensor], weights: set[str]) -> tuple[int, int]:
    """Zeros and elements of the weights in a file that holds just these tensors, to the bit."""
    zeros = total = 0
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(tensors):
            raise SecateurError("the file does not hold the names that were written to it: a bug.")
        for name, t in tensors.items():
            found = file.get_tensor(name)
            if not same_bits(found, t):
                raise SecateurError(f"{name!r} does not read back as it was written; the disk or memory is at fault.")
            if name in weights and found.dtype in checks.SUPPORTED:
                zeros += int((~nonzero(found)).sum())
                total += found.numel()
    return zeros, total
