"""Pickled checkpoints, only where the user says so: they run code when they are opened carelessly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import BadInput
from secateur.report.report import Report
from secateur.stores.safetensors_file import SUFFIX
from secateur.stores.staging import readable_by_all, staged

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def loaded(path: Path, allow_pickle: bool) -> Path | dict[str, Tensor]:
    """The path itself, or for a pickled checkpoint its tensors, if that is allowed.

    Raises:
        BadInput: a pickled checkpoint without ``--allow-pickle``, or one that holds more than tensors.
    """
    if path.suffix not in PICKLED or not path.is_file():
        return path
    if not allow_pickle:
        raise BadInput(
            f"{path.name} is a pickled checkpoint, and a pickle can run code. If you trust it, say --allow-pickle (it is "
            f"read with weights_only=True); the result is a {SUFFIX} file either way."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise BadInput(
            f"{path.name} cannot be read with weights_only=True: {(str(e) or repr(e)).splitlines()[0]}"
        ) from e
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise BadInput(
            f"{path.name} does not hold a dict of tensors; load it yourself and pass the model to secateur.prune."
        )
    return dict(found)


def save_over(tensors: Mapping[str, Tensor], out: Path, overwrite: bool, prune: Callable[[], Report]) -> Report:
    """Prunes tensors in memory and writes them as a safetensors file, staged and renamed.

    Tied tensors are written under each of their names: safetensors has no ties.
    """
    if out.suffix != SUFFIX:
        raise BadInput(f"the output of a pickled checkpoint is a {SUFFIX} file; got {out.name!r}.")
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    with staged(out, overwrite, need) as stage:
        report = prune()
        save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, stage, metadata={"format": "pt"})
        readable_by_all(stage)
    return replace(report, out=str(out))
