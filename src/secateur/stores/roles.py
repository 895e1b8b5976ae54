"""What a tensor does in its network, and which of its dims index output and input features.

One function, `assign`, serves modules, dicts and files. A module adds what it knows of a tensor's owner
(`owner_of`); the rest goes by name and shape, so that a model and its ``state_dict()`` are pruned alike.
Where name and shape cannot tell what the module knows, the two differ, and ``roles={glob: role}`` settles it:

- an ``nn.Embedding`` with a name like any layer's (``0.weight``, ``encoder.weight``) looks like a linear
  layer, and so does a language model's head without a telling name; a linear layer without bias whose own
  name is that of an embedding (``value_embedding.weight``) looks like one;
- a transposed convolution shows in the length of its bias; without bias, or as wide as its input, it looks
  like a convolution unless it is called ``deconv``, ``convt…`` or ``…transp…``;
- the groups of a convolution cannot be seen;
- a square ``Conv1D`` of transformers follows ``c_attn``, ``c_fc`` and ``c_proj`` beside it; under other names
  it looks like a linear layer. ``nn.Bilinear`` looks like a 1-D convolution (the dims are the same);
- a norm over several dims, without bias and without "norm", "ln" or "bn" in its name, looks like a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from secateur.core.types import Spec
from secateur.errors import BadInput, NothingChosen

from .base import matches
from .siblings import Siblings, join, last_step

ROLES: Mapping[str, str] = {
    "linear": "weight of a linear layer, (out, in)",
    "linear_transposed": "weight of a linear layer stored (in, out), as in transformers' Conv1D",
    "bilinear": "weight of nn.Bilinear, (out, in, in)",
    "conv": "weight of a convolution, (out, in / groups, *kernel)",
    "conv_transpose": "weight of a transposed convolution, (in, out / groups, *kernel)",
    "recurrent": "weight of an RNN, LSTM or GRU, its gates stacked: (gates · hidden, in)",
    "attention": "packed projections of attention: in_proj_weight, q_proj_weight, …, (out, in)",
    "experts": "weights of several experts in one tensor, (experts, out, in)",
    "experts_transposed": "weights of several experts in one tensor, (experts, in, out)",
    "head": "output head of a language model, (vocabulary, in)",
    "router": "router of a mixture of experts, (experts, in)",
    "embedding": "an embedding table, (entries, features)",
    "position": "a table of positions, or of biases by position",
    "adapter": "a factor of an adapter that is merged into a weight: LoRA's A or B",
    "norm": "per-channel scale, as of a norm",
    "bias": "a bias",
    "buffer": "not a parameter: running statistics, indices, masks",
    "unknown": "a tensor whose role neither its module nor its name tells",
}
"""Every role, with the shape of its tensors."""

SKIPPED: Mapping[str, str] = {
    "head": "the output head of a language model",
    "router": "a mixture-of-experts router",
    "embedding": "an embedding",
    "position": "a position table",
    "adapter": "a factor of an adapter",
    "norm": "a norm or another per-channel scale",
    "bias": "a bias",
    "buffer": "not a parameter",
    "unknown": "a raw tensor of unknown role",
}
"""Roles that are pruned only when asked for by full name, and the reason a report gives."""

TABLES = ("embedding", "position", "head")
"""Roles that rule a tied tensor: whatever is tied to one of these is skipped like it."""

_DIMS = {
    "linear": (0, 1), "linear_transposed": (1, 0), "bilinear": (0, 1), "recurrent": (0, 1),
    "attention": (0, 1), "conv": (0, 1), "conv_transpose": (1, 0), "experts": (1, 2),
    "experts_transposed": (2, 1), "head": (0, 1), "router": (0, 1),
}  # fmt: skip
_NDIM = {
    "linear": (2,), "linear_transposed": (2,), "bilinear": (3,), "recurrent": (2,), "attention": (2,),
    "conv": (3, 4, 5), "conv_transpose": (3, 4, 5), "experts": (3,), "experts_transposed": (3,),
}  # fmt: skip


class Owner(NamedTuple):
    """What a module tells of the tensors it holds: the role of its ``weight``, and its groups."""

    kind: str
    groups: int = 1


class Fit(NamedTuple):
    """The role of one tensor and what goes with it; see `secateur.core.types.Spec`."""

    role: str
    out_dim: int | None = None
    in_dim: int | None = None
    batch_dims: tuple[int, ...] = ()
    groups: int = 1
    bias: str | None = None


_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Linear,), "linear"),
    ((nn.modules.conv._ConvTransposeNd,), "conv_transpose"),
    ((nn.modules.conv._ConvNd,), "conv"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase), "norm"),
    ((nn.Bilinear,), "bilinear"),
)


def owner_of(module: nn.Module, kinds: dict[type, Owner | None]) -> Owner | None:
    """What a module's class tells of its weight, ``None`` if nothing. ``kinds`` remembers classes."""
    cls = type(module)
    if cls not in kinds:
        kinds[cls] = _kind(module)
    owner = kinds[cls]
    if owner is not None and owner.kind.startswith("conv"):
        return Owner(owner.kind, int(getattr(module, "groups", 1)))
    return owner


