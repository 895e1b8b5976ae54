"""Packed layers: what a linear layer, a ``Conv1D`` of transformers and a 1×1 convolution become.

A layer is packed where it is: the object stays the same and its class changes, so that hooks, names, attributes and whatever
else refers to it hold on. Its weight is no parameter any more, but three buffers, in a ``state_dict`` as

=========================================  ==============================================================================
``packed_bits`` or ``packed_columns``      where the weights that are not zero belong; which of the two tells the layout
``packed_values``                          those weights
``packed_starts``                          where each row's begin
=========================================  ==============================================================================

(`secateur.core.layouts` says exactly). A bias keeps its key. The sizes of the first two follow the number of weights that are
stored, so they differ from model to model; ``load_state_dict`` takes those of any model of the same shapes, and checks that
they hold together before it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.core.layouts import DTYPES, PAD, Layout, Parts
from secateur.core.parts import check
from secateur.errors import BadInput, BadTensor, NotDefined

from .grid import named
from .ops import packed_linear, packed_weight
from .weight import PackedWeight

WHERE: Mapping[Layout, str] = {"bitmask": "packed_bits", "csr": "packed_columns"}
VALUES, STARTS = "packed_values", "packed_starts"
NAMES = (*WHERE.values(), VALUES, STARTS)


class PackedLayer(nn.Module):
    """What the packed layers share. `become` makes them; they are not built by hand.

    ``train()`` changes the mode and nothing else; a forward pass that would need gradients is refused. The dtype can be
    changed among float32, bfloat16 and float16; a move to another device is refused.

    Attributes:
        packed_role: the role of its weight, one of `secateur.stores.roles.ROLES`.
        packed_layout: the layout of the weight.
        packed_shape: output and input features.
        packed_from: the class that the layer had.
        packed_trained: which of its parameters required gradients.
    """

    packed_role: ClassVar[str]
    packed_layout: Layout
    packed_shape: tuple[int, int]
    packed_from: type[nn.Module]
    packed_trained: frozenset[str]

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A weight of this kind of layer, as ``(out, in)``."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the weight had."""
        return self.packed_shape

    @property
    def parts(self) -> Parts:
        """The weight as it lies: see `secateur.core.layouts`."""
        return self.get_buffer(WHERE[self.packed_layout]), self.get_buffer(VALUES), self.get_buffer(STARTS)

    @property
    def weight(self) -> Tensor:
        """The weight: what describes it costs nothing, what reads it expands it. See `PackedWeight`."""
        if torch.compiler.is_compiling():
            return self.dense()
        return PackedWeight(self, self.parts[1])

    def dense(self) -> Tensor:
        """A new tensor with the weight that was packed, to the bit."""
        return self.as_weight(packed_weight(list(self.parts), self.packed_layout, self.packed_shape[1]))

    def extra_repr(self) -> str:
        rows, columns = self.packed_shape
        parts = self.parts
        stored, size = len(parts[1]) - PAD, rows * columns
        bits = 8 * sum(p.nbytes for p in parts) / size
        return (
            f"{columns}, {rows}, bias={self._parameters['bias'] is not None}, sparsity={1 - stored / size:.4g}, "
            f"layout={self.packed_layout}, {bits:.3g} bits a weight"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise NotDefined(
                "the weight of a packed layer cannot be replaced: take the weights back with secateur.unpack(model) first."
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # pickle fails on uint16 in torch 2.13
        return self.__dict__ | {"_buffers": _columns_as(torch.int16, self._buffers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_buffers": _columns_as(torch.uint16, state["_buffers"])})

    def _product(self, x: Tensor) -> Tensor:
        """``x`` times the weight, plus the bias, along the last dim."""
        held = self._buffers  # past nn.Module.__getattr__, which costs as much as the operator's own overhead
        parts = [held[WHERE[self.packed_layout]], held[VALUES], held[STARTS]]
        return packed_linear(x, parts, self._parameters["bias"], self.packed_layout, self.packed_shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Converts; ``nn.Module.to``, ``half`` and their like come here. Refused before anything of this layer is touched."""
        name = WHERE[self.packed_layout]
        old = dict(zip((name, VALUES, STARTS), self.parts, strict=True))
        new = {key: fn(part) for key, part in old.items()}
        for key, part in new.items():
            if part.device != old[key].device:
                raise NotDefined(
                    f"packed layers run on the CPU, and cannot go to {part.device}. Take the weights back with "
                    "secateur.unpack(model), then move the model; parts of it may be there already: model.cpu() brings them back."
                )
        if any(new[k] is not old[k] and not torch.equal(new[k], old[k]) for k in (name, STARTS)):
            raise NotDefined("packed layers cannot be emptied: take the weights back first, secateur.unpack(model).")
        if new[VALUES].dtype not in DTYPES:
            raise NotDefined(
                f"packed layers are float32, bfloat16 or float16, and cannot become {named(new[VALUES].dtype)}. Take the "
                "weights back with secateur.unpack(model) first."
            )
        self._without_parts(lambda: super(PackedLayer, self)._apply(fn, recurse), new)
        return self

    def _without_parts(self, do: Callable[[], Any], then: Mapping[str, Tensor] | None = None) -> None:
        """Does something that must not see the parts; they, or others, are there again afterwards."""
        held = {key: self._buffers.pop(key) for key in NAMES if key in self._buffers}
        try:
            do()
            held.update(then or {})
        finally:
            self._buffers.update(held)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        load = super()._load_from_state_dict
        self._without_parts(
            lambda: load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        )
        unexpected_keys[:] = [k for k in unexpected_keys if k not in {prefix + name for name in NAMES}]
        found = {name: state_dict[prefix + name] for name in NAMES if prefix + name in state_dict}
        if prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is dense, and the layer is packed: load into secateur.unpack(model), and pack it again."
            )
        elif not found:
            missing_keys.extend(prefix + name for name in (WHERE[self.packed_layout], VALUES, STARTS))
        else:
            try:
                self._take(found, bool(local_metadata.get("assign_to_params_buffers")))
            except BadInput as e:
                error_msgs.append(f"the packed weight {prefix.removesuffix('.')!r} cannot be loaded: {e}")

    def _take(self, found: Mapping[str, Any], assign: bool) -> None:
        """Takes the parts of another packed layer of this shape, in either layout."""
        layouts = [layout for layout, name in WHERE.items() if name in found]
        if len(layouts) != 1 or len(found) != 3 or not all(isinstance(t, Tensor) for t in found.values()):
            wanted = f"{VALUES}, {STARTS} and one of {' and '.join(WHERE.values())}"
            raise BadTensor(f"it takes {wanted}; there are {sorted(found)}.")
        own = self.parts[1].dtype
        given = tuple(found[name].detach() for name in (WHERE[layouts[0]], VALUES, STARTS))
        if not any(t.is_meta for t in given) and not assign:
            given = tuple(t.to("cpu", copy=True, memory_format=torch.contiguous_format) for t in given)
            given = (given[0], given[1].to(own), given[2])
        check(given, layouts[0], self.packed_shape)
        self._hold(given, layouts[0])

    def _hold(self, parts: Parts, layout: Layout) -> None:
        for name in NAMES:
            self._buffers.pop(name, None)
        self.packed_layout = layout
        self._buffers.update(zip((WHERE[layout], VALUES, STARTS), parts, strict=True))


def _columns_as(dtype: torch.dtype, buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    columns = WHERE["csr"]
    return {k: t.view(dtype) if k == columns and t is not None else t for k, t in buffers.items()}


class PackedLinear(PackedLayer):
    """A packed ``nn.Linear``.

    Example:
        >>> from secateur.core.layouts import arrange
        >>> layer = nn.Linear(256, 256)
        >>> become(layer, PackedLinear, arrange(torch.eye(256), "bitmask"), "bitmask")
        PackedLinear(256, 256, bias=True, sparsity=0.9961, layout=bitmask, 1.41 bits a weight)
        >>> layer.weight.shape, layer.weight.sum()
        (torch.Size([256, 256]), tensor(256.))
    """

    packed_role = "linear"

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)


class PackedConv1D(PackedLayer):
    """A packed ``Conv1D`` of transformers: a linear layer whose weight is ``(in, out)``."""

    packed_role = "linear_transposed"

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.t()

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t().clone(memory_format=torch.contiguous_format)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.packed_shape[::-1]

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class PackedConv(PackedLayer):
    """A packed convolution whose kernel is a single point: a linear layer over channels, at every place or every n-th."""

    packed_role = "conv"
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight_shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (*self.packed_shape, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        if input.dim() not in (spatial + 1, spatial + 2):
            raise BadInput(
                f"this convolution takes {spatial + 2} dims, or {spatial + 1} without a batch; the input is {tuple(input.shape)}."
            )
        channel = -1 - spatial
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        x = input[places]
        out = self._product(x.movedim(channel, -1)).movedim(-1, channel)
        # A convolution's output lies as its input does, and code that views it counts on that.
        return out.contiguous() if input.is_contiguous() else out


def refuse_packed(model: nn.Module, why: str) -> None:
    """Refuses a model of which a layer is packed, and says the way back.

    Raises:
        BadInput: names the first such layer, and ``why``.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
    if packed:
        raise BadInput(
            f"{packed[0] or 'the model'!r} is packed (one of {len(packed)}): {why}. Take it back to dense weights first with "
            "secateur.unpack(model)."
        )


def become(
    layer: nn.Module,
    kind: type[PackedLayer],
    parts: Parts,
    layout: Layout,
    biases: dict[nn.Parameter, nn.Parameter] | None = None,
) -> PackedLayer:
    """Makes a layer a packed one of this kind, in place; its weight goes, its bias no longer asks for gradients.

    Args:
        layer: of a class that the kind stands for, with ``weight`` and ``bias`` among its parameters.
        kind: its packed class.
        parts: of its weight, as a matrix.
        layout: the layout that they are in.
        biases: what became of the biases of other layers, of which this one's may be one.

    Returns:
        The layer.
    """
    held, before = layer._parameters, type(layer)
    layer.__class__ = kind
    assert isinstance(layer, PackedLayer)
    weight, bias = held.pop("weight"), held["bias"]
    assert weight is not None
    if bias is not None:
        held["bias"] = ({} if biases is None else biases).setdefault(
            bias, nn.Parameter(bias.detach(), requires_grad=False)
        )
    layer.packed_from = before
    layer.packed_trained = frozenset(
        k for k, p in (("weight", weight), ("bias", bias)) if p is not None and p.requires_grad
    )
    rows, columns = kind.as_matrix(weight).shape
    layer.packed_shape = (rows, columns)
    layer._hold(parts, layout)
    return layer


def give_back(layer: PackedLayer, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Makes a packed layer what it was, in place, with these parameters."""
    for name in NAMES:
        layer._buffers.pop(name, None)
    before = layer.packed_from
    for name in ("packed_layout", "packed_shape", "packed_from", "packed_trained"):
        delattr(layer, name)
    others = {k: p for k, p in layer._parameters.items() if k != "bias"}
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, "bias": bias, **others})
    module: nn.Module = layer
    module.__class__ = before
    return module
