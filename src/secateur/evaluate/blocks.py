"""The blocks of a network, one after another: what goes into each, with the blocks before it as they are by then.

The model runs once up to its first block; from there on every block is called by itself, with what it got from the model beside
the hidden states (masks, position embeddings) and the outputs of the block before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput

from .batches import device_of, moved, run_batch

HOW = (
    'Name them, in the order they run, with secateur.Calibration(batches, blocks="encoder.layers") (a module whose children '
    'are the blocks) or blocks=["stem", "layer1", …]; or say blocks="whole" to observe all layers of the dense network in one '
    "go."
)


@dataclass(frozen=True)
class Block:
    """A module of the network that gets hidden states and gives them on."""

    name: str
    module: nn.Module

    def holds(self, tensor: str) -> bool:
        """Whether a tensor of this name lies in the block."""
        return tensor.startswith(f"{self.name}.") or not self.name


def find_blocks(model: nn.Module, asked: str | Sequence[str], weights: Mapping[str, int]) -> list[Block]:
    """The blocks of a model.

    Args:
        model: the network.
        asked: ``"auto"``; the name of a module whose children are the blocks; or the blocks' names.
        weights: sizes of the tensors to prune, by name.

    Raises:
        BadInput: no blocks where they were asked for, or ``"auto"`` finds none.
    """
    modules = dict(model.named_modules())
    if isinstance(asked, str) and asked != "auto":
        return _children(asked, _named(asked, modules))
    if not isinstance(asked, str):
        return [Block(name, _named(name, modules)) for name in asked]
    if isinstance(model, nn.Sequential):
        return _children("", model)
    total = sum(weights.values())
    for name, module in modules.items():
        least = {nn.ModuleList: 0.5, nn.Sequential: 0.9}.get(
            type(module), 1.0
        )  # a stage of a convolutional network is no stack
        inside = sum(n for t, n in weights.items() if t.startswith(f"{name}."))
        if inside > least * total and len({type(m) for m in module.children()}) == 1:
            return _children(name, module)
    raise BadInput(f"the blocks of this {type(model).__name__} cannot be found: no list of layers of one kind holds most of its "
                   f"weights. {HOW}")  # fmt: skip


def _children(name: str, module: nn.Module) -> list[Block]:
    blocks = [Block(f"{name}.{n}" if name else n, m) for n, m in module.named_children()]
    if not blocks:
        raise BadInput(f"blocks={name!r}: this {type(module).__name__} has no children that could be blocks. {HOW}")
    return blocks


def _named(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    if not isinstance(name, str) or name not in modules:
        some = ", ".join([n for n in modules if n.count(".") < 2 and n][:12])
        raise BadInput(f"blocks: {name!r} is no module of this model; it has {some}, …")
    return modules[name]


@dataclass
class _Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.keyword is None:
            return _first(block(hidden, *self.args, **self.kwargs))
        return _first(block(*self.args, **{**self.kwargs, self.keyword: hidden}))

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, _Call]:
        """The hidden states and the rest of a call; caches of keys and values are left out."""
        kept = {k: None if _is_cache(v) else v for k, v in kwargs.items()}
        if args:
            return args[0], _Call(tuple(None if _is_cache(v) else v for v in args[1:]), kept, None)
        name = "hidden_states" if "hidden_states" in kept else next(k for k, v in kept.items() if isinstance(v, Tensor))
        hidden: Tensor = kept.pop(name)  # type: ignore[assignment]
        return hidden, _Call((), kept, name)

    def tensors(self) -> dict[str, Any]:
        """What may differ from block to block, by place."""
        return {str(i): v for i, v in enumerate(self.args)} | self.kwargs


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def _first(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


class _Stop(Exception):
    """The first block was reached: the rest of the model need not run."""


class Walk:
    """The hidden states of all batches, on their way through the blocks.

    Args:
        model: the network, in evaluation mode.
        blocks: in the order they run.
        batches: each runs the model once, up to the first block.
        forward: how a batch runs the model.

    Raises:
        BadInput: no batch; a block that does not run, or does not get what the block before it returned.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], batches: Iterator[Any], forward: Callable[..., Any] | None
    ) -> None:
        self.blocks = blocks
        self._run = forward or run_batch
        self._hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        with torch.no_grad(), without_cache(model):
            device = device_of(model)
            shared = True
            for number, batch in enumerate(batches):
                batch = moved(batch, device)
                if number == 0 or not shared:
                    calls = self._whole(model, batch)
                    shared = shared and _alike(calls)
                else:
                    calls = self._start(model, batch)
                self._calls.append(calls)
        if not self._hidden:
            raise BadInput("the calibration is empty: there is no batch to run. Was its loader used up before?")

    def observe(self, number: int) -> None:
        """Runs every batch through a block; what it returns is not kept."""
        with torch.no_grad():
            for hidden, calls in zip(self._hidden, self._calls, strict=True):
                _call_of(calls, number).run(self.blocks[number].module, hidden)

    def advance(self, number: int) -> None:
        """Runs every batch through a block as it is now, and keeps what it returns for the next one."""
        with torch.no_grad():
            for i, calls in enumerate(self._calls):
                self._hidden[i] = _call_of(calls, number).run(self.blocks[number].module, self._hidden[i])

    def _start(self, model: nn.Module, batch: Any) -> list[_Call]:
        """Runs a batch up to the first block."""
        with _catching(self.blocks[:1], stop=True) as caught:
            try:
                self._run(model, batch)
            except _Stop:
                pass
        return self._kept(caught)

    def _whole(self, model: nn.Module, batch: Any) -> list[_Call]:
        """Runs a batch through the whole model, and checks that the blocks feed each other."""
        with _catching(self.blocks, stop=False) as caught:
            self._run(model, batch)
        order = [name for name, _, _, _ in caught]
        names = [b.name for b in self.blocks]
        if order != names:
            missing = [n for n in names if n not in order]
            what = f"{missing[0]!r} does not run" if missing else f"they run in the order {', '.join(order[:6])}"
            raise BadInput(f"the blocks do not run once each, one after another: {what}. {HOW}")
        for (before, _, _, output), (name, args, kwargs, _) in pairwise(caught):
            if not args and not kwargs:
                raise BadInput(f"the block {name!r} is called without arguments. {HOW}")
            hidden, _ = _Call.of(args, kwargs)
            if not isinstance(hidden, Tensor) or not _same(hidden, _first(output)):
                raise BadInput(
                    f"the block {name!r} does not get what {before!r} returned, so pruned outputs cannot be fed forward. {HOW}"
                )
        return self._kept(caught)

    def _kept(self, caught: Sequence[_Caught]) -> list[_Call]:
        if not caught:
            raise BadInput(f"the block {self.blocks[0].name!r} does not run on a calibration batch. {HOW}")
        parts = [_Call.of(args, kwargs) for _, args, kwargs, _ in caught]
        self._hidden.append(parts[0][0].detach())
        return [call for _, call in parts]


