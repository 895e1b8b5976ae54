"""Scores of whole channels and heads, from data: every weight of a unit gets the unit's score.

So the mean over a unit is its score again, and the mean is what `secateur.Channel` and ``"head:N"`` take of every criterion
but magnitude. A weight that is zero counts as 0 in it: where single weights are zero already, say ``reduce="max"``. The norms
l1 and l2 of filters need no data: they are ``Channel("out", reduce="l1")`` and ``"l2"`` with magnitude.

Scores of one layer compare with each other. Whether those of two layers do is for the user to say; with
``allocation="uniform"`` they need not.
"""

from __future__ import annotations

from torch import Tensor

from secateur.errors import BadInput


def mean_activation(weight: Tensor, *, channel_activation: Tensor, out_dim: int) -> Tensor:
    r"""``1/N Σ |a_c|``: how strongly an output channel fires, over all inputs and positions.

    Args:
        weight: any shape with an output dimension.
        channel_activation: ``(out,)``, of the feature map behind the norm and the nonlinearity; see `secateur.calibrate`.
        out_dim: the dimension of the weight that holds the output channels.

    Returns:
        Scores, float32, of the weight's shape.

    Raises:
        BadInput: not one value for each channel.

    Example:
        >>> import torch
        >>> mean_activation(torch.ones(2, 3), channel_activation=torch.tensor([0.5, 2.0]), out_dim=0)
        tensor([[0.5000, 0.5000, 0.5000],
                [2.0000, 2.0000, 2.0000]])

    Molchanov et al., "Pruning convolutional neural networks for resource efficient inference" (arXiv:1611.06440), section 2.2,
    who also divide by the norm of all of a layer's scores to compare layers.
    """
    return _spread(weight, channel_activation, out_dim, "channel_activation")


def apoz(weight: Tensor, *, channel_apoz: Tensor, out_dim: int) -> Tensor:
    r"""``1 - APoZ``: the share of inputs and positions at which an output channel is not zero.

    Args:
        weight: any shape with an output dimension.
        channel_apoz: ``(out,)``, the share of zeros (average percentage of zeros) in the feature map behind the ReLU.
        out_dim: the dimension of the weight that holds the output channels.

    Returns:
        Scores in [0, 1], float32, of the weight's shape. A layer without a ReLU scores 1 throughout.

    Raises:
        BadInput: not one value for each channel.

    Example:
        >>> import torch
        >>> apoz(torch.ones(2, 1), channel_apoz=torch.tensor([0.75, 0.0]), out_dim=0)
        tensor([[0.2500],
                [1.0000]])

    Hu et al., "Network trimming" (arXiv:1607.03250).
    """
    return _spread(weight, 1 - channel_apoz.float(), out_dim, "channel_apoz")


def batchnorm_scale(weight: Tensor, *, norm_scale: Tensor, out_dim: int) -> Tensor:
    r"""``|gamma_c|`` of the BatchNorm behind an output channel.

    Args:
        weight: any shape with an output dimension.
        norm_scale: ``(out,)``.
        out_dim: the dimension of the weight that holds the output channels.

    Returns:
        Scores, float32, of the weight's shape.

    Raises:
        BadInput: not one value for each channel.

    Example:
        >>> import torch
        >>> batchnorm_scale(torch.ones(2, 1), norm_scale=torch.tensor([-0.1, 1.0]), out_dim=0)
        tensor([[0.1000],
                [1.0000]])

    Liu et al., "Learning efficient convolutional networks through network slimming" (arXiv:1708.06519), who train with an L1
    penalty on gamma first and prune by one threshold over all layers: ``allocation="global"``.
    """
    return _spread(weight, norm_scale.abs(), out_dim, "norm_scale")


def taylor_channel(weight: Tensor, *, channel_taylor: Tensor, out_dim: int) -> Tensor:
    r"""``1/B Σ_b (Σ_i g_bi w_i)²``: the square of what the loss of a batch would change without the channel, to first order.

    Args:
        weight: any shape with an output dimension.
        channel_taylor: ``(out,)``; the inner sum is over the channel's weights and its bias, the outer over batches.
        out_dim: the dimension of the weight that holds the output channels.

    Returns:
        Scores, float32, of the weight's shape.

    Raises:
        BadInput: not one value for each channel.

    Example:
        >>> import torch
        >>> taylor_channel(torch.ones(2, 1), channel_taylor=torch.tensor([0.0, 4.0]), out_dim=0)
        tensor([[0.],
                [4.]])

    Molchanov et al., "Importance estimation for neural network pruning" (arXiv:1906.10771), equation 8. The bias is in the sum
    because it goes with the channel. Their experiments on ResNets sum over gamma and beta of the BatchNorm instead.
    """
    return _spread(weight, channel_taylor, out_dim, "channel_taylor")


def head_importance(weight: Tensor, *, head_gradient: Tensor) -> Tensor:
    r"""``1/N Σ_x |∂L(x) / ∂ξ_h|`` with ``ξ_h`` a factor on a head's output, at 1.

    Args:
        weight: a projection of attention.
        head_gradient: one value for each head, at every feature of it, of a shape that broadcasts to the weight's:
            ``(out, 1)`` for queries, keys and values, ``(1, in)`` for the output projection.

    Returns:
        Scores, float32, of the weight's shape.

    Raises:
        BadInput: a statistic of another shape.

    Example:
        >>> import torch
        >>> head_importance(torch.ones(2, 2), head_gradient=torch.tensor([[0.5, 2.0]]))
        tensor([[0.5000, 2.0000],
                [0.5000, 2.0000]])

    Michel, Levy and Neubig, "Are sixteen heads really better than one?" (arXiv:1905.10650). Their code takes the absolute value
    at each position; here, as in the paper, it is that of a whole input. `secateur.calibrate` divides by the norm of a layer, as
    they do.
    """
    pairs = zip(head_gradient.shape, weight.shape, strict=False)
    if head_gradient.dim() != weight.dim() or any(h not in (1, w) for h, w in pairs):
        raise BadInput(
            f"head_gradient has the shape {tuple(head_gradient.shape)}, which does not broadcast to that of the weight, "
            f"{tuple(weight.shape)}."
        )
    return head_gradient.float().expand_as(weight)


def _spread(weight: Tensor, values: Tensor, out_dim: int, what: str) -> Tensor:
    """One value for each output channel, at every weight of the channel."""
    channels = weight.shape[out_dim]
    if values.shape != (channels,):
        raise BadInput(f"{what} has the shape {tuple(values.shape)}; of a weight with {channels} output channels it is "
                       f"({channels},).")  # fmt: skip
    shape = [channels if d == out_dim else 1 for d in range(weight.dim())]
    return values.float().view(shape).expand_as(weight)
