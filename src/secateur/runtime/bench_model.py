"""A whole model, packed and dense, timed from end to end with inputs of its own."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import BadInput, SecateurWarning

from .bench import INT8, OURS
from .candidates import quantised
from .grid import named
from .layers import PackedLayer
from .modules import pack, unpack
from .timing import Ratio, quiet, take_turns

DENSE = (torch.float32, torch.bfloat16)
LOOKS = 3
"""Passes in which linear layers are timed."""


@dataclass(frozen=True)
class Whole:
    """A forward pass of a whole model.

    Attributes:
        seconds: candidate to the median.
        ratios: candidate to how many times its time the packed model's is contained in it.
        faster: ``"float32"`` or ``"bfloat16"``, whichever dense model is the faster.
        outside: candidate to the share of its time that is spent outside its linear layers, which packing cannot change.
        bytes: candidate to the bytes of its parameters and buffers.
    """

    seconds: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    faster: str
    outside: Mapping[str, float]
    bytes: Mapping[str, int]


def whole(model: nn.Module, inputs: Any, turns: int) -> Whole:
    """Times a model that is packed by the table in use, beside the same model dense in float32 and bfloat16, and in int8.

    Args:
        model: packed or not; it is copied, and left as it is.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments; floats are cast to what a model takes.
        turns: how often each is timed.

    Raises:
        BadInput: inputs of another kind.
    """
    runs = dict(_candidates(model, inputs))
    with quiet():
        times = take_turns({name: run for name, (_, run) in runs.items()}, turns)
        outside = {name: outside_of(m, run) for name, (m, run) in runs.items()}
    seconds = {name: t.median for name, t in times.items()}
    ratios = {name: Ratio.of(t.per(times[OURS])) for name, t in times.items() if name != OURS}
    faster = min(map(named, DENSE), key=lambda name: seconds[name])
    return Whole(seconds, ratios, faster, outside, {name: bytes_of(m) for name, (m, _) in runs.items()})


def _candidates(model: nn.Module, inputs: Any) -> Iterator[tuple[str, tuple[nn.Module, Callable[[], object]]]]:
    packed = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)  # that nothing is gained is what the report is about
        pack(packed)
    dtype = next((p.dtype for p in [*packed.parameters(), *packed.buffers()] if p.is_floating_point()), torch.float32)
    yield OURS, (packed, _called(packed, inputs, dtype))
    for dense in DENSE:
        made = unpack(copy.deepcopy(model)).eval().to(dense)
        yield named(dense), (made, _called(made, inputs, dense))
    if (small := quantised(unpack(copy.deepcopy(model)).eval().float())) is not None:
        yield INT8, (small, _called(small, inputs, torch.float32))


def _called(model: nn.Module, inputs: Any, dtype: torch.dtype) -> Callable[[], object]:
    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(inputs, Mapping):
        return partial(model, **pytree.tree_map(cast, dict(inputs)))
    if isinstance(inputs, Tensor):
        return partial(model, cast(inputs))
    if isinstance(inputs, tuple):
        return partial(model, *pytree.tree_map(cast, inputs))
    raise BadInput(
        f"inputs are a tensor, a tuple of arguments or a mapping of keyword arguments; got a {type(inputs).__name__}."
    )


def outside_of(model: nn.Module, run: Callable[[], object]) -> float:
    """The median share of a pass that is not spent in linear layers."""
    shares = []
    for _ in range(LOOKS):
        with _clocked(model) as inside:
            start = perf_counter()
            run()
            shares.append(1 - sum(inside) / (perf_counter() - start))
    return statistics.median(shares)


@contextmanager
def _clocked(model: nn.Module) -> Iterator[list[float]]:
    """Seconds of each call of a linear layer."""
    inside: list[float] = []
    begun: list[float] = []
    with ExitStack() as hooks:
        for m in model.modules():
            if isinstance(m, (nn.Linear, PackedLayer)) or type(m).__name__ in (
                "Conv1D",
                "Linear",
            ):  # and quantised ones
                before = m.register_forward_pre_hook(lambda *_: begun.append(perf_counter()))
                after = m.register_forward_hook(lambda *_: inside.append(perf_counter() - begun.pop()))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield inside


def bytes_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once; of quantised layers their weights."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    asked: list[Any] = [getattr(m, "weight", None) for m in model.modules()]
    small: list[Tensor] = [weight() for weight in asked if callable(weight)]
    return sum(held.values()) + sum(w.numel() * w.element_size() for w in small)
