"""Statistics of output channels: what a channel's feature map is on real input, and the norm behind it.

A feature map is followed from the layer that makes it through a norm, dropout and max-pooling, up to the first nonlinearity, and
measured behind that. Where the way is another (a sum with a shortcut, say, or an activation written by hand), it is measured
where the way was lost: behind the norm, or behind the layer itself. Nothing is hooked: operations are seen as the model runs
them, and the order in which they run is the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.saliency import Statistics
from secateur.core.types import Spec
from secateur.errors import BadInput

from .batches import Forward, run_all
from .watch import CALLS, CONV

_LAYERS = CALLS | dict.fromkeys(
    (torch.conv3d, F.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), CONV
)
_NORMS = {F.batch_norm, torch.batch_norm}
_PASSED = {F.dropout, F.dropout1d, F.dropout2d, F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.dropout}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape}


def _named(names: str) -> set[Callable[..., Any]]:
    spaces = (torch, F, Tensor)
    return {getattr(s, n) for s in spaces for n in names.split() if hasattr(s, n)}


_NONLINEAR = _named(
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ prelu rrelu elu elu_ celu selu gelu silu mish hardswish "
    "hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign clamp clamp_ clamp_min clamp_min_"
)


@dataclass
class Map:
    """Sums over the feature map of one layer.

    Attributes:
        spec: the layer's weight.
        magnitude: Σ |a|, ``(out,)`` float64.
        zeros: how often a is zero, ``(out,)`` int64.
        count: how many values a channel has had.
        scale: the factors of the BatchNorm behind it, ``(out,)``, if there is one.
    """

    spec: Spec
    magnitude: Tensor | None = None
    zeros: Tensor | None = None
    count: int = 0
    scale: Tensor | None = None

    @property
    def channels(self) -> int:
        """How many output channels the layer has."""
        assert self.spec.out_dim is not None
        per_group = self.spec.shape[self.spec.out_dim]
        return per_group * (self.spec.groups if self.spec.role == "conv_transpose" else 1)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """(Σ |a|, zeros, values of a channel) of one output."""
        channel = values.dim() - len(self.spec.shape) + 1
        flat = values.detach().movedim(channel, 0).reshape(self.channels, -1)
        return flat.abs().sum(1, dtype=torch.float64), (flat == 0).sum(1), flat.shape[1]

    def add(self, magnitude: Tensor, zeros: Tensor, count: int) -> None:
        """Adds one output."""
        if not bool(torch.isfinite(magnitude).all()):
            raise BadInput(
                f"the feature map of {self.spec} holds NaN or infinite values: a batch, or what the network made of it, is not "
                "finite. Look for NaN in the batches and in the weights."
            )
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude
        self.zeros = zeros if self.zeros is None else self.zeros + zeros
        self.count += count

    def statistics(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``channel_activation``, ``channel_apoz`` and ``norm_scale`` that are wanted.

        Raises:
            BadInput: no batch reached the layer, or there is no norm where its scale is wanted.
        """
        if self.magnitude is None or self.zeros is None or not self.count:
            raise BadInput(
                f"no batch reached {self.spec}, or by no operation that can be followed: nothing is known of its channels. Leave "
                "it out with ignore=, or take a criterion that needs no data."
            )
        if "norm_scale" in wanted and self.scale is None:
            raise BadInput(
                f"no BatchNorm with factors lies right behind {self.spec}: its channels have no scale. Leave it out with "
                "ignore=, or take another criterion."
            )
        found = {"channel_activation": self.magnitude / self.count, "channel_apoz": self.zeros.double() / self.count}
        if self.scale is not None:
            found["norm_scale"] = self.scale.detach().abs()
        return {name: found[name].float() for name in found if name in wanted}


@dataclass
class _Trail:
    """One output of a layer, on its way: where it is now, and its sums there."""

    map: Map
    at: weakref.ref[Tensor]
    sums: tuple[Tensor, Tensor, int]


class Maps(TorchFunctionMode):
    """While it is entered, follows the outputs of some layers and adds them up.

    Args:
        weights: ``(spec, the model's own parameter)`` of each layer.
    """

    def __init__(self, weights: Sequence[tuple[Spec, Tensor]]) -> None:
        super().__init__()
        self.maps = {spec.name: Map(spec) for spec, _ in weights}
        self._by_id = {id(t): self.maps[spec.name] for spec, t in weights}
        self._trails: list[_Trail] = []
        self._moving: dict[int, _Trail] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call = _LAYERS.get(func)
        if call is not None:
            weight = dict(zip(call, args, strict=False)).get("weight", kwargs.get("weight"))
            if (found := self._by_id.get(id(weight))) is not None:
                self._set_out(found, out)
        elif func in _NORMS | _PASSED | _NONLINEAR | _VIEWS:
            trail = self._trail(args[0] if args else kwargs.get("input"))
            if trail is not None and isinstance(out, Tensor):
                self._go_on(trail, func, out, args, kwargs)
        return out

    def flush(self) -> None:
        """Adds what one batch gave: every output at the last place to which it could be followed."""
        for trail in self._trails:
            trail.map.add(*trail.sums)
        self._trails.clear()
        self._moving.clear()

    def _set_out(self, found: Map, out: Tensor) -> None:
        trail = _Trail(found, weakref.ref(out), found.sums(out))
        self._trails.append(trail)
        self._moving[id(out)] = trail

    def _trail(self, x: Any) -> _Trail | None:
        """What is at a tensor: the very same, since another may have its place in memory by now."""
        trail = self._moving.get(id(x))
        return trail if trail is not None and trail.at() is x else None

    def _go_on(
        self, trail: _Trail, func: Callable[..., Any], out: Tensor, args: Any, kwargs: Mapping[str, Any]
    ) -> None:
        if func in _VIEWS and out.shape[-1:] != (trail.map.channels,):
            return
        if func in _NORMS:
            scale = dict(zip(("input", "running_mean", "running_var", "weight"), args, strict=False)).get("weight")
            trail.map.scale = kwargs.get("weight", scale)
        self._moving = {k: t for k, t in self._moving.items() if t is not trail}
        trail.at, trail.sums = weakref.ref(out), trail.map.sums(out)
        if func not in _NONLINEAR:
            self._moving[id(out)] = trail


def channel_statistics(
    model: nn.Module,
    weights: Sequence[tuple[Spec, Tensor]],
    batches: Iterable[Any],
    wanted: Sequence[str],
    forward: Forward | None = None,
) -> Statistics:
    """``channel_activation``, ``channel_apoz`` and ``norm_scale`` of the output channels of some layers.

    Args:
        model: runs in evaluation mode and without gradients, and is as before afterwards.
        weights: ``(spec, the model's own parameter)`` of each layer.
        batches: iterated once; moved to the model's device.
        wanted: which of the three.
        forward: runs the model on a batch.

    Returns:
        ``{tensor name: {statistic: (out,) float32}}``.

    Raises:
        BadInput: no batches, values that are not finite, a layer that no batch reached, a scale where there is no norm.
    """
    maps = Maps(weights)
    with maps:
        run_all(model, batches, forward, maps.flush)
    return {name: found.statistics(wanted) for name, found in maps.maps.items()}
