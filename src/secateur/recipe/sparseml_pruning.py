"""What SparseML's gradual pruning modifiers become."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.allocate import check_sparsity
from secateur.errors import BadInput

from .sparseml_names import globs_of
from .sparseml_text import Modifier, short

GRADUAL = (
    "GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier", "LegacyGMPruningModifier",
    "StructuredPruningModifier",
)  # fmt: skip
_KNOWN = {
    "params", "targets", "init_sparsity", "final_sparsity", "start_epoch", "start", "end_epoch", "end", "update_frequency",
    "update", "inter_func", "update_scheduler", "scheduler_args", "mask_type", "mask_structure", "leave_enabled",
    "global_sparsity", "apply_globally", "score_type", "phased", "log_types", "log_frequency",
}  # fmt: skip
_CURVES = {"linear": ("linear", 1.0), "cubic": ("cubic", 3.0), "inverse_cubic": ("polynomial", 1 / 3)}


@dataclass(frozen=True)
class Way:
    """One set of tensors on its way to a sparsity; ``include`` is ``None`` for secateur's own choice."""

    source: str
    target: float
    include: tuple[str, ...] | None
    allocation: str
    pattern: str
    schedule: dict[str, Any]


def groups(pattern: str) -> re.Match[str] | None:
    """N and M of a pattern N:M."""
    return re.fullmatch(r"(\d+):(\d+)", pattern)


class _NotCarried(Exception):
    """Why a modifier has no counterpart."""


def ways_of(m: Modifier, epochs: int, notes: list[str]) -> list[Way]:
    """What one modifier prunes, one `Way` for each final sparsity; none where it has no counterpart, and a note says why.

    Raises:
        BadInput: a setting that is missing or cannot be meant.
    """
    said: list[str] = []
    try:
        found = _ways(m, epochs, said)
    except _NotCarried as e:
        notes.append(f"{m} was not carried over: {e}.")
        return []
    notes += [f"{m}: {s}." for s in said]
    return found


