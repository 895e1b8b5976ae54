"""Which weights of a model can be packed, and why the others cannot. Reads types, shapes and flags, never a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.layouts import DTYPES
from secateur.core.types import Spec
from secateur.stores import checks, names
from secateur.stores.memory import MemoryStore

from .layers import PackedConv, PackedConv1D, PackedLayer, PackedLinear
from .weight import PackedWeight

KINDS: tuple[tuple[tuple[type[nn.Module], ...], type[PackedLayer]], ...] = (
    ((nn.Linear,), PackedLinear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), PackedConv),
)
"""Classes of torch, and what layers of them become; for a ``Conv1D`` of transformers see `_base_of`."""

PACKED = "it is packed already"
HARMLESS = frozenset(
    "__module__ __qualname__ __doc__ __annotations__ __init__ __constants__ __firstlineno__ __static_attributes__ "
    "__orig_bases__ __parameters__ __dict__ __weakref__ extra_repr __repr__ reset_parameters _version".split()
)
"""What a subclass may define and still do what its base does."""


@dataclass(frozen=True)
class Site:
    """A weight that can be packed.

    Attributes:
        spec: the weight.
        kind: what its layers become.
        layers: those that have it; several where it is tied.
        weight: itself, as they hold it.
    """

    spec: Spec
    kind: type[PackedLayer]
    layers: tuple[nn.Module, ...]
    weight: Tensor

    @property
    def matrix(self) -> Tensor:
        """The weight as ``(out, in)``."""
        return self.kind.as_matrix(self.weight.detach())


class Use(NamedTuple):
    """A place where a parameter is used: the module, what it is called there, and the module's own name."""

    module: nn.Module
    leaf: str
    path: str


def survey(model: nn.Module) -> tuple[list[Spec], dict[str, Site]]:
    """Every parameter of a model, ``skip`` saying why it cannot be packed, and by name those that can.

    Raises:
        NothingChosen: a model without parameters.
        BadInput: names that collide.
    """
    store = MemoryStore(model)
    specs = store.specs()
    uses, read_by = _uses(model, specs), _read_by_others(model)
    found, sites = [], {}
    for spec in specs:
        entry = store.entry(spec)
        reason = _why_not(entry, uses[spec.name], read_by)
        found.append(replace(spec, skip=reason))
        if reason is None:
            layers = tuple({id(u.module): u.module for u in uses[spec.name]}.values())
            sites[spec.name] = Site(spec, _kind_of(layers[0])[0], layers, entry.tensor)
    return found, sites


def _uses(model: nn.Module, specs: Sequence[Spec]) -> dict[str, list[Use]]:
    """Where each parameter is used, by its name."""
    tree = names.walk(model)
    by_name = {n: s.name for s in specs for n in (s.name, *s.aliases)}
    out: dict[str, list[Use]] = {s.name: [] for s in specs}
    for s in tree.tensors:
        path, _, leaf = s.name.rpartition(".")
        out[by_name[s.raw]].append(Use(tree.modules[path], leaf, path))
    return out


def _read_by_others(model: nn.Module) -> dict[int, str]:
    """By id, the layers that are left because a module above them reads their weight, and why."""
    out: dict[int, str] = {}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            out[id(parent.out_proj)] = "nn.MultiheadAttention reads its weight instead of calling it"
        if names.is_adapter(parent):
            adapted = "it is under an adapter of peft, which writes to it: call model.merge_and_unload() first"
            out |= dict.fromkeys((id(child) for child in parent.children()), adapted)
    return out


def _why_not(entry: checks.Entry, uses: Sequence[Use], read_by: dict[int, str]) -> str | None:
    """What stands against packing a parameter; ``None`` if nothing does."""
    spec, t = entry.spec, entry.tensor
    if entry.held_by is not None:
        return checks.of_dtype(entry)
    if isinstance(t, PackedWeight):
        return PACKED
    others = [u for u in uses if u.leaf != "weight" or _kind_of(u.module)[0] is PackedLayer]
    if others:
        if len(others) == len(uses):
            return spec.skip or "not the weight of a linear layer, a Conv1D of transformers or a convolution"
        return f"its weight is also that of {others[0].path!r} ({type(others[0].module).__name__})"
    if len({_kind_of(u.module)[0] for u in uses}) > 1:
        return f"its weight is that of {uses[0].path!r} and {uses[-1].path!r}, which use it in different ways"
    if spec.role == "adapter":
        return spec.skip
    if is_lazy(t):
        return "it is lazy and has no shape yet: run a forward pass first"
    if type(t) not in checks.PLAIN:
        return f"it is a {type(t).__module__}.{type(t).__name__}, whose values may be elsewhere than in plain memory"
    if t.dtype not in DTYPES:
        return f"it is {str(t.dtype).removeprefix('torch.')}; packed layers are float32, bfloat16 or float16"
    if not t.numel():
        return "it has no elements"
    reasons = (read_by.get(id(u.module)) or _kind_of(u.module)[1] or _of_layer(u.module, t) for u in uses)
    return next((r for r in reasons if r is not None), None)


def _kind_of(module: nn.Module) -> tuple[type[PackedLayer], str | None]:
    """What a layer can become, `PackedLayer` itself if nothing, and what its class says against it."""
    for bases, kind in KINDS:
        for base in bases:
            if isinstance(module, base):
                return kind, _of_class(type(module), base)
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__.partition(".")[0] == "transformers":
        return PackedConv1D, None
    return PackedLayer, None


def _of_class(cls: type, base: type) -> str | None:
    """Whether a subclass does what its base does; what else it defines may be called or overrides how it runs."""
    added = [c for c in cls.__mro__ if c not in base.__mro__]
    own = sorted({name for c in added for name in vars(c)} - HARMLESS)
    return f"its class {cls.__name__} defines {', '.join(own[:3])}{', …' * (len(own) > 3)}" if own else None


def _of_layer(layer: nn.Module, weight: Tensor) -> str | None:
    """What one layer has against it that its class has not."""
    if "forward" in vars(layer):
        return "its forward was replaced, as hooks of accelerate do: remove them first"
    if "bias" not in layer._parameters:
        return "its bias is no plain parameter: make it one first"
    bias = layer._parameters["bias"]
    here = (
        bias is None or weight.is_meta or bias.device == weight.device
    )  # values of a weight on meta are still to come
    if not here or (bias is not None and (type(bias) not in checks.PLAIN or bias.dtype != weight.dtype)):
        return "its bias has another type, dtype or device than its weight"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        padded = not isinstance(layer.padding, str) and any(layer.padding)
        if any(k != 1 for k in layer.kernel_size) or layer.groups != 1 or padded:
            return "a convolution that is not 1×1, or is grouped or padded"
    return None
