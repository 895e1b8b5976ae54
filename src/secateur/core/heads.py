"""Heads of attention: units that are slices of several tensors, which live or die together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from secateur.errors import BadInput, NotDefined

from .patterns import Block, Channel, Pattern, Reduction, check_reduction
from .types import Member, Spec, units_along

NO_ATTENTION = (
    "no layer of attention was found. One is found by the names of its projections in one module: q_proj, k_proj, v_proj and "
    "o_proj or out_proj; query, key, value and output.dense beside it; c_attn and c_proj; in_proj_weight and out_proj; or "
    "another of those in secateur.stores.attention. For other names pass a dict of the same tensors under such names: they are "
    "pruned in place"
)


@dataclass(frozen=True)
class Slices:
    """Units of one tensor that are slices along one dim: an equal share of each of the dim's sections."""

    shape: tuple[int, ...]
    dim: int
    sections: tuple[int, ...]
    units: int
    followers: tuple[Member, ...] = ()

    @property
    def unit_size(self) -> int:
        """How many weights a unit has."""
        return prod(self.shape) // self.units

    def unit_of(self, index: Tensor) -> Tensor:
        """Unit ids (int64, same shape) of elements given by flat index."""
        at = index // prod(self.shape[self.dim + 1 :]) % self.shape[self.dim]
        return units_along(self.sections, self.units).to(index.device)[at]


@dataclass(frozen=True)
class Head:
    """Whole heads of attention: a head's rows of queries, keys and values, and its columns of the output projection.

    A unit spans the weights of all four (or of two, where they are packed), and its score is taken over all of them. It takes
    along its slices of the biases of queries, keys and values; they do not count in the sparsity, the report lists them. Where
    several heads share keys and values (grouped or multi-query attention), those heads live or die together with them: the unit
    is the group. Everything outside of attention is left alone.

    Args:
        n: heads of a layer, those of queries. The groups show in the shapes.
        reduce: how a head's scores become one, as for `Block`; ``"l2"`` of magnitudes within a layer, ``"mean"`` where heads of
            several layers compete and of every other criterion.

    Raises:
        BadInput: not an int >= 1, or an unknown reduction.

    Example:
        >>> import torch, secateur
        >>> attention = torch.nn.MultiheadAttention(4, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = attention.in_proj_weight.fill_(1.0), attention.out_proj.weight.fill_(1.0)
        ...     _ = attention.in_proj_weight[2:4].fill_(0.5)
        >>> secateur.prune(attention, 0.5, pattern=secateur.Head(2)).zeros
        32
        >>> attention.in_proj_weight[:, 0].tolist()      # two rows a head, of queries, of keys and of values
        [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
        >>> attention.out_proj.weight[0].tolist()
        [1.0, 1.0, 0.0, 0.0]

    Michel, Levy and Neubig, "Are sixteen heads really better than one?" (arXiv:1905.10650), who mask a head's output, which
    comes to the same.
    """

    n: int
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise BadInput(f"Head(n) takes the number of heads of a layer, an int >= 1; got {self.n!r}.")
        check_reduction(self.reduce)

    def why_not(self, spec: Spec) -> str | None:
        """It must be a projection of attention, and the layer's features divide into heads."""
        a = spec.attention
        if a is None:
            return "it is no projection of a layer of attention whose names and shapes are known"
        if a.outputs % self.n or not a.outputs:
            return f"the {a.outputs} features of {a.layer!r} do not divide into {self.n} heads"
        groups, rest = divmod(a.values * self.n, a.outputs)
        if rest or not groups or self.n % groups:
            return f"{a.values} features of values in {a.layer!r} are no whole share of {self.n} heads of {a.outputs // self.n}"
        if a.queries * groups != a.keys * self.n or a.keys % groups:
            return (
                f"{a.queries} features of queries and {a.keys} of keys in {a.layer!r} are not those of {self.n} heads"
            )
        return None

    def grid(self, spec: Spec) -> Slices:
        """The heads of one tensor, with the biases that follow them; or those of a whole layer, a row each."""
        if spec.members:
            return Slices(spec.shape, 0, spec.shape[:1], spec.shape[0])
        a = spec.attention
        assert a is not None
        return Slices(spec.shape, a.dim, a.sections, a.values * self.n // a.outputs, a.followers)

    def __str__(self) -> str:
        return f"head:{self.n}"


UnitPattern = Block | Channel | Head


def joined(specs: Sequence[Spec], pattern: Pattern) -> list[Spec]:
    """What units are counted over: each tensor by itself, or as one the tensors of a layer of attention under `Head`.

    A layer has the place of the first of its tensors, and is found by the name of any of them.

    Raises:
        NotDefined: not all of a layer's tensors are there.
    """
    if not isinstance(pattern, Head):
        return list(specs)
    layers: dict[tuple[str, ...], list[Spec]] = {}
    for spec in specs:
        assert spec.attention is not None
        layers.setdefault(spec.attention.tensors, []).append(spec)
    return [_layer(members, names, pattern) for names, members in layers.items()]


def _layer(members: list[Spec], names: tuple[str, ...], pattern: Head) -> Spec:
    """The tensors of a layer of attention as one matrix, a row for each head."""
    first = members[0]
    assert first.attention is not None
    if missing := [n for n in names if n not in {m.name for m in members}]:
        raise NotDefined(
            f"a head of {first.attention.layer!r} has slices of {', '.join(names)}, which live or die together, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not chosen: choose all of a layer, or leave it out."
        )
    units = pattern.grid(first).units
    order = None if any(m.order is None for m in members) else min(m.order or 0 for m in members)
    return Spec(
        first.attention.layer, (units, sum(m.numel for m in members) // units), first.dtype, "attention", 0, 1,
        aliases=tuple(n for m in members for n in (m.name, *m.aliases)), order=order, members=tuple(members),
    )  # fmt: skip
