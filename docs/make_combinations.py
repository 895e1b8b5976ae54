"""Writes ``docs/combinations.md`` from the code that refuses: ``python docs/make_combinations.py``.

Nothing on the page is typed by hand but headings and the sentences between the tables. A guard test compares the page with
what this script makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import secateur
from secateur.core.combine import Choice, why_refused
from secateur.core.criteria import Criterion
from secateur.core.heads import Head
from secateur.core.patterns import NM, Block, Channel, Pattern, Row, Unstructured
from secateur.core.spelling import ALLOCATIONS, Allocation
from secateur.core.types import Attention, Spec
from secateur.stores import attention, checks, roles

PAGE = Path(__file__).with_name("combinations.md")
YES = "✓"

PATTERNS: tuple[Pattern, ...] = (
    Unstructured(), Row(), NM(2, 4), Block((4, 4)), Channel("out"), Channel("in"), Head(4),
)  # fmt: skip


def any_function(weight: Tensor) -> Tensor:
    """A user's criterion."""
    return weight


def any_counts(rows: object, sparsity: float) -> dict[str, int]:
    """A user's allocation."""
    return {}


ALLOCATED: dict[str, Allocation] = {a: a for a in ALLOCATIONS} | {"mapping": {"*": 0.5}, "function": any_counts}
CRITERIA: dict[str, Criterion] = {
    "magnitude": secateur.magnitude, "random": secateur.random(0), "function": any_function,
}  # fmt: skip
SHAPES = {
    "linear": (64, 32), "linear_transposed": (32, 64), "bilinear": (64, 32, 32), "conv": (64, 32, 3, 3),
    "conv_transpose": (32, 64, 3, 3), "recurrent": (256, 64), "attention": (192, 64), "experts": (8, 64, 32),
    "experts_transposed": (8, 32, 64), "head": (1000, 64), "router": (8, 64), "embedding": (1000, 64),
    "position": (64, 64), "norm": (64,), "bias": (64,), "unknown": (64,),
}  # fmt: skip
DTYPES: tuple[torch.dtype, ...] = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.int8, torch.int32,
    torch.uint8, torch.bool,
)  # fmt: skip


