"""Criteria that need data: functions of a weight and of statistics, which `secateur.calibrate` measures.

Each takes the weight and, by name, the statistics it is made of: ``(weight, *, statistic, …) -> score``, same shape, higher =
keep. `bind` joins one with the statistics of a model's tensors, which makes of it a criterion like any other.

Scores are float64: there the product of two float32 numbers is exact, so that no two weights are taken for equal that are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from secateur.errors import BadInput

from .criteria import PROVIDED, Criterion
from .structure import apoz, batchnorm_scale, head_importance, mean_activation, taylor_channel

Statistics = Mapping[str, Mapping[str, Tensor]]
"""``{tensor name: {statistic: tensor}}``, as `secateur.calibrate` returns them."""

DIMS = ("out_dim", "in_dim")
LIKE_WEIGHT = ("grad", "fisher_diag", "hessian_diag", "fisher_inverse_diag")
"""Statistics of the weight's own shape."""
STATISTICS = {
    "input_norm": "root mean square of each input feature, (in,)",
    "grad": "mean gradient of the loss, of the weight's shape",
    "fisher_diag": "mean of squared gradients, of the weight's shape",
    "hessian_diag": "diagonal of the Hessian of the loss, of the weight's shape",
    "fisher_inverse_diag": "diagonal of the inverse of the block Fisher matrix, of the weight's shape",
    "fisher_inverse": "inverse blocks of the Fisher matrix, (blocks, B, B)",
    "hessian": "2/n Σ x xᵀ over the layer's inputs, (in, in)",
    "channel_activation": "mean |activation| of each output channel, (out,)",
    "channel_apoz": "share of zero activations of each output channel, (out,)",
    "norm_scale": "|gamma| of the BatchNorm behind each output channel, (out,)",
    "channel_taylor": "mean over batches of (Σ gradient · weight)² over each output channel and its bias, (out,)",
    "head_gradient": "mean |∂loss/∂factor| on the output of each head, broadcasts to the weight's shape",
}
"""What calibration can measure of a tensor, by the name criteria ask for it."""


def wanda(weight: Tensor, *, input_norm: Tensor, in_dim: int) -> Tensor:
    r"""``|w_ij| · ‖x_j‖``: the magnitude of what a weight adds to its output.

    The paper compares inside each output row, which is the pattern ``"row"`` here and what ``criterion="wanda"`` means where no
    pattern is named. ``‖x_j‖`` is the root mean square over all tokens: rows are compared with themselves, so the scale drops
    out. The paper's code floors the count of each row; here a tensor's count is exact and its rows differ by one at most.

    Args:
        weight: any shape with an input dimension; of a convolution, every kernel position has an input feature of its own.
        input_norm: ``(in,)`` for a matrix; ``(groups, in / groups * kernel)`` for a convolution, flat where there is one group.
        in_dim: the dimension of the weight that holds the input features.

    Returns:
        Scores, float64, of the weight's shape.

    Raises:
        BadInput: norms of another number of inputs than the weight has.

    Example:
        >>> import torch, secateur
        >>> w = torch.tensor([[3.0, 1.0]])
        >>> secateur.criteria.wanda(w, input_norm=torch.tensor([0.5, 2.0]), in_dim=1)
        tensor([[1.5000, 2.0000]], dtype=torch.float64)

    Sun et al., "A simple and effective pruning approach for large language models" (arXiv:2306.11695).
    """
    return weight.double().abs().mul_(_along(input_norm, weight, in_dim))


