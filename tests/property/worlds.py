"""Tensors to select from, the routes a selection can take, and stores that cut tensors in pieces and share them out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from secateur import native
from secateur.core.choose import Selector, Taken, selector_of
from secateur.core.criteria import Criterion, magnitude
from secateur.core.keys import FORMATS
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.plan import Plan, keep_mask
from secateur.core.select import identity
from secateur.core.source import Source
from secateur.core.types import Align, Part, Parts, Reduce, Spec
from secateur.runtime.timing import threads

T = TypeVar("T")

DTYPES = list(FORMATS)
FILLS = ("normal", "equal", "zeros", "few values", "sparse", "any bits")
ROUTES = [("native", 1), ("native", 2), ("torch", 1), ("torch", 2)]

routes = pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r[0]}-{r[1]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@contextmanager
def going(route: tuple[str, int]) -> Iterator[None]:
    """Runs with the native kernels or without, on so many threads."""
    kind, count = route
    if kind == "native" and not native.available():
        pytest.skip("built without the native kernels")
    with pytest.MonkeyPatch.context() as patch:
        if kind == "torch":
            patch.setattr(native, "available", lambda: False)
        with threads(count):
            yield


def example(shape: Sequence[int], dtype: torch.dtype, fill: str = "normal", seed: int = 0) -> Tensor:
    """A tensor of finite values of one kind."""
    g = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    if fill == "any bits":
        view = FORMATS[dtype].view
        t = torch.randint(-(2**62), 2**62, (n,), generator=g).to(view).view(dtype)
        wide = t.to(torch.float64)
        return torch.where(torch.isfinite(wide), wide, 0.0).to(dtype).view(*shape)
    drawn = torch.randn(n, generator=g, dtype=torch.float64)
    values = {
        "normal": drawn,
        "equal": torch.full((n,), -0.5, dtype=torch.float64),
        "zeros": torch.where(drawn > 0, 0.0, -0.0).to(torch.float64),
        "few values": torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -0.25]).double()[(drawn.abs() * 100).long() % 6],
        "sparse": torch.where(drawn.abs() < 1, 0.0, drawn),
    }[fill]
    return values.to(dtype).view(*shape)


@st.composite
def pools(
    draw: st.DrawFn, dtype: torch.dtype | None = None, most: int = 120, strides: bool = True
) -> dict[str, Tensor]:
    """Up to five flat or two-dimensional tensors of mixed sizes, kinds and (unless one is given) dtypes."""
    pool = {}
    for i in range(draw(st.integers(1, 5))):
        n = draw(st.sampled_from([0, 1, 2, 7, 31]) | st.integers(0, most))
        kind = dtype or draw(st.sampled_from(DTYPES))
        fill = draw(st.sampled_from(FILLS))
        t = example((n,), kind, fill, seed=draw(st.integers(0, 5)))
        if strides and n % 3 == 0 and draw(st.booleans()):
            t = t.view(3, -1).t()
        pool[f"t{(7 * i + 3) % 5}"] = t  # the order of the dict is not the order of the names
    return pool


@st.composite
def counts_of(draw: st.DrawFn, pool: Mapping[str, Tensor]) -> int:
    """A count over a pool, the ends more often than by chance."""
    n = sum(t.numel() for t in pool.values())
    return draw(st.sampled_from(sorted({0, min(1, n), max(n - 1, 0), n})) | st.integers(0, n))


def specs_of(tensors: Mapping[str, Tensor], **more: Any) -> list[Spec]:
    """Descriptions, sorted by name, with everything else that `Spec` takes."""
    order = {name: i for i, name in enumerate(tensors)}
    found = [
        Spec(name, tuple(t.shape), t.dtype, **{"role": "linear", "order": order[name], **more})
        for name, t in tensors.items()
    ]
    return sorted(found, key=lambda s: s.name)


@dataclass
class Pieces:
    """One worker's share of some tensors, cut into pieces of ``size`` elements; worker i holds every ``workers``-th piece.

    Attributes:
        size: elements of a piece; a multiple of what must not be cut, for parts aligned to units.
        strided: whether the pieces come with an index tensor, their elements in an order of their own.
        runs: number of neighbouring elements that stay neighbours in a strided piece.
    """

    tensors: Mapping[str, Tensor]
    size: int
    strided: bool = False
    worker: int = 0
    workers: int = 1
    runs: int = 1

    def parts(self, spec: Spec, align: Align) -> Iterable[Part]:
        """The worker's pieces. The whole tensor, where one worker is asked for it, lies in strided memory."""
        t = self.tensors[spec.name]
        if align == "whole" and self.workers == 1:
            apart = t.new_empty((*t.shape, 2))[..., 0] if t.dim() else t.clone()
            apart.copy_(t)
            return [Part(spec, apart)]
        return self._pieces(spec, t.reshape(-1))

    def _pieces(self, spec: Spec, flat: Tensor) -> Iterator[Part]:
        n = flat.numel()
        where = torch.arange(n)
        if self.strided:  # every second run first: a piece then is no interval of the tensor
            block = torch.div(where, self.runs, rounding_mode="floor")
            where = where[torch.argsort(block % 2, stable=True)]
        for i, at in enumerate(where.split(self.size)):
            if i % self.workers == self.worker:
                yield Part(spec, flat[at], at if self.strided else int(at[0]) if n else 0)