class Notes:
    """Reasons, each listed once, and the mark that stands for it in a table."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def mark(self, reason: str | None) -> str:
        """``✓``, or the number of the reason."""
        if reason is None:
            return YES
        if reason not in self.found:
            self.found.append(reason)
        return f"({self.found.index(reason) + 1})"

    def lines(self) -> Iterator[str]:
        """The list of reasons."""
        for i, reason in enumerate(self.found, 1):
            yield f"{i}. {reason}."


def table(corner: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> Iterator[str]:
    """A table in Markdown."""
    columns = list(columns)
    yield f"| {' | '.join([corner, *columns])} |"
    yield f"|{'---|' * (len(columns) + 1)}"
    for name, cells in rows:
        yield f"| {' | '.join([name, *cells])} |"


def grid(
    corner: str, rows: Iterable[str], columns: Iterable[str], reason: Callable[[str, str], str | None]
) -> Iterator[str]:
    """A table of what is refused, and the reasons below it."""
    columns, notes = list(columns), Notes()
    yield from table(corner, columns, ((r, [notes.mark(reason(r, c)) for c in columns]) for r in rows))
    if notes.found:
        yield ""
        yield from notes.lines()


PATTERN_OF = {f"`{p}`": p for p in PATTERNS}
BY_ROLE = [p for p in PATTERN_OF if not isinstance(PATTERN_OF[p], Head)]
ALLOCATION_OF = {f"`{n}`" if n in ALLOCATIONS else n: a for n, a in ALLOCATED.items()}
CRITERION_OF = {f"`{n}`" if n != "function" else "any function": c for n, c in CRITERIA.items()}


def patterns_and_allocations() -> Iterator[str]:
    """By magnitude."""
    yield from grid(
        "pattern", PATTERN_OF, ALLOCATION_OF,
        lambda p, a: why_refused(Choice(PATTERN_OF[p], ALLOCATION_OF[a], secateur.magnitude, sparsity=None)),
    )  # fmt: skip


def other_criteria() -> Iterator[str]:
    """Where another criterion than magnitude changes the answer."""
    yield from grid(
        "criterion", CRITERION_OF, ALLOCATION_OF,
        lambda c, a: why_refused(Choice(Unstructured(), ALLOCATION_OF[a], CRITERION_OF[c], sparsity=0.5)),
    )  # fmt: skip
    same = all(
        bool(why_refused(Choice(p, a, c))) == bool(why_refused(Choice(p, a, secateur.magnitude)))
        for p, a, c in product(PATTERNS, ALLOCATED.values(), CRITERIA.values())
        if a != "lamp"
    )
    assert same, "a criterion is refused with another pattern too: the page must show it"


def amounts() -> Iterator[str]:
    """How much: a sparsity, a threshold, or nothing."""

    def reason(p: str, how: str) -> str | None:
        pattern = PATTERN_OF[p]
        own = 1 - pattern.keep / pattern.of if isinstance(pattern, NM) else 0.5
        asked = {
            "`sparsity`": (own, None), "another `sparsity`": (0.9, None), "`threshold`": (None, 0.1), "both": (own, 0.1),
        }[how]  # fmt: skip
        return why_refused(Choice(pattern, "global", secateur.magnitude, "error", *asked))

    yield from grid("pattern", PATTERN_OF, ("`sparsity`", "another `sparsity`", "`threshold`", "both"), reason)


def thresholds() -> Iterator[str]:
    """What goes with a threshold."""
    choices = {
        "allocation `uniform`": Choice(Unstructured(), "uniform", secateur.magnitude, threshold=0.1),
        "criterion `random`": Choice(Unstructured(), "global", secateur.random(0), threshold=0.1),
        "`max_sparsity`, `min_keep`": Choice(Unstructured(), "global", secateur.magnitude, threshold=0.1, caps=True),
        "`nonfinite`": Choice(Unstructured(), "global", secateur.magnitude, "keep", threshold=0.1),
    }
    yield from grid("together with", choices, ("`threshold`",), lambda what, _: why_refused(choices[what]))


def caps() -> Iterator[str]:
    """``max_sparsity`` and ``min_keep``."""
    yield from grid(
        "pattern", PATTERN_OF, ALLOCATION_OF,
        lambda p, a: why_refused(Choice(PATTERN_OF[p], "global" if isinstance(PATTERN_OF[p], NM) else ALLOCATION_OF[a],
                                        secateur.magnitude, caps=True))
        or why_refused(Choice(PATTERN_OF[p], ALLOCATION_OF[a], secateur.magnitude)),
    )  # fmt: skip


def values_that_are_not_finite() -> Iterator[str]:
    """``nonfinite``."""

    def reason(row: str, mode: str) -> str | None:
        pattern, allocation, criterion = rows[row]
        return why_refused(Choice(pattern, allocation, criterion, mode.strip('`"')))

    rows: dict[str, tuple[Pattern, Allocation, Criterion]] = {
        **{f"{p}, magnitude": (PATTERN_OF[p], "global", secateur.magnitude) for p in PATTERN_OF},
        **{f"{p}, another criterion": (PATTERN_OF[p], "global", any_function) for p in PATTERN_OF},
        "`lamp`": (Unstructured(), "lamp", secateur.magnitude),
    }
    yield from grid("", rows, ('`"error"`', '`"keep"`', '`"prune"`'), reason)


def tensors() -> Iterator[str]:
    """Which tensor can carry which pattern."""

    def reason(role: str, pattern: str) -> str | None:
        fit = roles.as_role(role, SHAPES[role])
        spec = Spec("w", SHAPES[role], torch.float32, fit.role, fit.out_dim, fit.in_dim, fit.batch_dims, fit.groups)
        return PATTERN_OF[pattern].why_not(spec)

    shown = [r for r in roles.ROLES if r in SHAPES]
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for role in shown:
        reasons = [reason(role, p) for p in BY_ROLE]
        alike.setdefault(tuple(r and r.replace(f" {role} ", " … ") for r in reasons), []).append(role)
    rows = {}
    for texts, names in alike.items():
        own = [t and t.replace("…", names[0]) for t in texts] if len(names) == 1 else texts
        rows[", ".join(f"`{n}`" for n in names)] = dict(zip(BY_ROLE, own, strict=True))
    yield from grid("role", rows, BY_ROLE, lambda names, p: rows[names][p])
    yield ""
    yield "Skipped unless asked for by full name:"
    yield ""
    yield from (f"- `{role}`: {why}" for role, why in roles.SKIPPED.items() if role in shown)
    yield ""
    odd = Spec("w", (6, 10), torch.float32, "linear", 0, 1)
    grouped = Spec("w", (8, 2, 3, 3), torch.float32, "conv", 0, 1, groups=4)
    yield "And by shape:"
    yield ""
    for spec, what in ((odd, "a weight of shape (6, 10)"), (grouped, "a convolution with groups=4")):
        for p in map(PATTERN_OF.get, BY_ROLE):
            if p is not None and (why := p.why_not(spec)):
                yield f"- `{p}` on {what}: {why}."


def heads() -> Iterator[str]:
    """By which names layers of attention are found, and what their shapes must be."""

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"`{n}`" for n in names)

    def place(queries: int, keys: int, values: int, outputs: int) -> Spec:
        whole = Attention("attn", ("q", "k", "v", "o"), 0, (queries,), queries, keys, values, outputs)
        return Spec("q", (queries, 64), torch.float32, "linear", 0, 1, attention=whole)

    packed = {"q": "queries", "k": "keys", "v": "values", "kv": "keys, values", "qkv": "queries, keys, values"}
    packed["heads"] = "queries, keys, values of each head together"
    found = []
    for held, outs in attention.LAYERS:
        beside = [f"`{o.removeprefix('^')}`" + (" beside that module" if o.startswith("^") else "") for o in outs]
        apart = len(set(held.values())) == 3
        found.append(
            (
                listed(held),
                ["; ".join([] if apart else [packed[h] for h in held.values()]) or "apart", ", ".join(beside)],
            )
        )
    yield from table("projections in one module", ["which hold", "output projection"], found)
    yield ""
    yield "By shape, of a layer called `attn`:"
    yield ""
    for sizes in ((66, 66, 66, 66), (64, 24, 24, 64), (64, 32, 64, 64)):
        why = Head(4).why_not(place(*sizes))
        yield f"- `head:4` where queries, keys, values and output have {', '.join(map(str, sizes))} features: {why}."


def dtypes() -> Iterator[str]:
    """Which dtypes can be pruned."""
    notes = Notes()
    cells = []
    for dtype in DTYPES:
        t = torch.empty(2, 2, dtype=dtype, device="meta")
        why = checks.of_dtype(checks.Entry(Spec("w", (2, 2), dtype, "linear"), t))
        cells.append((f"`{str(dtype).removeprefix('torch.')}`", [notes.mark(why)]))
    assert {d for d in DTYPES if d in checks.SUPPORTED} == set(checks.SUPPORTED)
    yield from table("dtype", ["pruned"], cells)
    yield ""
    yield from notes.lines()


def stores() -> Iterator[str]:
    """What depends on where the tensors live, asked live."""
    state = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}
    tries: list[tuple[str, Callable[[], object]]] = [
        ("a path without `out=`", lambda: secateur.prune("model.safetensors", 0.5)),
        ("a dict with `out=`", lambda: secateur.prune(state, 0.5, out="pruned.safetensors")),
        ("`uniform_plus` on a plain dict or a file", lambda: secateur.plan(state, 0.5, allocation="uniform_plus")),
    ]
    for what, call in tries:
        try:
            call()
        except secateur.SecateurError as e:
            yield f"- {what}: {e}"


HEAD = """# What goes together

