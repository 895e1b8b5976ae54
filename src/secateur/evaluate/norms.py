"""Norms that wake pruned channels: a channel that is zero before a norm need not be zero after it.

The model is traced, and the zero channels are followed from one operation to the next: through what keeps zeros, up to
what mixes channels. Whatever the tables below do not list is not understood, and a norm behind it is reported as such.
"""

from __future__ import annotations

import builtins
import operator
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from secateur.errors import BadInput, SecateurWarning
from secateur.stores.names import MODULE_WRAPPERS, WRAPPERS

_KEEPING_MODULES = tuple(
    getattr(nn, name)
    for name in (
        "Identity Dropout Dropout1d Dropout2d Dropout3d ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish "
        "Hardswish Tanh Tanhshrink Softshrink Hardshrink Softsign LocalResponseNorm MaxPool1d MaxPool2d MaxPool3d AvgPool1d "
        "AvgPool2d AvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d "
        "AdaptiveAvgPool3d LPPool1d LPPool2d Upsample ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d "
        "ReplicationPad1d ReplicationPad2d"
    ).split()
)
_MIXING_MODULES = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.Sigmoid, nn.Softmax, nn.Softplus, nn.Hardsigmoid,
)  # fmt: skip
_ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _known(names: str) -> set[Any]:
    """Operations by name: as functions of torch and as methods of a tensor."""
    spaces = (torch, nn.functional, operator, builtins)
    return {getattr(s, n) for s in spaces for n in names.split() if hasattr(s, n)} | set(names.split())


# Of the first operand: zero where that is zero, and every channel stays where it was.
_KEEPING = _known(
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu elu elu_ celu selu gelu silu mish hardswish tanh tanh_ tanhshrink "
    "softshrink hardshrink softsign dropout dropout1d dropout2d dropout3d max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d interpolate neg abs sqrt square div div_ truediv contiguous clone detach "
    "to float half bfloat16 double type type_as cpu cuda"
)
_MULTIPLYING = _known("mul mul_ multiply imul")  # zero where any operand is
_ADDING = _known("add add_ iadd sub sub_ isub")  # zero where all operands are
_MOVING = _known(
    "flatten view reshape permute transpose unsqueeze squeeze getitem mean sum cat concat stack chunk split pixel_shuffle"
)
_MIXING = _known(
    "linear conv1d conv2d conv3d matmul bmm mm addmm baddbmm einsum scaled_dot_product_attention softmax log_softmax sigmoid "
    "exp cos softplus hardsigmoid size dim numel getattr"
)
_NORMING = _known("batch_norm instance_norm layer_norm group_norm rms_norm native_layer_norm native_group_norm")


class _Zero(NamedTuple):
    """What is known of one value: the layers whose pruned channels it holds, and which of its channels are zero.

    ``channels`` is ``None`` where an operation was not understood; ``placed`` is false where they are no longer in dim 1.
    """

    layers: tuple[str, ...]
    channels: Tensor | None
    placed: bool = True


