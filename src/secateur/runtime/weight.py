"""The weight of a packed layer, for code that looks at ``layer.weight``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.errors import NotDefined

if TYPE_CHECKING:
    from .layers import PackedLayer


class PackedWeight(Tensor):
    """The whole weight, made anew each time that an operator reads it.

    Its shape, dtype and device are there at no cost, which is what most code asks of ``layer.weight``. An operator that reads
    its values gets a new dense tensor: as many bytes as before, and milliseconds for a large layer. It cannot be written.

    ``nn.TransformerEncoder`` and its layers, which fuse what they hold where all weights are plain tensors, see that it is none
    and call the layers; what such an encoder gives at padded positions is then not zero, as in training.

    Args:
        layer: the packed layer whose weight it is.
        like: a tensor of the dtype and device that the weight has.
    """

    _layer: PackedLayer

    @property
    def layer(self) -> PackedLayer:
        """The packed layer whose weight it is."""
        return self._layer

    @staticmethod
    def __new__(cls, layer: PackedLayer, like: Tensor) -> PackedWeight:
        made: PackedWeight = Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        made._layer = layer
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # As without it, but for `torch.overrides.has_torch_function`, by which the encoder layers see what it is.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return PackedWeight(args[0]._layer, args[0])
        kwargs = kwargs or {}
        for at, a in enumerate(func._schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                _refuse(args[at] if at < len(args) else kwargs.get(a.name))
        args, kwargs = pytree.tree_map_only(cls, lambda w: w._layer.dense(), (args, kwargs))
        return func(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """As of any tensor; of the whole weight."""
        return self._layer.dense().numpy(force=force)

    def tolist(self) -> Any:
        """As of any tensor; of the whole weight."""
        return self._layer.dense().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._layer.dense()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._layer.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _refuse(written: object) -> None:
    for t in pytree.tree_leaves(written):
        if isinstance(t, PackedWeight):
            raise NotDefined(
                f"the weight of a packed layer (shape {tuple(t.shape)}) cannot be written: take the weights back with "
                "secateur.unpack(model), change them, and pack the model again."
            )