@dataclass
class Exchange:
    """Adds counts over workers that run as threads; all must ask the same number of times."""

    workers: int
    _slots: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.workers)

    def of(self, worker: int) -> Reduce:
        """The reduce of one worker."""

        def reduce(counts: Tensor) -> Tensor:
            self._slots[worker] = counts.clone()
            self.barrier.wait(timeout=20)
            total = torch.stack([self._slots[w] for w in range(self.workers)]).sum(0)
            self.barrier.wait(timeout=20)
            return total

        return reduce

    def run(self, job: Callable[[int, Reduce], T]) -> list[T]:
        """``job(worker, reduce)`` in a thread each; what they return, by worker."""
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def work(worker: int) -> None:
            try:
                results[worker] = job(worker, self.of(worker))
            except BaseException as e:
                errors.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(w,)) for w in range(self.workers)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for e in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise e
        return [results[w] for w in range(self.workers)]


def whole(tensors: Mapping[str, Tensor], resident: bool = True) -> Parts:
    """Each tensor in one part, with its own strides; in memory anyway, as a model's, or read for the purpose, as a file's."""
    return lambda spec, align: [Part(spec, tensors[spec.name], resident=resident)]


def selecting(
    parts: Parts,
    pattern: Pattern | None = None,
    criterion: Criterion = magnitude,
    reduce: Reduce = identity,
    nonfinite: str = "error",
) -> Selector:
    """The selector of a pattern over parts."""
    return selector_of(pattern or Unstructured(), Source(parts, reduce, criterion, nonfinite))


def gone_of(selector: Selector, spec: Spec, taken: Taken) -> Tensor:
    """What a cut prunes of one tensor that the selector holds all of: flat bool, by flat index."""
    out = torch.zeros(spec.numel, dtype=torch.bool)
    seen = 0
    for part, gone in selector.gone(spec, taken.cut):
        out[part.index().reshape(-1)] = gone.reshape(-1)
        seen += gone.numel()
    assert seen == spec.numel
    return out


def weights(
    draw: st.DrawFn, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, fills: Sequence[str] = FILLS
) -> dict[str, Tensor]:
    """A tensor of drawn values for every shape."""
    return {
        name: example(shape, dtype, draw(st.sampled_from(fills)), seed=draw(st.integers(0, 9)))
        for name, shape in shapes.items()
    }


def masks_of(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keep-mask of every tensor of a plan."""
    return {r.name: keep_mask(plan, Part(r.spec, tensors[r.name])) for r in plan.chosen}


def pruned(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors with the plan carried out."""
    keep = masks_of(plan, tensors)
    wide = {n: torch.where(keep[n], t.to(torch.float64), 0.0) for n, t in tensors.items()}
    return {n: t.to(tensors[n].dtype) for n, t in wide.items()}
