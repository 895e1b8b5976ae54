"""What is exported: the tensors of a model, and refusals of models that no format can hold as they are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput, BadTensor
from secateur.evaluate.batches import device_of
from secateur.stores import checks, names
from secateur.stores.memory import MemoryStore

from ..layers import refuse_packed


@dataclass(frozen=True)
class Written:
    """What a format wrote, as it was read back and run.

    Attributes:
        bytes: of the file or folder; of the packed weights where there is no file.
        zeros, total: of the weights in it, those that are pruned by default.
        facts: what else was found, by name.
        notes: what is gained, and what is not.
    """

    bytes: int
    zeros: int
    total: int
    facts: dict[str, Any]
    notes: tuple[str, ...]


def need(package: str, extra: str, what: str) -> Any:
    """An optional package, imported now.

    Raises:
        BadInput: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package.partition(".")[0]:
            raise
        raise BadInput(f'{what} needs the package {package}: pip install "secateur[{extra}]".') from None


def check(target: Any) -> MemoryStore:
    """The tensors of a target.

    Raises:
        BadInput: no module or dict of tensors, or a packed model.
        BadTensor: a tensor without plain values in memory, or one that is computed from others.
    """
    if not isinstance(target, nn.Module | Mapping):
        raise BadInput(f"export takes an nn.Module or a dict of tensors, got a {type(target).__name__}.")
    if isinstance(target, nn.Module):
        refuse_packed(target, "other runtimes cannot read its layout")
    store = MemoryStore(target)
    for spec in store.specs():
        entry = store.entry(spec)
        if entry.held_by is not None or not checks.is_plain(entry.tensor):
            raise BadTensor(f"cannot export {spec}: {checks.why_not(entry)}.")
    return store


def runnable(model: Any, format: str) -> nn.Module:
    """The model of a format that is made by running it, without its wrappers.

    Raises:
        BadInput: not a module, on another device than the CPU, or of a dtype that the format's runtime cannot run.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{format} is made by running the model: give an nn.Module, not tensors alone.")
    device = device_of(model)
    if device.type != "cpu":
        raise BadInput(f"the model is on {device}, and {format} is made on the CPU: export copy.deepcopy(model).cpu().")
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype not in (torch.float32, torch.float16):
            dtype = str(p.dtype).removeprefix("torch.")
            raise BadInput(
                f"{name!r} {tuple(p.shape)} is {dtype}, and {format} is run in float32 or float16: export "
                "copy.deepcopy(model).float()."
            )
    return names.walk(model).modules[""]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under every name it is registered by."""
    return {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits, NaN and -0.0 included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
