"""Canonical names: what a tensor is called once wrappers, parametrisations and masks are taken off.

A plan, a mask and the order among equal scores go by names, so the same tensors must have the same names in a
module, in its ``state_dict()`` and in any wrapper around it.

- Wrappers are no part of a name. ``_orig_mod`` (``torch.compile``), ``_fsdp_wrapped_module`` and
  ``_checkpoint_wrapped_module`` are taken out wherever they are. ``module`` is an ordinary name that wrappers
  use too: it is taken out where its owner is a ``DistributedDataParallel``, ``DataParallel`` or
  ``AveragedModel``, and in a dict, which has no owners, where every tensor's key begins with ``module.``.
- Adapters of ``peft`` put a wrapper around a model and around each layer they adapt: ``base_model.model`` before all names,
  and ``base_layer``. They are taken out where their owner is a class of peft, and in a dict of LoRA's, which has
  ``lora_…`` beside ``base_layer``. So a weight has one name before, with and after its adapter.
- A weight under a parametrisation or under `torch.nn.utils.prune` is stored under other names
  (``weight_orig``, ``parametrizations.weight.original0``). It is listed as the ``weight`` it stands for, so
  that filters find it, and with what holds it, so that it can be refused.

One difference is left: a model whose only child is called ``module`` keeps that name, and its dict loses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.errors import BadInput

from .roles import Owner, owner_of

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names of the child that a wrapper holds, and that nothing else uses."""

MODULE_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
ADAPTED = frozenset({"base_model", "model", "base_layer"})
"""Names of the child around which a class of peft is a wrapper."""
_AVERAGED_COUNT = "n_averaged"  # a buffer of AveragedModel, the one key of its state_dict without the prefix


class Stored(NamedTuple):
    """One tensor as the target holds it: the full name it has there, its canonical name, and itself."""

    raw: str
    name: str
    tensor: Tensor


@dataclass
class Tree:
    """What a walk over a module finds, in order of registration.

    Attributes:
        tensors: every parameter, under every name it is registered by, as
            ``named_parameters(remove_duplicate=False)`` lists them; weights of quantised modules and of packed layers, which
            are no parameters, among them.
        buffers: canonical names of all buffers; their tensors are not the store's business.
        owners: what is known of a module that holds weights, by the canonical name of the module.
        modules: every module by its canonical name; of a wrapper and what it holds, which share one, the latter.
        packed: the weights of packed layers, by what holds their values: two layers that share it have one weight.
    """

    tensors: list[Stored] = field(default_factory=list)
    buffers: set[str] = field(default_factory=set)
    owners: dict[str, Owner] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    packed: dict[int, Tensor] = field(default_factory=dict)


def walk(model: nn.Module) -> Tree:
    """Lists the parameters of a module with their canonical names, and the modules that own them."""
    tree = Tree()
    _visit(model, "", "", tree, {}, set())
    return tree


