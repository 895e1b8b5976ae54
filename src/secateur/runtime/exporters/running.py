"""Running a model on example inputs: what it gives, its graph, and whether a file made of it gives the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import BadInput, SecateurError
from secateur.evaluate.batches import device_of, moved
from secateur.evaluate.blocks import without_cache
from secateur.evaluate.mode import eager, only_training

_LOGGERS = ("torch.onnx._internal.exporter._registration", "torch.export", "nncf", "openvino")

Shape = tuple[int | None, ...]
"""Sizes of an input; ``None`` where any will do."""


@dataclass(frozen=True)
class Call:
    """How a model is called: a tensor or a tuple of arguments, or keyword arguments by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(value: Any, what: str) -> Call:
        """A call of a user's example.

        Raises:
            BadInput: no example, or one without a tensor.
        """
        if value is None:
            raise BadInput(
                f"{what}: give example_inputs, what the model is called with (a tensor, a tuple of arguments, or a dict of "
                "keyword arguments), with real values: the result is run on it and compared."
            )
        if isinstance(value, Mapping):
            call = Call((), dict(value))
        else:
            call = Call(tuple(value) if isinstance(value, tuple | list) else (value,), {})
        if not call.leaves():
            raise BadInput(f"{what}: example_inputs hold no tensor; got a {type(value).__name__}.")
        return call.each(Tensor.detach)

    def leaves(self) -> list[Tensor]:
        """The tensors, in order."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def arrays(self) -> list[Any]:
        """The tensors as numpy's, for other runtimes."""
        return [t.contiguous().numpy() for t in self.leaves()]

    def each(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor changed."""
        args, kwargs = tree_map(lambda v: change(v) if isinstance(v, Tensor) else v, (self.args, self.kwargs))
        return Call(args, kwargs)


Run = Callable[[Call], Sequence[Tensor]]
"""What runs a model or what was made of it: a call to the tensors it gives."""


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients or a cache, uncompiled; put back as it was on leaving."""
    with torch.no_grad(), only_training(model), without_cache(model), eager():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other packages warn, log and draw bars about what is none of the user's business."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors a model at rest gives.

    Raises:
        BadInput: it does not run on the example, gives no tensor, or gives NaN or Inf, which cannot be compared.
    """
    device = device_of(model)
    try:
        given = model(*moved(call.args, device), **moved(call.kwargs, device))
        found = [t.cpu() for t in tree_leaves(given) if isinstance(t, Tensor)]
    except Exception as e:  # the user's code
        raise BadInput(f"the model does not run on the example inputs: {first_line(e)}") from e
    if not found:
        raise BadInput("the model gives no tensor on the example inputs, so there is nothing to compare.")
    if not all(torch.isfinite(t).all() for t in found):
        raise BadInput("the model's own outputs on the example inputs hold NaN or Inf: a result could not be verified.")
    return found


def first_line(e: BaseException) -> str:
    """What an error says, in a line."""
    return next((line for line in str(e).splitlines() if line.strip()), repr(e))[:300]


def traced(model: nn.Module, call: Call) -> tuple[ExportedProgram, list[Shape]]:
    """The graph of a model at rest, and the shapes of its inputs.

    The first dim of every input, and of integers (tokens) the second, stays open where the model lets it.

    Raises:
        BadInput: the model does not run on the call, or torch cannot export it.
    """
    outputs(model, call)
    lead = {len(t) for t in call.leaves() if t.dim()}
    if lead == {1}:  # torch takes a size of 1 for a constant
        with contextlib.suppress(BadInput):
            outputs(model, doubled := call.each(_doubled))
            call = doubled
    shapes = tree_map(_open, (call.args, call.kwargs))
    try:
        with quiet():
            dynamic = shapes[1] if call.kwargs else shapes[0]
            program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as e:  # whatever stands in the way of a graph
        raise BadInput(f"torch.export cannot make a graph of the model: {first_line(e)}") from e
    wanted = set(program.graph_signature.user_inputs)
    found = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    inputs = [v for v in found if isinstance(v, Tensor)]
    return program, [tuple(None if isinstance(s, torch.SymInt) else int(s) for s in v.shape) for v in inputs]


def words(shape: Shape) -> str:
    """A shape to read.

    Example:
        >>> words((None, 3, 8))
        'any × 3 × 8'
    """
    return " × ".join("any" if s is None else str(s) for s in shape)


def variants(call: Call, shapes: Sequence[Shape]) -> Iterator[tuple[str, Call]]:
    """The example, and others made from it where dims are open: twice the batch, its first sample, a shorter sequence."""
    yield "the example inputs", call
    leaves = call.leaves()
    if all(s and s[0] is None for s in shapes) and len({len(t) for t in leaves}) == 1:
        yield f"a batch of {2 * len(leaves[0])}", call.each(_doubled)
        if len(leaves[0]) > 1:
            yield "a batch of 1", call.each(lambda t: t[:1])
    lengths = {t.shape[1] for t, s in zip(leaves, shapes, strict=True) if len(s) > 1 and s[1] is None}
    if len(lengths) == 1 and all(len(s) > 1 and s[1] is None for s in shapes) and (n := lengths.pop()) > 2:
        yield f"sequences of {n - 1}", call.each(lambda t: t[:, : n - 1])


def verify(wants: Run, gives: Run, calls: Sequence[tuple[str, Call]], tolerance: float | None) -> float:
    """Runs a result on every call, and holds what it gives against the model's.

    Args:
        wants: what runs the model.
        gives: what runs the result.
        calls: what to run on, each with words for it.
        tolerance: how much an output may differ, as a share of its largest magnitude; ``None``: as much as it does.

    Returns:
        The largest such difference.

    Raises:
        BadInput: the model's own outputs cannot be compared.
        SecateurError: the result gives something else.
    """
    worst = 0.0
    for what, call in calls:
        wanted = wants(call)
        try:
            found = gives(call)
        except Exception as e:  # of the runtime's own kinds
            raise SecateurError(f"the exported model does not run on {what}: {first_line(e)}") from e
        shapes = [tuple(t.shape) for t in found], [tuple(t.shape) for t in wanted]
        if shapes[0] != shapes[1]:
            raise SecateurError(f"on {what} the exported model gives shapes {shapes[0]}, the model {shapes[1]}.")
        worst = max(worst, *(_difference(f, w, what) for f, w in zip(found, wanted, strict=True)))
        if tolerance is not None and worst > tolerance:
            raise SecateurError(
                f"on {what} the exported model's outputs differ from the model's by {worst:.2g} of their largest magnitude, "
                f"more than the {tolerance:.2g} that rounding explains. The result was not kept."
            )
    return worst


def tolerance_of(model: nn.Module) -> float:
    """What rounding may do to outputs: the root of the coarsest dtype's epsilon."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return max(torch.finfo(k).eps for k in kinds) ** 0.5


def _difference(found: Tensor, wanted: Tensor, what: str) -> float:
    if not torch.isfinite(found).all():
        raise SecateurError(f"on {what} the exported model gives NaN or Inf where the model does not.")
    if not wanted.numel():
        return 0.0
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _doubled(t: Tensor) -> Tensor:
    return torch.cat([t, t]) if t.dim() else t


def _open(value: Any) -> dict[int, Any] | None:
    """Which dims of an input stay open."""
    if not isinstance(value, Tensor):
        return None
    dims = 2 if not value.is_floating_point() and value.dim() > 1 else min(1, value.dim())
    return dict.fromkeys(range(dims), Dim.AUTO)