def _kind(module: nn.Module) -> Owner | None:
    for classes, kind in _KINDS:
        if isinstance(module, classes):
            return Owner(kind)
    cls = type(module)
    if isinstance(role := getattr(cls, "packed_role", None), str):  # of secateur.runtime, which is above this layer
        return Owner(role)
    packed = hasattr(cls, "get_weight") or hasattr(cls, "weight")
    if packed and cls.__module__.startswith("torch.ao.nn.quantized.") and "Embedding" not in cls.__name__:
        return Owner("quantized")
    # transformers' Conv1D, without importing transformers: a linear layer stored (in, out)
    if cls.__name__ == "Conv1D" and hasattr(module, "nf"):
        return Owner("linear_transposed")
    return None


def fits(role: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can have the role."""
    return len(shape) in _NDIM.get(role, (len(shape),))


def of_single(shape: tuple[int, ...]) -> Fit:
    """The role of a tensor that comes alone, from its shape: a linear layer, a convolution, or unknown.

    >>> of_single((4, 3)).role, of_single((4, 3, 3, 3)).role, of_single((4,)).role
    ('linear', 'conv', 'unknown')
    """
    role = "linear" if len(shape) == 2 else "conv" if len(shape) in (3, 4, 5) else "unknown"
    return as_role(role, shape)


def as_role(role: str, shape: tuple[int, ...], groups: int = 1) -> Fit:
    """The dims that go with a role; none where the shape has others, as that of a lazy parameter."""
    out_dim, in_dim = _DIMS.get(role, (None, None))
    if out_dim is None or in_dim is None or len(shape) <= max(out_dim, in_dim):
        out_dim = in_dim = None
    return Fit(role, out_dim, in_dim, (0,) if role.startswith("experts") else (), groups)


def resolve(roles: Mapping[str, str], specs: Sequence[Spec]) -> dict[str, str]:
    """The roles a user gave by glob, for every tensor they match by name or by a module above it.

    Later globs win. Matched by a module above it, a bias stays a bias, and a tensor whose dims do not fit the
    role keeps its own.

    Raises:
        BadInput: no such role, or a tensor named in full that cannot have it.
        NothingChosen: a glob matches no tensor.
    """
    if not isinstance(roles, Mapping):
        raise BadInput(f"roles maps globs to roles, such as {{'emb.weight': 'embedding'}}; got {roles!r}.")
    out: dict[str, str] = {}
    for glob, role in roles.items():
        asked = f"roles={{{glob!r}: {role!r}}}"
        if not isinstance(glob, str) or not isinstance(role, str) or role not in ROLES:
            raise BadInput(f"{asked}: a glob gets one of these roles: {', '.join(ROLES)}.")
        fitting = []
        for spec in (s for s in specs if matches(s, glob)):
            exact = glob in (spec.name, *spec.aliases)
            if exact and not fits(role, spec.shape):
                raise BadInput(f"{asked}: {spec} cannot be that. {role!r} is: {ROLES[role]}.")
            if exact or (fits(role, spec.shape) and spec.role != "bias"):
                fitting.append(spec.name)
        out |= dict.fromkeys(fitting, role)
        if not fitting:
            raise NothingChosen(
                f"{asked} matches no tensor that can have this role. "
                f"The target has: {', '.join(str(s) for s in specs[:8])}{', …' if len(specs) > 8 else ''}."
            )
    return out


def assign(
    shapes: Mapping[str, tuple[int, ...]],
    owners: Mapping[str, Owner] | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, Fit]:
    """The role and dims of every tensor of one model.

    Args:
        shapes: canonical name to shape, of all tensors: what stands beside a tensor helps to tell its role.
        owners: what is known of the modules, by canonical name; none for a dict or a file.
        given: roles that the user gave, by canonical name; they fit their shapes.

    Returns:
        A `Fit` for every name, in the order of ``shapes``.

    >>> assign({"fc.weight": (4, 3), "fc.bias": (4,), "embed_tokens.weight": (9, 3)})["fc.weight"]
    Fit(role='linear', out_dim=0, in_dim=1, batch_dims=(), groups=1, bias='fc.bias')
    """
    beside = Siblings(shapes)
    owners, given = owners or {}, given or {}
    out: dict[str, Fit] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        if name in given:
            groups = owner.groups if owner is not None and leaf == "weight" else 1
            fit = as_role(given[name], shape, groups)
        else:
            fit = _guess(path, leaf, shape, owner, beside)
        out[name] = fit._replace(bias=_bias(fit, path, leaf, shape, shapes)) if fit.role in _DIMS else fit
    return out


def _bias(fit: Fit, path: str, leaf: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The bias with one element for each output feature (of each expert), if there is one."""
    if fit.out_dim is None or fit.role == "recurrent":
        return None
    if fit.batch_dims and not leaf.endswith("weight"):
        name = join(path, f"{leaf}_bias")
        return name if shapes.get(name) == (*(shape[d] for d in fit.batch_dims), shape[fit.out_dim]) else None
    if not leaf.endswith("weight"):
        return None
    name = join(path, leaf.replace("weight", "bias"))
    size = shape[fit.out_dim] * (fit.groups if fit.role == "conv_transpose" else 1)
    return name if shapes.get(name) == (size,) else None


_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ATTENTION = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
_BUFFERS = frozenset(
    "running_mean running_var num_batches_tracked position_ids token_type_ids inv_freq original_inv_freq "
    "masked_bias relative_position_index n_averaged".split()
)
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")
_NORM = re.compile(r"norm\d*$|(^|_)(ln|bn)(_[a-z0-9]+)?\d*$", re.IGNORECASE)
_POSITION = re.compile(r"(^|_)(r?pos|positions?|positional|wpe|pe|relative_attention_bias)(_|\d|$)|relative_position")
_ADAPTER = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
_EXPERTS = re.compile(r"(^|\.)(\w*experts|moe|\w+_moe)(\.|$)")
_STACKED = frozenset({"input_linear", "output_linear"})  # ParallelExperts of GraniteMoE and JetMoE
_TRANSPOSED = re.compile(r"deconv|conv_?t(\d|r|_|$)|transp", re.IGNORECASE)


def _guess(path: str, leaf: str, shape: tuple[int, ...], owner: Owner | None, beside: Siblings) -> Fit:
    """Role, dims and groups by owner, name and shape."""
    if _ADAPTER.search(join(path, leaf)):
        return Fit("adapter")
    if leaf == "weight":
        if owner is not None:
            return as_role(_of_known(path, shape, owner, beside), shape, owner.groups)
        if len(shape) >= 2:
            return _of_weight(path, shape, beside)
        return Fit("norm" if shape else "unknown")
    if leaf in _BUFFERS:
        return Fit("buffer")
    if _BIAS.search(leaf) and not _POSITION.search(leaf):
        causal_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1
        return Fit("buffer" if causal_mask else "bias")
    if len(shape) == 2 and leaf in _ATTENTION:
        return as_role("attention", shape)
    if len(shape) == 2 and _RECURRENT.fullmatch(leaf):
        return as_role("recurrent", shape)
    if len(shape) == 3 and _EXPERTS.search(path):
        return _of_experts(shape, beside.layout(path, leaf, ""))
    return Fit("position" if _POSITION.search(leaf) else "unknown")


def _of_known(path: str, shape: tuple[int, ...], owner: Owner, beside: Siblings) -> str:
    """The role of ``weight`` in a module of a known class; names tell heads, routers and positions apart."""
    if owner.kind in ("linear", "linear_transposed", "quantized"):
        if beside.is_head(path, shape):
            return "head"
        if beside.is_router(path):
            return "router"
        return "linear" if owner.kind == "quantized" else owner.kind
    if owner.kind == "embedding" and _POSITION.search(last_step(path)):
        return "position"
    return owner.kind


def _of_weight(path: str, shape: tuple[int, ...], beside: Siblings) -> Fit:
    """The role and dims of a ``weight`` of two dims or more whose owner is not known."""
    last, bias = last_step(path), beside.shapes.get(join(path, "bias"))
    if beside.is_head(path, shape):
        return as_role("head", shape)
    if bias == shape or (bias is None and _NORM.search(last)):
        return Fit("norm")
    if len(shape) == 2:
        if beside.is_router(path):
            return as_role("router", shape)
        if beside.is_table(path):
            return Fit("position" if _POSITION.search(last) else "embedding")
        return as_role("linear_transposed" if beside.is_transposed(path, shape) else "linear", shape)
    if len(shape) == 3 and last in _STACKED:
        return as_role("experts", shape)
    if len(shape) == 3 and _EXPERTS.search(path):
        container, _, token = path.rpartition(".")
        return _of_experts(shape, beside.layout(container, token, ".weight"))
    if len(shape) > 5:
        return Fit("unknown")
    return _of_convolution(last, shape, bias)


def _of_convolution(last: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> Fit:
    """Transposed or not: a bias that is not as long as the first dim tells, and else a name."""
    outputs = bias[0] if bias is not None and len(bias) == 1 else None
    if outputs is None or outputs == shape[0]:
        open_ = outputs is None or shape[0] == shape[1]
        return as_role("conv_transpose" if open_ and _TRANSPOSED.search(last) else "conv", shape)
    groups, rest = divmod(outputs, max(shape[1], 1))
    return as_role("conv_transpose", shape, groups) if rest == 0 and groups else as_role("conv", shape)


def _of_experts(shape: tuple[int, ...], straight: bool | None) -> Fit:
    if straight is None:
        return Fit("experts", batch_dims=(0,))
    return as_role("experts" if straight else "experts_transposed", shape)
