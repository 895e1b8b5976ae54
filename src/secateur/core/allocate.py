"""Allocations: how many weights each tensor loses. The only rounding is here, and no float crosses into selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from secateur.errors import BadInput, Infeasible

from .types import Spec

CAPS = "max_sparsity and min_keep"
PLUS = 'the rules of "uniform_plus" (a first convolution stays dense, the last layer loses at most 80 %)'


def check_sparsity(value: Any, what: str = "sparsity") -> float:
    """Refuses everything that is not a Python number with 0 <= s < 1, and says what to write instead.

    Raises:
        BadInput: bool, string, numpy or torch scalar, NaN, or out of range.

    >>> check_sparsity(0.9)
    0.9
    """
    module = type(value).__module__.partition(".")[0]
    if module in ("numpy", "torch"):
        single = getattr(value, "size", 1) == 1 or getattr(value, "ndim", 1) == 0
        number = value.item() if single and not getattr(value, "is_meta", False) else None
        hint = f"write {what}={number!r}" if number is not None else "give one number"
        raise BadInput(f"{what} must be a Python number, got a {module} {type(value).__name__} ({value!r}): {hint}.")
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise BadInput(f"{what} must be a Python number with 0 <= {what} < 1, got {value!r} ({type(value).__name__}).")
    if value != value or not 0 <= value < 1:
        hint = ""
        if value == 1:
            hint = " 1 would prune every weight; a count of weights is not a sparsity."
        elif 1 < value <= 100:
            hint = f" Did you mean {float(Fraction(str(value)) / 100):g}?"
        raise BadInput(
            f"{what} is the fraction of the chosen weights that is zero, 0 <= {what} < 1; got {value!r}.{hint}"
        )
    return value if isinstance(value, float) else float(value)


def prune_count(n: int, sparsity: float) -> int:
    """``round(s * n)``, half to even, of the decimal number that was written: the only rounding there is.

    >>> prune_count(10, 0.25), prune_count(10, 0.35), prune_count(1000, 0.3)
    (2, 4, 300)
    """
    return round(Fraction(str(sparsity)) * n)


@dataclass(frozen=True)
class Bounds:
    """What a tensor may lose: at least ``low`` (what is zero already), at most ``high`` (its cap, or ``low``)."""

    low: int
    high: int


def bounds(spec: Spec, zeros: int, max_sparsity: float | None, min_keep: int) -> Bounds:
    """The bounds of one tensor, from what is zero and the caps ``max_sparsity`` and ``min_keep``."""
    n = spec.numel
    cap = n if max_sparsity is None else prune_count(n, max_sparsity)
    return Bounds(zeros, max(zeros, min(cap, max(0, n - min_keep))))


def refuse_infeasible(specs: Sequence[Spec], limits: Sequence[Bounds], total: int, rules: str) -> None:
    """Raises `Infeasible` where all caps together allow less than ``total``; ``rules`` names what sets the caps."""
    most = sum(b.high for b in limits)
    if total > most:
        n = sum(s.numel for s in specs)
        raise Infeasible(
            f"{total} of {n} weights are to go, but {rules} allow only {most} "
            f"({most / n:.4%} of them). Ask for a lower sparsity, or {'loosen the caps' if CAPS in rules else 'lift them'}."
        )


def level_counts(
    slopes: Sequence[int], limits: Sequence[Bounds], total: int, *, earlier_first: bool = True
) -> list[int]:
    """Counts ``clip(round(level * slope), low, high)`` at the one common level where their sum is ``total``.

    Raising a level, instead of handing out largest remainders, means that no tensor gets a weight back when the total
    grows. Where several tensors would step at the same level, the earlier ones do (or the later, for counts of kept
    weights, so that the earlier lose first). Integer arithmetic throughout.

    >>> level_counts([3, 5, 5], [Bounds(0, 3), Bounds(0, 5), Bounds(0, 5)], 6)
    [2, 2, 2]
    >>> level_counts([3, 5, 5], [Bounds(0, 3), Bounds(0, 5), Bounds(0, 5)], 7)
    [2, 3, 2]
    """
    # Steps of two tensors at different levels are at least 1 / (2 a b) apart, so on this grid one step of p crosses the
    # steps of at most one level.
    grid = 4 * max(slopes, default=1) ** 2 + 1

    def counts(p: int) -> list[int]:
        return [min(max((2 * p * a + grid) // (2 * grid), b.low), b.high) for a, b in zip(slopes, limits, strict=True)]

    lo, hi = 0, max((grid * (b.high // max(a, 1) + 2) for a, b in zip(slopes, limits, strict=True)), default=0)
    while hi - lo > 1:
        mid = (lo + hi) // 2
        lo, hi = (lo, mid) if sum(counts(mid)) >= total else (mid, hi)
    at, after = counts(lo), counts(hi)
    order = range(len(at)) if earlier_first else reversed(range(len(at)))
    missing = total - sum(at)
    for i in order:
        step = min(after[i] - at[i], missing)
        at[i] += step
        missing -= step
    return at


def kept_dims(spec: Spec, kernel: bool) -> int:
    """The slope of ER (``kernel`` false) and ERK: expected weights kept per unit of epsilon.

    ER gives a layer the density ``eps (n_in + n_out) / (n_in n_out)``, ERK ``eps sum(dims) / prod(dims)``; both times the
    number of elements. Stacked weights (experts) count as so many layers, and a tensor without dims as one of shape (1,). A
    layer of several tensors has the sum of theirs.
    """
    if spec.members:
        return sum(kept_dims(m, kernel) for m in spec.members)
    stack = 1
    for d in spec.batch_dims:
        stack *= spec.shape[d]
    dims = [s for d, s in enumerate(spec.shape) if d not in spec.batch_dims] or [1]
    features = [spec.shape[d] for d in (spec.out_dim, spec.in_dim) if d is not None]
    if kernel or len(features) < 2:
        return stack * sum(dims)
    rest = 1
    for s in dims:
        rest *= s
    for s in features:
        rest //= max(s, 1)
    return stack * rest * sum(features)


def erdos_renyi(specs: Sequence[Spec], limits: Sequence[Bounds], total: int, kernel: bool) -> list[int]:
    """Counts of ER and ERK: kept weights in proportion to `kept_dims`, capped at dense, at the one epsilon that fits.

    Mocanu et al. (arXiv:1707.04780) for ER, Evci et al. (arXiv:1911.11134) for ERK.
    """
    keep_limits = [Bounds(s.numel - b.high, s.numel - b.low) for s, b in zip(specs, limits, strict=True)]
    keep_total = sum(s.numel for s in specs) - total
    keep = level_counts([kept_dims(s, kernel) for s in specs], keep_limits, keep_total, earlier_first=False)
    return [s.numel - k for s, k in zip(specs, keep, strict=True)]


def plus_limits(specs: Sequence[Spec], limits: Sequence[Bounds]) -> list[Bounds]:
    """The caps of ``uniform_plus``: the first layer stays dense if it is a convolution, the last keeps at least 20 %.

    Gale et al. (arXiv:1902.09574), as Lee et al. (arXiv:2010.07611) define it.

    Raises:
        BadInput: the store does not know the order of the layers (a file does not record it).
    """
    if any(s.order is None for s in specs):
        raise BadInput(
            'allocation="uniform_plus" needs the order of the layers, which a file or a plain dict does not record. Pass '
            "the model or its state_dict(), or name both ends: files=Files(first=NAME, last=NAME), --first and --last; of a dict "
            'give caps by name: allocation="uniform", max_sparsity={"first": 0, "last": 0.8}.'
        )
    ranked = sorted(range(len(specs)), key=lambda i: specs[i].order or 0)
    out = list(limits)
    first, last = ranked[0], ranked[-1]
    if specs[first].role == "conv":
        out[first] = Bounds(limits[first].low, limits[first].low)
    cap = max(limits[last].low, specs[last].numel - prune_count(specs[last].numel, 0.2))
    out[last] = Bounds(limits[last].low, min(out[last].high, cap))
    return out


def pick(table: Mapping[str, float], spec: Spec, matches: Callable[[Spec, str], bool], what: str) -> float | None:
    """The value a mapping of globs gives a tensor: a full name before any glob; ``None`` where nothing matches.

    Raises:
        BadInput: two globs, or two of its full names, match with different values.
    """
    hits = {n: table[n] for n in (spec.name, *spec.aliases) if n in table}
    hits = hits or {g: v for g, v in table.items() if matches(spec, g)}
    if len(set(hits.values())) > 1:
        said = ", ".join(f"{g!r}: {v}" for g, v in hits.items())
        raise BadInput(
            f"{what} is ambiguous for {spec.name!r}: {said}. Use globs that do not overlap, or its full name."
        )
    return next(iter(hits.values()), None)


def check_counts(counts: Any, specs: Sequence[Spec]) -> list[int]:
    """Validates what a user's allocation function returned: ``{name: count}`` for exactly the rows it was given.

    Raises:
        BadInput: not a mapping, names missing or unknown, or a count that is not an int in ``[0, n]``.
    """
    if not isinstance(counts, Mapping):
        raise BadInput(f"an allocation function must return {{name: count}}, got {type(counts).__name__}.")
    names = {s.name for s in specs}
    if set(counts) != names:
        odd = sorted(set(counts) ^ names)
        raise BadInput(f"the allocation function must return one count for each row; missing or unknown: {odd[:6]}.")
    for s in specs:
        c = counts[s.name]
        if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c <= s.numel:
            raise BadInput(f"the allocation function gave {c!r} for {s}: it must be an int, 0 <= count <= {s.numel}.")
    return [counts[s.name] for s in specs]
