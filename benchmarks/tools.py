"""Two tools behind one face, so that every probe asks both the same question in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import secateur


class NotOffered(Exception):
    """A tool has no way to do what a probe asks."""


class Tool(Protocol):
    """What a probe needs of a tool that prunes."""

    name: str

    def prune(self, layer: nn.Module, sparsity: float) -> None:
        """Prunes the weight of one layer by magnitude."""
        ...

    def prune_all(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        """Prunes the weights of several layers as one pool."""
        ...

    def prune_named(self, model: nn.Module, path: str, sparsity: float) -> None:
        """Prunes the weight of one module of a model, and what is tied to it."""
        ...

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """Saves the model to a safetensors file in which two of every four weights along the input are zero."""
        ...


class Secateur:
    """This project."""

    name = "secateur"

    def prune(self, layer: nn.Module, sparsity: float) -> None:
        """See `Tool`."""
        secateur.prune(layer, sparsity)

    def prune_all(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        """See `Tool`."""
        secateur.prune(nn.ModuleList(layers), sparsity)

    def prune_named(self, model: nn.Module, path: str, sparsity: float) -> None:
        """See `Tool`."""
        secateur.prune(model, sparsity, include=f"{path}.weight")

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """See `Tool`."""
        dense = out.with_name(f"dense-{out.name}")
        save_file(model.state_dict(), dense)
        secateur.prune(dense, pattern="2:4", out=out)


class TorchPrune:
    """`torch.nn.utils.prune`, used as its own tutorial does."""

    name = "torch.nn.utils.prune"

    def prune(self, layer: nn.Module, sparsity: float) -> None:
        """See `Tool`."""
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)

    def prune_all(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        """See `Tool`."""
        torch_prune.global_unstructured([(m, "weight") for m in layers], torch_prune.L1Unstructured, amount=sparsity)

    def prune_named(self, model: nn.Module, path: str, sparsity: float) -> None:
        """See `Tool`."""
        self.prune(model.get_submodule(path), sparsity)

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """See `Tool`: there is none among its methods."""
        methods = sorted(k.__name__ for k in vars(torch_prune).values() if _is_method(k))
        raise NotOffered(f"no N:M among its methods ({', '.join(methods)})")


def _is_method(value: object) -> bool:
    base = torch_prune.BasePruningMethod
    return isinstance(value, type) and issubclass(value, base) and value not in (base, torch_prune.PruningContainer)


TOOLS: dict[str, Tool] = {tool.name: tool for tool in (Secateur(), TorchPrune())}


def sparsity_of(weight: Tensor) -> float:
    """The fraction of a tensor that is zero."""
    return float((weight.detach() == 0).double().mean())


def zeros_of(layer: nn.Module) -> int:
    """How many elements of a layer's weight, as its forward pass uses it, are zero."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return int((weight.detach() == 0).sum())
