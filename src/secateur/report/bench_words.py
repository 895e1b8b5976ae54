"""What a `secateur.runtime.bench.Bench` says in sentences: where packing is faster, where it is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .words import counted, share

if TYPE_CHECKING:
    from secateur.runtime.bench import Bench, Total
    from secateur.runtime.bench_model import Whole

FASTER, SLOWER = 1.05, 0.97
OURS, INT8 = "packed", "int8"
ARITHMETIC = 4.0
"""Dense takes this many times as long as for one row: then it is arithmetic that takes the time, and not reading."""


def sentences(b: Bench) -> Iterator[str]:
    """One for each number of rows, then what stays dense, and what else would be faster."""
    for t in b.totals:
        yield _at_rows(b, t)
    if b.whole is not None:
        yield _end_to_end(b.whole)
    for why, n in b.dense.items():
        yield f"{counted(n, 'layer')} of {len(b.layers)} {'stays' if n == 1 else 'stay'} dense: {why}."
    yield from _others(b)


def _end_to_end(w: Whole) -> str:
    ratio = w.ratios[w.faster]
    word = "as fast as" if ratio.median >= FASTER else "as fast as (it is no faster here)"
    return (
        f"End to end the packed model is {ratio} times {word} the dense {w.faster} one, the faster of the two; "
        f"{share(w.outside[w.faster], 0)} of that one's time is spent outside its linear layers, which packing does not change."
    )


def _at_rows(b: Bench, t: Total) -> str:
    ratio, rows = t.ratios[t.faster], counted(t.rows, "row")
    if all(layer.layout is None for layer in b.layers):
        own = b.layers[0].dtype
        better = t.faster != own and ratio.median < SLOWER
        other = f"; dense {t.faster} would be {1 / ratio.median:.2f} times as fast" if better else ""
        return f"At {rows} nothing changes here: every layer stays dense {own}{other}."
    times = f"{ratio} times as fast as torch's dense {t.faster}, the faster of its two"
    if ratio.median >= FASTER:
        return f"At {rows} the linear layers are {times}."
    word = "slower" if ratio.median < SLOWER else "no faster"
    return f"At {rows} this will be {word} here: {times}{_why(b, t)}."


def _why(b: Bench, t: Total) -> str:
    own = {layer.dtype for layer in b.layers}
    if t.faster not in own and t.ratios[min(own)].median >= FASTER:
        return (
            f", because {t.faster} has the faster instructions: dense {min(own)}, which it is stored in, takes "
            f"{t.ratios[min(own)].median:.2f} times as long; cast it to {t.faster} before it is packed"
        )
    one = next((x for x in b.totals if x.rows == 1), None)
    if one and t.rows > 1 and t.seconds[t.faster] > ARITHMETIC * one.seconds[t.faster]:
        longer = t.seconds[t.faster] / one.seconds[t.faster]
        return (
            f", because time goes into arithmetic, and not into reading weights: dense takes {longer:.0f} times as long as "
            "for 1 row"
        )
    if share_dense := sum(layer.dense_bytes for layer in b.layers if layer.layout is None) / b.dense_bytes:
        return f"; layers with {share(share_dense, 0)} of the weights' bytes stay dense"
    return ""


def _others(b: Bench) -> Iterator[str]:
    won = [t for t in b.totals if INT8 in t.ratios and t.ratios[INT8].median < SLOWER]
    if won:
        at = ", ".join(f"{1 / t.ratios[INT8].median:.2f} times as fast at {counted(t.rows, 'row')}" for t in won)
        yield f"torch's dynamic int8, another precision, is faster than this: {at}."
