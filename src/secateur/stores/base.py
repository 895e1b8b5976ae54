"""The protocol every store follows: where tensors live, and nothing about pruning.

A store describes its tensors (`Store.specs`), yields their values in parts (`Store.parts`), sums counts over the workers
that share it (`Store.sum`), and writes parts back (`Store.write`). A module, a dict, a folder of shards and a mesh of
DTensors differ only here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from secateur.core.types import Align, Part, Spec
from secateur.errors import BadInput, NothingChosen


@runtime_checkable
class Store(Protocol):
    """Where tensors live."""

    def specs(self) -> list[Spec]:
        """Every tensor, sorted by name, prunable or not; ``Spec.skip`` says why one is not chosen by default."""
        ...

    def parts(self, spec: Spec, align: Align) -> Iterable[Part]:
        """The values of one tensor that this worker holds, in order, in pieces that cut nothing ``align`` forbids."""
        ...

    def sum(self, counts: Tensor) -> Tensor:
        """``counts`` (int64) added over all workers; the same tensor where there is one."""
        ...

    def write(self, part: Part) -> None:
        """Takes back a part of `parts` whose ``tensor`` has been changed. A no-op where parts are views."""
        ...

    def staged(self, out: Any, overwrite: bool) -> AbstractContextManager[None]:
        """Inside it parts may be written; when it ends without an error the result is in place, else nothing has changed."""
        ...

    def every(self) -> list[Spec]:
        """Every parameter whose values can be counted, chosen or not, tied ones once."""
        ...

    def check(self, specs: Sequence[Spec]) -> None:
        """Raises `BadTensor` for the first of ``specs`` that cannot be pruned as it is. Reads no values."""
        ...


def globs(patterns: str | Sequence[str] | None) -> list[str]:
    """A filter as a list: ``None``, one glob, or several."""
    if patterns is None:
        return []
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, Sequence) or not all(isinstance(p, str) for p in listed):
        raise BadInput(f"include and ignore take a glob or a list of globs over names; got {patterns!r}.")
    return list(listed)


def matches(spec: Spec, pattern: str) -> bool:
    """Whether a glob matches one of the tensor's names or any module above it.

    >>> import torch
    >>> s = Spec("encoder.layer.0.attn.weight", (2, 2), torch.float32, "linear")
    >>> [matches(s, g) for g in ("encoder.layer.0", "*.attn", "*attn*", "encoder.layer", "layer.0", "*.bias")]
    [True, True, True, True, False, False]
    """
    for name in (spec.name, *spec.aliases):
        steps = name.split(".")
        if any(fnmatchcase(".".join(steps[:i]), pattern) for i in range(1, len(steps) + 1)):
            return True
    return False


def choose(
    specs: Sequence[Spec],
    include: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Spec]:
    """Applies the filters, as `filtered` does, to what is to be pruned.

    Raises:
        NothingChosen: a glob of either filter matches no tensor, or nothing is left to prune.
    """
    out = filtered(specs, include, ignore)
    if not any(s.skip is None for s in out):
        reasons = "; ".join(f"{s.name}: {s.skip}" for s in out[:6])
        raise NothingChosen(
            "there is nothing to prune: no tensor is chosen"
            + (f" ({reasons}{'; …' if len(out) > 6 else ''})" if out else " (the target has no tensors)")
            + ". Name a tensor in full in include= to prune one that is skipped by default."
        )
    return out


def filtered(
    specs: Sequence[Spec],
    include: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> list[Spec]:
    """Applies the filters: returns all specs, ``skip`` set on those not chosen and ``named`` on those named in full.

    A glob matches a name, an alias, or any module above it, and chooses among those that are not skipped; only a full name
    without wildcards adds a tensor that is skipped by default.

    Raises:
        NothingChosen: a glob of either filter matches no tensor.
    """
    inc, ign = globs(include), globs(ignore)
    for kind, patterns in (("include", inc), ("ignore", ign)):
        for p in patterns:
            if not any(matches(s, p) for s in specs):
                names = ", ".join(s.name for s in specs[:8]) + (", …" if len(specs) > 8 else "")
                raise NothingChosen(
                    f"{kind}={p!r} matches nothing. Give a tensor's name, a module's name, or a glob of either "
                    f'("*" crosses dots). The target has: {names or "no tensors at all"}.'
                )
    return [_filtered(s, inc, ign) for s in specs]


def _filtered(spec: Spec, include: list[str], ignore: list[str]) -> Spec:
    named = any(p in (spec.name, *spec.aliases) for p in include)
    if any(matches(spec, p) for p in ignore):
        return replace(spec, skip="ignored by the filter")
    if named:
        return replace(spec, skip=None, named=True)
    if include and spec.skip is None and not any(matches(spec, p) for p in include):
        return replace(spec, skip="not in the filter")
    return spec
