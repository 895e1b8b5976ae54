"""Two tools behind one face, so that every probe asks both the same question in the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

import secateur
from secateur.runtime.files import save_packed

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Answer:
    """Whether a tool does what a probe asks, and what was seen."""

    passed: bool
    seen: str

    def __str__(self) -> str:
        return f"{'yes' if self.passed else 'no'}: {self.seen}"


class NotOffered(Exception):
    """A tool has no way to do what a probe asks."""


class Gradual(Protocol):
    """A network that is pruned more and more while it trains."""

    def stepped(self, step: int) -> None:
        """Called after every step of the optimizer; ``step`` counts from 1."""
        ...

    def state(self) -> dict[str, Any]:
        """All that goes into a checkpoint."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint, in a process that has just begun."""
        ...


class Tool(Protocol):
    """What a probe needs of a tool that prunes."""

    name: str

    def prune(self, layer: nn.Module, sparsity: float) -> None:
        """Prunes the weight of one layer by magnitude."""
        ...

    def prune_all(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        """Prunes the weights of several layers as one pool."""
        ...

    def prune_named(self, model: nn.Module, name: str, sparsity: float) -> None:
        """Prunes one parameter of a model, and what is tied to it."""
        ...

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        """Holds the zeros of a pruned model while it trains; what it returns leaves a plain model behind."""
        ...

    def gradual(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> Gradual:
        """Prunes the linear layers, each by itself, as a schedule says."""
        ...

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """Saves the model to a safetensors file in which two of every four weights along the input are zero."""
        ...

    def save(self, model: nn.Module, out: Path) -> str:
        """Saves a pruned model as small as the tool can; the code of a function ``read(path)`` that reads it again."""
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

    def prune_named(self, model: nn.Module, name: str, sparsity: float) -> None:
        """See `Tool`."""
        secateur.prune(model, sparsity, include=name)

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        """See `Tool`."""
        return secateur.Pruner(model, optimizer).close

    def gradual(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> Gradual:
        """See `Tool`."""
        return _OurGradual(model, optimizer, schedule)

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """See `Tool`."""
        dense = out.with_name(f"dense-{out.name}")
        save_file(model.state_dict(), dense)
        secateur.prune(dense, pattern="2:4", out=out)

    def save(self, model: nn.Module, out: Path) -> str:
        """See `Tool`: the reader is the one that docs/format.md shows."""
        save_packed(model, out)
        page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
        return page.partition("```python\n")[2].partition("```")[0]


class _OurGradual:
    """A `secateur.Pruner`, whose hook counts the steps."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
        pruner = secateur.Pruner(model, optimizer, schedule, allocation="uniform")
        self._parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "pruner": pruner}

    def stepped(self, step: int) -> None:
        """See `Gradual`."""

    def state(self) -> dict[str, Any]:
        """See `Gradual`."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """See `Gradual`."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


class TorchPrune:
    """`torch.nn.utils.prune`, used as its own tutorial does."""

    name = "torch.nn.utils.prune"

    def prune(self, layer: nn.Module, sparsity: float) -> None:
        """See `Tool`."""
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)

    def prune_all(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        """See `Tool`."""
        torch_prune.global_unstructured([(m, "weight") for m in layers], torch_prune.L1Unstructured, amount=sparsity)

    def prune_named(self, model: nn.Module, name: str, sparsity: float) -> None:
        """See `Tool`."""
        path, _, leaf = name.rpartition(".")
        torch_prune.l1_unstructured(model.get_submodule(path), leaf, amount=sparsity)

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        """See `Tool`: its masks are in the model and hold from the moment they are there."""

        def finish() -> None:
            for module in model.modules():
                for name in [n.removesuffix("_orig") for n in module._parameters if n.endswith("_orig")]:
                    torch_prune.remove(module, name)

        return finish

    def gradual(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> Gradual:
        """See `Tool`."""
        return _TorchGradual(model, optimizer, schedule)

    def two_of_four(self, model: nn.Module, out: Path) -> None:
        """See `Tool`: there is none among its methods."""
        methods = sorted(k.__name__ for k in vars(torch_prune).values() if _is_method(k))
        raise NotOffered(f"no N:M among its methods ({', '.join(methods)})")

    def save(self, model: nn.Module, out: Path) -> str:
        """See `Tool`."""
        for module in model.modules():
            if torch_prune.is_pruned(module) and hasattr(module, "weight_orig"):
                torch_prune.remove(module, "weight")
        save_file(model.state_dict(), out)
        return "from safetensors.torch import load_file as read"


class _TorchGradual:
    """A loop over `torch.nn.utils.prune`. Its amounts are of what is left; counts say the same and round once."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, schedule: Schedule) -> None:
        self._model, self._optimizer, self._schedule = model, optimizer, schedule
        self._layers = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def stepped(self, step: int) -> None:
        """See `Gradual`."""
        if self._schedule(step) == self._schedule(step - 1):
            return
        for layer in self._layers:
            gone = int((layer.weight_mask == 0).sum()) if hasattr(layer, "weight_mask") else 0
            amount = round(self._schedule(step) * layer.weight.numel()) - gone
            torch_prune.l1_unstructured(layer, "weight", amount=amount)

    def state(self) -> dict[str, Any]:
        """See `Gradual`."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """See `Gradual`: masks of ones make the names that a masked `state_dict` has."""
        for layer in self._layers:
            torch_prune.identity(layer, "weight")
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


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