def _along(vector: Tensor, weight: Tensor, dim: int) -> Tensor:
    """A statistic of the input features, shaped to multiply the weight."""
    if vector.numel() == weight.shape[dim]:
        shape = [1] * weight.dim()
        shape[dim] = -1
        return vector.reshape(shape)
    kernel = weight.shape[1:]
    groups, rest = divmod(vector.numel(), max(1, prod(kernel)))
    if weight.dim() < 3 or dim != 1 or rest or not groups or len(weight) % groups:
        raise BadInput(
            f"statistics of {vector.numel()} input features do not belong to a weight of the shape {tuple(weight.shape)}, its "
            f"inputs along dim {dim}: they were measured on another model."
        )
    each = vector.reshape(groups, 1, *kernel).expand(groups, len(weight) // groups, *kernel)
    return each.reshape(weight.shape)


def taylor(weight: Tensor, *, grad: Tensor) -> Tensor:
    r"""``|w · ∂L/∂w|``: the first-order estimate of what removing a weight does to the loss ("saliency").

    Args:
        weight, grad: of one shape; the gradient is the mean over the calibration batches.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.taylor(torch.tensor([2.0, -3.0]), grad=torch.tensor([0.5, 0.25]))
        tensor([1.0000, 0.7500], dtype=torch.float64)

    Molchanov et al., "Importance estimation for neural network pruning" (arXiv:1906.10771), for single weights.
    """
    return (weight.double() * grad).abs_()


def snip(weight: Tensor, *, grad: Tensor) -> Tensor:
    r"""``|w · ∂L/∂w|`` at initialisation: connection sensitivity, for pruning before training.

    The paper divides by the sum over all weights, which changes no order and is left out. The gradient of one large batch is
    meant: one batch in the calibration.

    Args:
        weight, grad: of one shape.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.snip(torch.tensor([2.0]), grad=torch.tensor([-0.5]))
        tensor([1.], dtype=torch.float64)

    Lee et al., "SNIP: single-shot network pruning based on connection sensitivity" (arXiv:1810.02340).
    """
    return taylor(weight, grad=grad)


def obd(weight: Tensor, *, hessian_diag: Tensor) -> Tensor:
    r"""``½ H_ii w_i²``: optimal brain damage, with the Hessian's diagonal.

    A diagonal of a trained network's Hessian may be negative in places; such weights come first, as removing them is
    predicted to lower the loss.

    Args:
        weight, hessian_diag: of one shape.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.obd(torch.tensor([2.0, 1.0]), hessian_diag=torch.tensor([0.5, 3.0]))
        tensor([1.0000, 1.5000], dtype=torch.float64)

    LeCun, Denker and Solla, "Optimal brain damage" (NeurIPS 1989).
    """
    return weight.double().square().mul_(hessian_diag).mul_(0.5)


def fisher(weight: Tensor, *, fisher_diag: Tensor) -> Tensor:
    r"""``½ F_ii w_i²`` with the diagonal of the empirical Fisher matrix, the mean of squared gradients.

    Args:
        weight, fisher_diag: of one shape; the mean is over the calibration's gradients, one a batch.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.fisher(torch.tensor([2.0]), fisher_diag=torch.tensor([0.5]))
        tensor([1.], dtype=torch.float64)

    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning" (arXiv:1801.05787), for single weights.
    """
    return obd(weight, hessian_diag=fisher_diag)


def woodfisher(weight: Tensor, *, fisher_inverse_diag: Tensor) -> Tensor:
    r"""``w_i² / (2 [F⁻¹]_ii)`` with blocks of the empirical Fisher matrix: the loss after the others have made up for it.

    The mask alone; ``solver="woodfisher"`` also moves the weights that stay.

    Args:
        weight, fisher_inverse_diag: of one shape.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.woodfisher(torch.tensor([2.0]), fisher_inverse_diag=torch.tensor([4.0]))
        tensor([0.5000], dtype=torch.float64)

    Singh and Alistarh, "WoodFisher: efficient second-order approximation for neural network compression" (arXiv:2004.14340);
    Kurtic et al., "The optimal BERT surgeon" (arXiv:2203.07259).
    """
    return weight.double().square().div_(fisher_inverse_diag).mul_(0.5)


def movement(weight: Tensor, *, grad: Tensor) -> Tensor:
    r"""``-w · ∂L/∂w``: whether training moves a weight away from zero, at a single point.

    Movement pruning adds this up over a whole fine-tuning, which `secateur.dynamic` does.

    Args:
        weight, grad: of one shape.

    Returns:
        Scores, float64.

    Example:
        >>> import torch, secateur
        >>> secateur.criteria.movement(torch.tensor([2.0, 2.0]), grad=torch.tensor([-0.5, 0.5]))
        tensor([ 1., -1.], dtype=torch.float64)

    Sanh, Wolf and Rush, "Movement pruning: adaptive sparsity by fine-tuning" (arXiv:2005.07683).
    """
    return (weight.double() * grad).neg_()


NAMED: dict[str, Criterion] = {
    "wanda": wanda, "taylor": taylor, "snip": snip, "obd": obd, "fisher": fisher, "woodfisher": woodfisher,
    "movement": movement, "mean_activation": mean_activation, "apoz": apoz, "batchnorm_scale": batchnorm_scale,
    "taylor_channel": taylor_channel, "head_importance": head_importance,
}  # fmt: skip
"""The criteria that can be asked for by name where there is data."""


@dataclass(frozen=True, eq=False)
class Bound:
    """A criterion with the statistics it asks for; what `bind` returns."""

    criterion: Criterion
    statistics: Statistics
    dims: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @property
    def __name__(self) -> str:
        return str(getattr(self.criterion, "__name__", type(self.criterion).__name__))

    def __call__(self, weight: Tensor, *, name: str, index: Tensor) -> Tensor:
        dims = self.dims.get(name, (None, None))
        known: dict[str, Any] = {"name": name, "index": index, **dict(zip(DIMS, dims, strict=True))}
        asked = inspect.signature(self.criterion).parameters
        extra = {n: known[n] for n in asked if n in known}
        if unknown := [n for n in DIMS if n in asked and known[n] is None and asked[n].default is asked[n].empty]:
            raise BadInput(
                f"the criterion {self.__name__} asks for {unknown[0]!r} of {name!r}, which is not known: give it to bind as "
                "dims={name: (out_dim, in_dim)}."
            )
        measured = self.statistics.get(name, {})
        extra |= {n: self._statistic(measured, n, name, weight) for n in needs(self.criterion)}
        return self.criterion(weight, **extra)

    def _statistic(self, measured: Mapping[str, Tensor], what: str, name: str, weight: Tensor) -> Tensor:
        found = measured.get(what)
        if not isinstance(found, Tensor):
            raise BadInput(
                f"the criterion {self.__name__} needs {what!r} of {name!r}, which the statistics do not have: calibrate the "
                "model that is pruned, with this statistic, or leave the tensor out with ignore=."
            )
        if what in LIKE_WEIGHT and found.shape != weight.shape:
            raise BadInput(
                f"{what!r} of {name!r} has the shape {tuple(found.shape)}, the weight {tuple(weight.shape)}: it was measured on "
                "another model."
            )
        return found.to(weight.device)


def needs(criterion: Callable[..., Tensor]) -> tuple[str, ...]:
    """The statistics a criterion cannot do without: what it asks for by name beyond the weight, its name, index and dims.

    >>> needs(wanda), needs(taylor)
    (('input_norm',), ('grad',))
    """
    try:
        params = list(inspect.signature(criterion).parameters.values())[1:]
    except ValueError:
        return ()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        p.name for p in params if p.kind in kinds and p.default is p.empty and p.name not in (*PROVIDED, *DIMS)
    )


def is_wanda(criterion: Criterion) -> bool:
    """Whether a criterion is Wanda's, which compares inside rows."""
    return isinstance(criterion, Bound) and criterion.criterion is wanda


def bind(
    criterion: Criterion, statistics: Statistics, dims: Mapping[str, tuple[int | None, int | None]] | None = None
) -> Bound:
    """A criterion that looks its statistics up by the tensor's name.

    Args:
        criterion: ``(weight, *, statistic, …) -> score``.
        statistics: ``{tensor name: {statistic: tensor}}``.
        dims: ``{tensor name: (out_dim, in_dim)}``, for criteria that ask for them.

    >>> import torch
    >>> by_fisher = bind(fisher, {"fc.weight": {"fisher_diag": torch.tensor([2.0])}})
    >>> by_fisher(torch.tensor([3.0]), name="fc.weight", index=torch.tensor([0]))
    tensor([9.], dtype=torch.float64)
    """
    return Bound(criterion, statistics, dims or {})