_Caught = tuple[str, tuple[Any, ...], dict[str, Any], Any]
"""A block's name, what it was called with, and what it returned."""


@contextmanager
def _catching(blocks: Sequence[Block], stop: bool) -> Iterator[list[_Caught]]:
    """Notes every call of the blocks; ``stop`` ends the run at the first one. No hook stays."""
    caught: list[_Caught] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if stop:
                caught.append((name, args, kwargs, None))
                raise _Stop

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            caught.append((name, args, kwargs, output))

        return hook

    try:
        for b in blocks:
            handles.append(b.module.register_forward_pre_hook(enter(b.name), with_kwargs=True))
            handles.append(b.module.register_forward_hook(leave(b.name), with_kwargs=True))
        yield caught
    finally:
        for h in handles:
            h.remove()


def _call_of(calls: Sequence[_Call], number: int) -> _Call:
    """The call of a block: its own, or the first block's where all are alike."""
    return calls[number] if number < len(calls) else calls[0]


def _alike(calls: Sequence[_Call]) -> bool:
    """Whether all blocks of a run get the very same things beside the hidden states."""
    first = calls[0].tensors()
    return all(
        c.keyword == calls[0].keyword
        and c.tensors().keys() == first.keys()
        and all(_identical(v, first[k]) for k, v in c.tensors().items())
        for c in calls[1:]
    )


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_identical(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A language model's cache of keys and values is off: it would grow with every run of a block."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        for c, _ in before:
            c.use_cache = False
        yield
    finally:
        for c, was in before:
            c.use_cache = was