class _Tracer(fx.Tracer):
    """Takes layers and norms of classes that torch does not know whole, as it takes torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = next(m.children(), None) is None
        whole = isinstance(m, _MIXING_MODULES) or _is_norm(m)
        return (plain and whole) or super().is_leaf_module(m, module_qualified_name)


def _is_norm(m: nn.Module) -> bool:
    return "norm" in type(m).__name__.lower() and not isinstance(m, nn.LocalResponseNorm)


def firing_norms(model: nn.Module, gone: Mapping[str, Tensor]) -> list[str]:
    """Warnings about norms that turn pruned output channels into something other than zero.

    Args:
        model: the module; only its structure and its norms' parameters are looked at.
        gone: for each pruned layer, by each of its module's names, which of its output channels are zero (bool). The
            names of one layer share one tensor.

    Returns:
        One text for each such norm, and one that lists the layers of which it is not known.
    """
    walk = _walked(_bare(model), gone)
    return walk if isinstance(walk, list) else walk.texts()


def silence_norms(model: nn.Module) -> dict[str, int]:
    """Sets factor and shift to zero, in place, where a norm makes an output channel fire that is wholly pruned.

    Then the channel is zero behind the norm too, in training and in evaluation, as if it were not there: which is what pruned
    channels are compared as. A norm without factors gets a running mean of zero there.

    Args:
        model: after pruning; every output channel whose weights and bias are zero counts as pruned.

    Returns:
        ``{norm: how many of its channels were silenced}``, nothing for a model in which none fires.

    Raises:
        BadInput: a model that cannot be traced, so that which norm follows which layer is not known.

    Warns:
        SecateurWarning: norms that mix channels, that are called more than once, or of which it is not known.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        >>> _ = nn.init.ones_(net[1].bias)
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_()
        >>> silence_norms(net), net[1].bias.tolist()
        ({'1': 1}, [1.0, 0.0])
    """
    bare = _bare(model)
    gone = _dead_channels(bare)
    silenced: dict[str, int] = {}
    while True:
        walk = _walked(bare, gone)
        if isinstance(walk, list):
            if walk:
                raise BadInput(f"norms cannot be silenced: {walk[0]}.")
            return silenced
        loud = {n: c for n, c in walk.loud.items() if walk.calls[n] == 1}
        if not loud:
            for text in walk.texts():
                warnings.warn(text, SecateurWarning, stacklevel=2)
            return silenced
        for name, channels in loud.items():
            _silence(walk.modules[name], channels)
            silenced[name] = silenced.get(name, 0) + int(channels.sum())


def _dead_channels(model: nn.Module) -> dict[str, Tensor]:
    """Which output channels of each layer are zero, by module name."""
    gone: dict[str, Tensor] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if (
            not isinstance(m, nn.Linear | _ConvNd)
            or is_lazy(m.weight)
            or (m.transposed if isinstance(m, _ConvNd) else 0)
        ):
            continue
        dead = (m.weight == 0).flatten(1).all(1)
        gone[name] = dead if m.bias is None else dead & (m.bias == 0)
    return gone


@torch.no_grad()
def _silence(norm: nn.Module, channels: Tensor) -> None:
    own = [getattr(norm, name, None) for name in ("weight", "bias")]
    if own[0] is None and getattr(norm, "running_mean", None) is not None:
        own.append(norm.running_mean)
    for t in own:
        if isinstance(t, Tensor):
            t[channels.to(t.device)] = 0.0


def _walked(model: nn.Module, gone: Mapping[str, Tensor]) -> _Walk | list[str]:
    """The walk of a model's zero channels; or why there is none, nothing where there is nothing to know."""
    gone = {n: g for n, g in gone.items() if bool(g.any())}
    holds_norms = any(_is_norm(m) and next(m.children(), None) is None for m in model.modules())
    if not gone:
        return []
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the user's code symbolically: anything can come out of it
        why = "the model cannot be traced; a norm's bias in a pruned channel should be zero too"
        return [f"whether norms after the pruned channels make them fire is not known: {why}"] if holds_norms else []
    walk = _Walk(dict(model.named_modules(remove_duplicate=False)), gone)
    for node in graph.nodes:
        walk.visit(node)
    if holds_norms or any(n.op != "call_module" and n.target in _NORMING for n in graph.nodes):
        seen = {id(gone[n]) for n in walk.reached}
        first = {id(g): n for n, g in reversed(gone.items()) if id(g) not in seen}
        walk.unknown |= dict.fromkeys(sorted(first.values()))
    return walk