A pattern, an allocation, a criterion, an amount and what to do with NaN are chosen apart from each other. Nearly all of them
go together. What has no meaning is refused before anything is read, with the reason that stands here.

This page is made by `python docs/make_combinations.py` from the code that refuses, and a test compares the two. ✓ means
defined: the contract tests run every such combination and compare the mask with a full sort; patterns, allocations and
criteria in every dtype.
"""

SECTIONS: tuple[tuple[str, str, Callable[[], Iterator[str]]], ...] = (
    ("Pattern and allocation", "With a sparsity (left out for N:M), by magnitude.", patterns_and_allocations),
    ("Other criteria", "On single weights. With another pattern nothing more is refused.", other_criteria),
    ("How much", "With the default allocation, by magnitude.", amounts),
    ("A threshold", "`threshold=t` prunes every weight with `|w| < t`.", thresholds),
    ("Caps and floors", "`max_sparsity` or `min_keep`, by magnitude.", caps),
    ("NaN and infinities", "What `nonfinite=` may be.", values_that_are_not_finite),
    (
        "Tensors and patterns",
        "By role. A tensor chosen by default that cannot carry the pattern is skipped with one warning; one named in full "
        "is refused.",
        tensors,
    ),
    (
        "Heads",
        "`head:N` goes by names. The whole layer is chosen, or none of it; everything outside of attention stays.",
        heads,
    ),
    ("Dtypes", "", dtypes),
    ("Stores", "", stores),
)


def page() -> str:
    """The whole page."""
    out = [HEAD]
    for title, text, body in SECTIONS:
        out += [f"## {title}", ""] + ([text, ""] if text else []) + [*body(), ""]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
