"""Hidden states on their way through the blocks of a network, with the blocks before as they are by then.

The model runs once up to its first block; from there on every block is called by itself, with what it got from the model beside
the hidden states (masks, position embeddings) and what the block before it gave.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput

from .batches import EMPTY, Forward, device_of, moved, run_batch
from .blocks import HOW, Block, without_cache
from .mode import eager

Place = int | str
"""Where a value stands in a call or an output: a position, or a name."""


@dataclass
class _Call:
    """What a block is called with beside the hidden states.

    Attributes:
        args, kwargs: the rest of the call; caches of keys and values are left out.
        keyword: the name by which the hidden states are passed, ``None`` where they come first.
        autocast: whether products run in another dtype there, and in which.
        fed: places of what the block before it gives beside the hidden states, and where in its output it stands.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    keyword: str | None
    autocast: tuple[bool, torch.dtype]
    fed: dict[Place, Place] = field(default_factory=dict)

    @staticmethod
    def of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, _Call]:
        """The hidden states and the rest of a block's call."""
        rest = {k: None if _is_cache(v) else v for k, v in kwargs.items()}
        keyword = None
        if args:
            hidden = args[0]
        else:
            named = [k for k, v in rest.items() if isinstance(v, Tensor)]
            keyword = next((k for k in ("hidden_states", *named) if k in rest), "")
            hidden = rest.pop(keyword, None)
        if not isinstance(hidden, Tensor):
            raise BadInput(
                f"the block {name!r} gets a {type(hidden).__name__} where its hidden states should be, one tensor that the block "
                f"before it returned. {HOW}"
            )
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return hidden, _Call([None if _is_cache(v) else v for v in args[1:]], rest, keyword, autocast)

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block makes of hidden states."""
        enabled, dtype = self.autocast
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=enabled):
            if self.keyword is None:
                return block(hidden, *self.args, **self.kwargs)
            return block(*self.args, **{**self.kwargs, self.keyword: hidden})

    def take(self, output: Any) -> None:
        """Takes over what the block before it gives beside the hidden states."""
        given = _entries(output)
        for place, source in self.fed.items():
            self._set(place, given[source])

    def look_for(self, output: Any) -> None:
        """Finds what the block before it gives beside the hidden states."""
        given = [(source, v) for source, v in list(_entries(output).items())[1:] if isinstance(v, Tensor)]
        for place, value in self.places().items():
            for source, v in given:
                if value is v:
                    self.fed[place] = source
                    self._set(place, None)

    def places(self) -> dict[Place, Any]:
        """Everything beside the hidden states, by place."""
        return dict([*enumerate(self.args), *self.kwargs.items()])

    def kind(self, hidden: Tensor) -> Hashable:
        """What calls have in common that are alike but for the numbers in their tensors."""
        return _kind(hidden), tuple((place, _kind(v)) for place, v in self.places().items())

    def _set(self, place: Place, value: Any) -> None:
        if isinstance(place, int):
            self.args[place] = value
        else:
            self.kwargs[place] = value


class _Stop(Exception):
    """The first block was reached: the rest of the model need not run."""


class Walk:
    """The hidden states of all batches, on their way through the blocks.

    Args:
        model: the network, in evaluation mode.
        blocks: in the order they run.
        batches: each runs the model once: the first of its kind wholly, so that it shows whether the blocks feed each other and
            what each is called with; the others up to the first block, unless blocks are called with different things.
        forward: how a batch runs the model.

    Raises:
        BadInput: no batch; a block that does not run, or does not get what the block before it returned.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], batches: Iterable[Any], forward: Forward | None
    ) -> None:
        self.blocks = blocks
        self._hidden: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        alike: dict[Hashable, bool] = {}
        device = device_of(model)
        with torch.no_grad(), without_cache(model), eager():
            for batch in batches:
                caught = _Caught(blocks, alike)
                with caught.hooks():
                    try:
                        (forward or run_batch)(model, moved(batch, device))
                    except _Stop:
                        pass
                self._hidden.append(caught.finish())
                self._calls.append(caught.calls)
        if not self._hidden:
            raise BadInput(EMPTY)

    def observe(self, number: int) -> None:
        """Runs every batch through a block; what it returns is not kept."""
        with torch.no_grad(), eager():
            for hidden, calls in zip(self._hidden, self._calls, strict=True):
                # A block may write to what it gets, and it will get it again.
                _call_of(calls, number).run(self.blocks[number].module, hidden.clone())

    def advance(self, number: int) -> None:
        """Runs every batch through a block as it is now, and keeps what it returns for the next one."""
        with torch.no_grad(), eager():
            for i, calls in enumerate(self._calls):
                output = _call_of(calls, number).run(self.blocks[number].module, self._hidden[i])
                self._hidden[i] = _first(output, self.blocks[number].name)
                if number + 1 < len(calls):
                    calls[number + 1].take(output)