def _bare(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, which cannot be traced and are no part of a name."""
    for key, child in model.named_children():
        if key in WRAPPERS or (isinstance(model, MODULE_WRAPPERS) and key == "module"):
            return _bare(child)
    return model


def _not_known(layers: Sequence[str]) -> str:
    some = ", ".join(repr(n) for n in layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
    return (
        f"whether norms make the pruned channels of {some} fire is not known: the way to a norm is not understood; a "
        "norm's bias in a pruned channel should be zero too"
    )


class _Walk:
    """Follows zero channels through a graph, in its order, and gathers what there is to say.

    Attributes:
        warnings: a text for each norm that fires.
        unknown: layers of which it is not known, as keys.
        reached: names of pruned layers that the graph calls.
        loud: which pruned channels each norm makes fire, by its name.
        calls: how often the graph calls each module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], gone: Mapping[str, Tensor]) -> None:
        self.modules, self.gone = modules, gone
        self.warnings: list[str] = []
        self.unknown: dict[str, None] = {}
        self.reached: set[str] = set()
        self.loud: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self._zero: dict[fx.Node, _Zero] = {}
        self._constant: set[fx.Node] = set()

    def texts(self) -> list[str]:
        """All there is to say."""
        return self.warnings + ([_not_known(list(self.unknown))] if self.unknown else [])

    def visit(self, node: fx.Node) -> None:
        """Works out what is zero in a node's value; its operands come earlier in the graph."""
        inputs = node.all_input_nodes
        own = node.op in ("call_function", "call_method") and inputs and self._constant.issuperset(inputs)
        if node.op == "get_attr" or own:
            self._constant.add(node)
        if node.op == "call_module":
            self.calls[str(node.target)] += 1
            found = self._module(str(node.target), [self._zero[n] for n in inputs if n in self._zero])
        else:
            found = self._operation(node, inputs)
        if found is not None and (found.channels is None or bool(found.channels.any())):
            self._zero[node] = found

    def _module(self, name: str, into: list[_Zero]) -> _Zero | None:
        module = self.modules[name]
        if name in self.gone and isinstance(module, nn.Linear | _ConvNd):
            self.reached.add(name)
            return _Zero((name,), self.gone[name])
        if not into:
            return None
        if _is_norm(module):
            return self._norm(name, module, into[0])
        if isinstance(module, _KEEPING_MODULES):
            return into[0]
        if isinstance(module, nn.Flatten):
            return _flat(into[0], module.start_dim == 1 and module.end_dim == -1)
        if isinstance(module, _ConvNd):
            return _depthwise(module, into[0])
        if isinstance(module, _MIXING_MODULES):
            return None
        if any(_is_norm(m) for m in module.modules()):
            self._say_unknown(into[0])
        return into[0]._replace(channels=None)

    def _operation(self, node: fx.Node, inputs: Sequence[fx.Node]) -> _Zero | None:
        into = [self._zero[n] for n in inputs if n in self._zero]
        if not into or node.target in _MIXING:
            return None
        first = into[0]
        if node.target in _NORMING:
            self._say_unknown(first)
            return None
        if node.target in _KEEPING and _operand(node, 0) in self._zero:
            return first
        if node.target in _MULTIPLYING:
            return first
        if node.target in _ADDING:
            return self._sum(node, into)
        if node.target in (torch.flatten, "flatten"):
            return _flat(first, [*node.args[1:], *node.kwargs.values()] == [1])
        if node.target in _MOVING:
            return first._replace(placed=False)
        return first._replace(channels=None)

    def _sum(self, node: fx.Node, into: list[_Zero]) -> _Zero | None:
        """Zero where all operands are; a sum with anything else (a residual) is a channel that lives."""
        operands = [_operand(node, 0), _operand(node, 1)]
        if any(n in self._constant for n in operands):  # a shift, as a norm written by hand has
            return into[0]._replace(channels=None)
        if not all(n in self._zero for n in operands):
            return None
        layers = tuple(dict.fromkeys(n for z in into for n in z.layers))
        both = [z.channels for z in into if z.channels is not None]
        if len(both) < len(into) or any(c.shape != both[0].shape for c in both):
            return _Zero(layers, None)
        return _Zero(layers, torch.stack([c.cpu() for c in both]).all(0), all(z.placed for z in into))

    def _norm(self, name: str, norm: nn.Module, into: _Zero) -> _Zero | None:
        if isinstance(norm, nn.RMSNorm):
            return into
        after = None if into.channels is None else _after(norm, into)
        if after is None or into.channels is None:
            self._say_unknown(into)
            return None
        layers = " and ".join(repr(n) for n in into.layers)
        count, what = int(into.channels.sum()), f"{name!r} ({type(norm).__name__})"
        if after.numel() == 0:
            self.warnings.append(
                f"{what} normalises across channels, so the {count} pruned channels of {layers} come out as something other "
                "than zero"
            )
            return None
        loud = (after != 0) & into.channels.to(after.device)
        if bool(loud.any()):
            self.loud[name] = loud | self.loud.get(name, torch.zeros_like(loud))
            cure = "its bias to zero there"
            if getattr(norm, "running_mean", None) is not None:
                cure = "its bias and running mean to zero there, or call recalibrate_batchnorm and set the bias to zero"
            self.warnings.append(
                f"{what} makes {int(loud.sum())} of the {count} pruned channels of {layers} fire with up to "
                f"{float(after[loud].abs().max()):.3g}: set {cure}"
            )
        return into._replace(channels=into.channels & ~loud.to(into.channels.device))

    def _say_unknown(self, zero: _Zero) -> None:
        self.unknown |= dict.fromkeys(zero.layers)


def _operand(node: fx.Node, position: int) -> Any:
    """The first or second operand of an operation; ``None`` if it is not written that way."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(("input", "other")[position])


def _after(norm: nn.Module, into: _Zero) -> Tensor | None:
    """What a norm makes of channels of zeros: a value each; none at all if it mixes channels; ``None`` if not known."""
    assert into.channels is not None
    channels = into.channels.numel()
    each = isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels
    if isinstance(norm, _ACROSS) and not each:
        return torch.empty(0)
    own = [getattr(norm, n, None) for n in ("weight", "bias", "running_mean", "running_var")]
    if not (each or isinstance(norm, _BatchNorm | _InstanceNorm)) or not into.placed:
        return None
    if any(t is not None and (is_lazy(t) or t.numel() != channels) for t in own):
        return None
    weight, bias, mean, variance = own
    shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.detach().double()
    if mean is None or variance is None:
        return shift  # the batch's own statistics: a channel of zeros has mean zero
    scale = 1.0 if weight is None else weight.detach().double()
    return shift.to(mean.device) - mean.double() * scale / torch.sqrt(variance.double() + norm.eps)


def _flat(zero: _Zero, after_batch: bool) -> _Zero:
    """Flattened: in place only if a channel is a single feature, which shows at the next norm by the number of them."""
    return zero if after_batch else zero._replace(placed=False)


def _depthwise(conv: _ConvNd, zero: _Zero) -> _Zero | None:
    """Zero channels through a convolution: they stay zero only if each has filters of its own, without a bias."""
    if conv.groups == 1 or conv.groups != conv.in_channels or conv.bias is not None:
        return None
    if zero.channels is None or zero.channels.numel() != conv.in_channels:
        return zero._replace(channels=None)
    return zero._replace(channels=zero.channels.repeat_interleave(conv.out_channels // conv.in_channels))
