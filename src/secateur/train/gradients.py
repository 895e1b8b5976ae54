"""Gradients of weights that are held at zero, and whether anybody wrote them since they were masked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from secateur.core.bits import keep_
from secateur.errors import BadTensor
from secateur.stores.shards import here, is_sharded


class Gradients:
    """Masks gradients, and remembers which it has masked: the tensor, and how many writes torch had counted of it then.

    So one that was assigned or changed since is found without a look at its values. Writes that torch does not count are not
    seen: those of a gradient scaler, which leave zeros zero, and those through ``grad.data`` or numpy.
    """

    def __init__(self) -> None:
        self._masked: dict[Tensor, tuple[TensorWeakRef, int]] = {}

    def changed(self, parameter: Tensor) -> bool:
        """Whether a parameter has a gradient that is not as it was when it was last masked here."""
        gradient = parameter.grad
        if gradient is None:
            return False
        seen = self._masked.get(parameter)
        return seen is None or seen[0]() is not gradient or seen[1] != gradient._version

    def mask(self, parameter: Tensor, bits: Tensor) -> None:
        """Writes zeros into a parameter's gradient where the bit is 0.

        Raises:
            BadTensor: the gradient is sparse, or a DTensor that is cut otherwise than its parameter.
        """
        gradient = parameter.grad
        if gradient is None:
            self._masked.pop(parameter, None)  # the one it had may come back, and these bits may be new
            return
        if gradient.layout is not torch.strided:
            raise BadTensor(
                f"the gradient of a pruned tensor of shape {tuple(parameter.shape)} is sparse, and cannot be masked: make it "
                "dense (nn.Embedding(sparse=False)), or leave the tensor out with ignore=."
            )
        if 0 in gradient.stride() or gradient.is_inference():  # expanded, or of inference mode: read-only
            gradient = parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            raise BadTensor(
                f"the gradient of a pruned tensor of shape {tuple(parameter.shape)} is placed {gradient.placements}, not as the "  # type: ignore[attr-defined]
                f"tensor itself, {parameter.placements}, so that its elements lie elsewhere: leave the tensor out with ignore=."  # type: ignore[attr-defined]
            )
        keep_(here(gradient), bits)
        self._masked[parameter] = TensorWeakRef(gradient), gradient._version