def _visit(
    module: nn.Module, raw: str, name: str, tree: Tree, kinds: dict[type, Owner | None], heads: set[int]
) -> None:
    """Adds one module and all below it. ``raw`` and ``name`` end in a dot, or are empty at the root."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            tree.tensors.append(Stored(raw + key, name + key, parameter))
    for key in module._buffers:
        tree.buffers.add(name + key)
    if hasattr(type(module), "packed_role"):
        weight = tree.packed.setdefault(id(module._buffers["packed_values"]), cast(Tensor, module.weight))
        tree.tensors.append(Stored(raw + "weight", name + "weight", weight))
    tree.modules[name[:-1]] = module
    owner = owner_of(module, kinds)
    if owner is not None:
        tree.owners[name[:-1]] = owner if id(module) not in heads else Owner("head")
        if owner.kind == "quantized":
            tree.tensors.extend(Stored(raw + k, name + k, t) for k, t in _quantized(module))
    if hasattr(type(module), "get_output_embeddings"):
        heads |= _output_heads(module)
    unwrap = isinstance(module, MODULE_WRAPPERS)
    for key, child in module._modules.items():
        if child is not None:
            hidden = key in WRAPPERS or (unwrap and key == "module") or (key in ADAPTED and is_adapter(module))
            _visit(child, f"{raw}{key}.", name if hidden else f"{name}{key}.", tree, kinds, heads)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module's class is one of peft, or made from one."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def _quantized(module: Any) -> list[tuple[str, Tensor]]:
    """The packed weights of a quantised module, by the names they had before."""
    found = module.get_weight() if hasattr(module, "get_weight") else {"weight": module.weight()}
    return [(key, t) for key, t in found.items() if isinstance(t, Tensor)]


def _output_heads(module: Any) -> set[int]:
    """Ids of the linear modules that a transformers model names as its output head."""
    try:
        head = module.get_output_embeddings()
    except Exception:  # the user's code: a model that cannot answer has no head that we know of
        return set()
    modules = head.modules() if isinstance(head, nn.Module) else ()
    return {id(m) for m in modules if isinstance(m, nn.Linear)}


def canonical(keys: Iterable[str]) -> dict[str, str]:
    """Canonical names of a dict's or file's keys, in their order.

    >>> canonical(["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])
    {'module._orig_mod.fc.weight': 'fc.weight', 'module._orig_mod.fc.bias': 'fc.bias'}
    >>> canonical(["module.fc.weight", "head.weight"])
    {'module.fc.weight': 'module.fc.weight', 'head.weight': 'head.weight'}
    >>> canonical(["base_model.model.fc.base_layer.weight", "base_model.model.fc.lora_A.default.weight"]).values()
    dict_values(['fc.weight', 'fc.lora_A.default.weight'])
    """
    names = {key: _unwrapped(key) for key in keys}
    while True:
        inner = [n for n in names.values() if n != _AVERAGED_COUNT]
        if not inner or not all(n.startswith("module.") for n in inner):
            return _without_adapters(names)
        names = {key: n.removeprefix("module.") for key, n in names.items()}


def _without_adapters(names: dict[str, str]) -> dict[str, str]:
    """Takes out what peft's LoRA puts around a model and around each layer it adapts."""
    adapted = {n.rpartition(".lora_")[0] for n in names.values() if ".lora_" in n}
    inner = {}
    for key, n in names.items():
        path, base, rest = n.partition(".base_layer.")
        inner[key] = f"{path}.{rest}" if base and path in adapted else n
    prefix = "base_model.model."
    if inner == names or not all(n.startswith(prefix) for n in inner.values()):
        return inner
    return {key: n.removeprefix(prefix) for key, n in inner.items()}


def _unwrapped(key: str) -> str:
    if not any(w in key for w in WRAPPERS):
        return key
    return ".".join(step for step in key.split(".") if step not in WRAPPERS)


def refuse_collisions(names: Iterable[tuple[str, str]]) -> None:
    """Raises `BadInput` where two raw names have one canonical name. Takes ``(raw, canonical)`` pairs."""
    seen: dict[str, str] = {}
    for raw, name in names:
        other = seen.setdefault(name, raw)
        if other != raw:
            raise BadInput(
                f"{other!r} and {raw!r} have the same name once wrappers are taken off: {name!r}. "
                "Rename one of them, or pass the inner model."
            )


class Held(NamedTuple):
    """A stored tensor that stands for another.

    Attributes:
        name: the tensor it stands for, such as ``fc.weight``.
        how: what holds that tensor, such as ``torch.nn.utils.prune``.
        role: ``"weight"`` if it has the place of the tensor itself, ``"factor"`` if it is another parameter,
            ``"buffer"`` if it is a mask or a state.
    """

    name: str
    how: str
    role: Literal["weight", "factor", "buffer"]


_SUFFIXES: tuple[tuple[str, tuple[str, ...], str, Literal["factor", "buffer"]], ...] = (
    ("_orig", ("_mask",), "torch.nn.utils.prune", "buffer"),
    ("_orig", ("_u", "_v"), "torch.nn.utils.spectral_norm", "buffer"),
    ("_v", ("_g",), "torch.nn.utils.weight_norm", "factor"),
)


def held(shapes: Mapping[str, tuple[int, ...]], buffers: Set[str] | None = None) -> dict[str, Held]:
    """Finds by name the tensors that stand for a parametrised or masked one.

    Args:
        shapes: canonical name to shape, of all tensors that may stand for one.
        buffers: names of a module's buffers, which are not among ``shapes``; ``None`` for a dict.

    Returns:
        By canonical name, what each such tensor stands for.

    >>> held({"fc.weight_orig": (2, 2), "fc.bias": (2,)}, {"fc.weight_mask"})["fc.weight_orig"].name
    'fc.weight'
    """
    out: dict[str, Held] = {}
    for key in shapes:
        for suffix, partners, how, role in _SUFFIXES:
            name = key.removesuffix(suffix)
            first = name + partners[0]
            if name == key or name in shapes or (first not in shapes and first not in (buffers or ())):
                continue
            if suffix == "_v" and not _is_norm(shapes.get(first, ()), shapes[key]):
                continue
            out.setdefault(key, Held(name, how, "weight"))
            for other in (name + p for p in partners if name + p in shapes):
                out.setdefault(other, Held(name, how, role))
    return out | _parametrised(shapes, "buffer" if buffers is None else "factor")


def _is_norm(g: tuple[int, ...], v: tuple[int, ...]) -> bool:
    """Whether ``g`` has the shape of norms of ``v``, over all dims or all but one."""
    if not g:
        return True
    matching = len(g) == len(v) and all(a in (1, b) for a, b in zip(g, v, strict=True))
    return matching and sum(s != 1 for s in g) <= 1


def _parametrised(shapes: Mapping[str, tuple[int, ...]], state: Literal["factor", "buffer"]) -> dict[str, Held]:
    """``fc.parametrizations.weight.original*`` stand for ``fc.weight``; the largest has its place.

    What the parametrisation itself holds is a ``state``: of those in torch, buffers.
    """
    groups: dict[str, list[str]] = {}
    for key in shapes:
        if "parametrizations." in key:
            path, _, rest = key.rpartition("parametrizations.")
            tensor, _, leaf = rest.partition(".")
            if leaf:
                groups.setdefault(path + tensor, []).append(key)
    out: dict[str, Held] = {}
    for name, keys in groups.items():
        originals = [k for k in keys if k.rpartition(".")[2].startswith("original")]
        largest = max(originals, key=lambda k: _size(shapes[k]), default=None)
        for k in keys:
            role = "weight" if k == largest else "factor" if k in originals else state
            out[k] = Held(name, "torch.nn.utils.parametrize", role)
    return out


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n