def _ways(m: Modifier, epochs: int, said: list[str]) -> list[Way]:
    if (score := m.get("score_type") or "magnitude") != "magnitude":
        raise _NotCarried(f"it scores weights by {short(score)}, and recipes of secateur prune by magnitude")
    if m.get("phased"):
        raise _NotCarried("phased: true is AC/DC, which is in secateur.schedules.ac_dc and not in its recipes")
    pattern = _pattern(m, said)
    shared = m.kind.startswith("Global") or bool(m.get("global_sparsity", "apply_globally"))
    if m.get("apply_globally"):
        said.append(
            "apply_globally was refused by SparseML on PyTorch; it is carried over as one pool over all tensors"
        )
    finals = _finals(m, pattern, said)
    schedule = _schedule(m, min(t for t, _ in finals), epochs, said)
    allocation = "global" if shared or groups(pattern) else "uniform"  # N:M fixes every count, and allows no other word
    found = [Way(str(m), t, _include(params, said), allocation, pattern, dict(schedule)) for t, params in finals]
    if "x" in pattern and allocation == "uniform":
        said.append("SparseML ranks blocks by the mean of |w|; secateur ranks those of one tensor by their L2 norm")
    if m.get("leave_enabled") is False:
        said.append(
            "leave_enabled: false let weights grow back after the end; secateur holds its zeros to the end of training"
        )
    if left := sorted(str(k) for k in m.settings if k not in _KNOWN):
        said.append(f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not carried over")
    return found


def _finals(m: Modifier, pattern: str, said: list[str]) -> list[tuple[float, Any]]:
    """(final sparsity, the params it is for): one, or several where final_sparsity is a mapping."""
    final = m.get("final_sparsity")
    fixed = groups(pattern)
    if isinstance(final, dict) and final and not fixed:
        return [(_sparsity(m, "final_sparsity", k), v) for k, v in final.items()]
    params = m.get("params", "targets")
    if params is None and m.kind == "StructuredPruningModifier":
        params = "__ALL_PRUNABLE__"
    if fixed:
        target = 1 - int(fixed[1]) / int(fixed[2])
        if final != target or m.get("init_sparsity") not in (0, target):
            said.append(
                f"{pattern} is a sparsity of {target:g}, whatever final_sparsity says; SparseML refused any other but 0"
            )
        return [(target, params)]
    return [(_sparsity(m, "final_sparsity", final), params)]


def _sparsity(m: Modifier, what: str, value: Any) -> float:
    try:
        return check_sparsity(value, what)
    except BadInput as e:
        raise BadInput(f"{m}: {e}") from None


def _schedule(m: Modifier, target: float, epochs: int, said: list[str]) -> dict[str, Any]:
    if m.newer and (m.get("start", "start_epoch") is None or m.get("end", "end_epoch") is None):
        raise _NotCarried("without start and end, SparseML never begins to prune")
    begin, end = m.number("start_epoch", "start"), m.number("end_epoch", "end")
    initial = 0.0 if (raw := m.get("init_sparsity")) == "__FROM_PARAM__" else _sparsity(m, "init_sparsity", raw)
    if raw == "__FROM_PARAM__":
        said.append(
            "init_sparsity __FROM_PARAM__ became 0: zeros that are there stay and count, whatever the schedule asks"
        )
    if initial > target:
        raise _NotCarried(f"init_sparsity {initial:g} is above final_sparsity {target:g}: it lets weights grow back")
    if end < 0:
        if initial < target or not epochs:
            raise _NotCarried(f"with end_epoch {end:g} SparseML stays at init_sparsity {initial:g} for ever")
        end = float(epochs)
        said.append(f"end_epoch {m.number('end_epoch', 'end'):g}, which never comes, became the end of training")
    kind, power = _curve(m, said)
    if begin < 0:
        done = -begin / (end - begin)
        said.append(f"SparseML counts from start_epoch {begin:g} and is at {_at(done, initial, target, power):.4g} when training "
                    "begins; here the schedule begins at epoch 0")  # fmt: skip
        begin = 0.0
    if end <= begin:
        raise _NotCarried(f"it ends at epoch {end:g}, not after its start at {begin:g}, where SparseML divides by zero")
    every = -1.0 if m.get("update_frequency", "update") is None and m.newer else m.number("update_frequency", "update")
    _say_last(begin, end, every, epochs, lambda done: _at(done, initial, target, power), m.newer, said)
    if every <= 0:
        every = float(f"{(end - begin) / 100:.4g}")
        said.append(f"no update_frequency means every batch; here every {every:g} epochs, a hundred times in all")
    schedule = {"kind": kind, "begin": begin, "end": end, "every": every, "initial": initial}
    return {**schedule, **({"power": power} if kind == "polynomial" else {}), "unit": "epochs"}


def _at(done: float, initial: float, target: float, power: float) -> float:
    return float(target + (initial - target) * (1 - done) ** power)


def _say_last(
    begin: float, end: float, every: float, epochs: int, at: Callable[[float], float], newer: bool, said: list[str]
) -> None:
    """Where SparseML stopped short of the target; secateur's schedules end at it."""
    if newer:
        said.append("SparseML made new masks before every batch, the last one batch before end; here they are made as often as "
                    "every says, and at end")  # fmt: skip
        said.append("SparseML pruned all weights equal to its threshold; secateur's counts are exact")
    elif end >= epochs and every > 0:
        steps = max(0, math.ceil((end - begin) / every - 1e-9) - 1)
        last = begin + steps * every
        reached, target = at((last - begin) / (end - begin)), at(1.0)
        if target - reached > 1e-4:
            said.append(f"pruning ends with training, and SparseML's last update before that, at epoch {last:g}, left a "
                        f"sparsity of {reached:.4f}; secateur prunes to {target:g} after the last step, with no training "
                        "after it")  # fmt: skip


def _curve(m: Modifier, said: list[str]) -> tuple[str, float]:
    """The kind of schedule and its power in ``1 - (1 - p) ** power``."""
    name = m.get("inter_func", "update_scheduler") or "cubic"
    args = m.get("scheduler_args")
    power = (args.get("exponent", 2) if isinstance(args, dict) else 2) if isinstance(name, str) else None
    if name == "polynomial_decay" and isinstance(power, int) and power % 2 and 0 < power < 100:
        return {1: _CURVES["linear"], 3: _CURVES["cubic"]}.get(power, ("polynomial", float(power)))
    if name == "polynomial" and power == 1:
        return _CURVES["linear"]
    if isinstance(name, str) and name in _CURVES:
        return _CURVES[name]
    given = "" if args is None else f" with {short(args)}"
    said.append(f"the curve {short(name)}{given} has no counterpart; the schedule is cubic")
    return _CURVES["cubic"]


def _pattern(m: Modifier, said: list[str]) -> str:
    mask = m.get("mask_type", "mask_structure") or (
        "filter" if m.kind == "StructuredPruningModifier" else "unstructured"
    )
    if isinstance(mask, list):
        return _block(mask, said)
    if mask in ("block", "block4"):
        said.append("blocks of 1x4 need a multiple of 4 inputs; where SparseML padded, secateur leaves the tensor dense with a "
                    "warning, or refuses one named in full")  # fmt: skip
        return "1x4"
    if mask == "tensorrt":
        return "2:4"
    if mask in ("filter", "channel"):
        if (mask == "filter") == m.newer:  # the newer form has the two words the other way round
            return "channel:in"
        said.append("an output channel takes its bias along")
        return "channel"
    if isinstance(mask, str):
        if (nm := re.fullmatch(r"(\d{1,4}):(\d{1,4})", mask)) and 0 < int(nm[1]) < int(nm[2]):
            return f"{int(nm[1])}:{int(nm[2])}"
        if block := re.fullmatch(r"block_(\d{1,4}),(\d{1,4})", mask):
            return f"{int(block[1])}x{int(block[2])}"
        if mask in ("unstructured", "0:0"):
            return "unstructured"
    hint = " (in YAML an N:M without quotes is a number)" if isinstance(mask, int) else ""
    raise _NotCarried(f"there is no pattern for mask_type {short(mask)}{hint}")


def _block(shape: Sequence[Any], said: list[str]) -> str:
    if len(shape) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in shape):
        raise _NotCarried(
            f"there is no pattern for blocks of {short(shape)}; secateur takes two ints >= 1, (outputs, inputs)"
        )
    a, b = shape
    if a > 1 and b > 1:
        said.append(f"SparseML's blocks [{a}, {b}] are runs of {a * b} inputs in memory, not rectangles; the pattern here is "
                    f"{a}x{b} outputs by inputs, and 1x{a * b} is what SparseML pruned")  # fmt: skip
    return f"{a}x{b}"