class _Caught:
    """The calls of the blocks in one run of the model, checked as they come.

    Args:
        blocks: in the order they should run.
        alike: kinds of first calls, and whether all blocks then get the same beside the hidden states; added to.
    """

    def __init__(self, blocks: Sequence[Block], alike: dict[Hashable, bool]) -> None:
        self.calls: list[_Call] = []
        self._blocks, self._alike = blocks, alike
        self._hidden: Tensor | None = None
        self._kind: Hashable = None
        self._output: Any = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While it is entered, the blocks are listened to. No hook stays."""
        handles = []
        try:
            for module in {id(b.module): b.module for b in self._blocks}.values():
                # Before the user's own hooks, which run again whenever the block does.
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for h in handles:
                h.remove()

    def finish(self) -> Tensor:
        """What went into the first block, when the model has run."""
        if self._hidden is None or (len(self.calls) < len(self._blocks) and not self._alike.get(self._kind)):
            missing = self._blocks[len(self.calls)].name
            raise BadInput(
                f"the block {missing!r} does not run on a calibration batch, or not after those before it. {HOW}"
            )
        self._alike.setdefault(self._kind, _alike(self.calls))
        return self._hidden.clone() if self._hidden.is_inference() else self._hidden

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(self.calls)
        if number == len(self._blocks) or self._blocks[number].module is not module:
            name = next(b.name for b in self._blocks if b.module is module)
            raise BadInput(
                f"the blocks do not run once each, one after another in this order: {name!r} runs out of turn. {HOW}"
            )
        hidden, call = _Call.of(self._blocks[number].name, args, kwargs)
        self.calls.append(call)
        if number:
            self._check(number, hidden)
            call.look_for(self._output)
            return
        self._hidden = hidden.detach().clone()  # the block may write to it
        self._kind = call.kind(hidden)
        if self._alike.get(self._kind):
            raise _Stop

    def _check(self, number: int, hidden: Tensor) -> None:
        before = self._blocks[number - 1].name
        if not _same(hidden, _first(self._output, before)):
            raise BadInput(
                f"the block {self._blocks[number].name!r} does not get what {before!r} returned, so pruned outputs cannot be fed "
                f"forward. {HOW}"
            )

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = output


def _call_of(calls: Sequence[_Call], number: int) -> _Call:
    """The call of a block: its own, or the first block's where all are alike."""
    return calls[number] if number < len(calls) else calls[0]


def _alike(calls: Sequence[_Call]) -> bool:
    """Whether all blocks of a run get the very same things beside the hidden states."""
    first = calls[0]
    return all(
        c.keyword == first.keyword
        and c.autocast == first.autocast
        and not c.fed
        and _identical(c.places(), first.places())
        for c in calls[1:]
    )


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_identical(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_identical(x, y) for x, y in zip(a, b, strict=True))
    plain = (bool, int, float, str, torch.dtype, torch.device, type(None))
    return a is b or (isinstance(a, plain) and isinstance(b, plain) and a == b)


def _kind(value: Any) -> Hashable:
    """What two values must have in common to be taken for alike before they are looked at."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((k, _kind(v)) for k, v in value.items())
    if isinstance(value, tuple | list):
        return tuple(_kind(v) for v in value)
    plain: Hashable = value if isinstance(value, bool | int | float | str) else type(value).__name__
    return plain


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache")


def _entries(output: Any) -> dict[Place, Any]:
    """What a block returns, by place."""
    if isinstance(output, Mapping):
        return dict(output)
    return dict(enumerate(output)) if isinstance(output, tuple | list) else {0: output}


def _first(output: Any, block: str) -> Tensor:
    """The hidden states in what a block returns."""
    found = output
    while isinstance(found, tuple | list | Mapping) and found:
        found = next(iter(_entries(found).values()))
    if not isinstance(found, Tensor):
        raise BadInput(
            f"the block {block!r} returns a {type(output).__name__} that does not begin with a tensor. {HOW}"
        )
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