def _include(params: Any, said: list[str]) -> tuple[str, ...] | None:
    """Names, ``re:`` expressions and tokens as globs; what cannot be one stays as it is, which secateur refuses to run."""
    listed = [params] if isinstance(params, str) else params
    if not isinstance(listed, list) or not listed or not all(isinstance(p, str) for p in listed):
        raise BadInput(f"params is a name or a list of names, with re: before an expression; got {short(params)}.")
    if "__ALL__" in listed:
        said.append(
            "__ALL__ means biases and norms too; secateur prunes the weights it takes by default, others only by name"
        )
        return None
    if "__ALL_PRUNABLE__" in listed or set(listed) <= {"Linear", "Conv1d", "Conv2d", "Conv3d"}:
        said.append(f"{short(params)} became secateur's own choice: all weights of linear and convolutional layers, and those of "
                    "attention and recurrent ones, but not a language model's head; secateur inspect shows it")  # fmt: skip
        return None
    globs: list[str] = []
    for p in listed:
        found = globs_of(p[3:]) if p.startswith("re:") else None
        if not p.startswith("re:"):
            globs.append(p)
        elif found is None:
            globs.append(p)
            said.append(
                f"{short(p)} says what no glob can: it stands in include as it is and matches nothing, so fill in globs"
            )
        else:
            globs += found.globs
            if found.wider:
                said.append(f"{short(p)} became {', '.join(found.globs)}, which may match more")
    return tuple(dict.fromkeys(globs))
