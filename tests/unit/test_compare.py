"""Comparisons: verdicts by hand, each rule kept and broken, and what cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import BadInput
from secateur.evaluate.compare import Comparison, compare, front
from secateur.report.run_facts import Cell, Cost

ASKED = (0.5, 0.8, 0.9, 0.95, 0.98)
DENSE = (90.0, 91.0, 92.0, 93.0, 94.0)
SPENT = (0.0, 0.1, -0.1, 0.2, -0.2)  # what seeds add to a method's loss of accuracy, mean 0


def begins(seed: int, **more: str) -> dict[str, str]:
    return {"batch": f"order {seed}", **more}


def dense(seed: int, value: float) -> Cell:
    facts = begins(seed, init=f"init {seed}", dense=f"dense {seed}")
    return Cell(seed, "dense", 0.0, 0.0, {"accuracy": value}, 5, {}, 1000, 1000, 4000, 4000, facts, "", True, "r")


def pruned(seed: int, method: str, asked: float, value: float, control: str = "") -> Cell:
    left = round(1000 * (1 - asked))
    small = control == "small dense"
    facts = begins(seed) if small else begins(seed, dense=f"dense {seed}")
    return Cell(
        seed, method, asked, 0.0 if small else asked, {"accuracy": value}, 8, {}, left if small else 1000, left, 4000, 4 * left,
        facts, control, True, "r",
    )  # fmt: skip


def cells(
    losses: dict[str, Sequence[float]] | None = None, asked: Sequence[float] = ASKED, seeds: int = 5
) -> list[Cell]:
    """Dense, magnitude, which loses what it is pruned by, and others, which lose what ``losses`` say more, seed by seed."""
    found = [dense(s, DENSE[s]) for s in range(seeds)]
    for method, more in {
        "magnitude": [0.0] * 5,
        **(losses or {"new": [-1.0 + e for e in SPENT]}),
        "random": [9.0] * 5,
    }.items():
        for a in asked:
            control = "random" if method == "random" else ""
            found += [pruned(s, method, a, DENSE[s] - 10 * a + SPENT[s] - more[s], control) for s in range(seeds)]
    for a in asked:
        found += [pruned(s, "small", a, DENSE[s] - 10 * a - 3.0, "small dense") for s in range(seeds)]
    return found


def words(c: Comparison, method: str = "new") -> set[str]:
    return {v.word for v in c.verdicts if v.method == method}


def test_a_verdict_by_hand() -> None:
    c = compare(cells(), percent=["accuracy"])
    assert c.baseline == "magnitude" and c.metric.name == "accuracy" and c.asked == ASKED
    verdict = next(v for v in c.verdicts if v.method == "new" and v.asked == 0.9)
    # 1 - SPENT each: mean 1, deviation sqrt(0.1 / 4); t(0.975, 4) = 2.77645.
    assert verdict.word == "better" and verdict.difference is not None
    assert verdict.difference.mean == pytest.approx(1.0)
    assert verdict.difference.half == pytest.approx(2.77645 * math.sqrt(0.1 / 4 / 5), rel=1e-4)
    point = next(p for p in c.points if p.method == "new" and p.asked == 0.9)
    assert (point.compression, point.speedup) == (pytest.approx(10.0), pytest.approx(10.0)) and point.seeds == (
        0,
        1,
        2,
        3,
        4,
    )
    assert point.minus_dense is not None and point.minus_dense.mean == pytest.approx(-8.0)


@pytest.mark.parametrize(
    ("more", "less", "word"),
    [
        ([-1.0 + e for e in SPENT], False, "better"),
        ([-1.0 + e for e in SPENT], True, "worse"),
        ([1.0 + e for e in SPENT], False, "worse"),
        ([1.0 + e for e in SPENT], True, "better"),
        ([-0.1 + e for e in SPENT], False, "no difference shown"),
        ([0.0] * 5, False, "no difference shown"),
    ],
)
def test_the_words(more: list[float], less: bool, word: str) -> None:
    assert words(compare(cells({"new": more}), lower_is_better=["accuracy"] if less else [])) == {word}


def test_differences_are_taken_seed_by_seed() -> None:
    # The seeds differ by points, the methods by 0.3 in every one of them.
    c = compare(cells({"new": [-0.3, -0.29, -0.31, -0.3, -0.3]}))
    assert words(c) == {"better"}
    lacks = [x for x in cells({"new": [-0.3] * 5}) if (x.seed, x.method) != (4, "magnitude")]
    c = compare(lacks)
    assert words(c) == {"no verdict"} and all(v.difference is not None and v.difference.n == 4 for v in c.verdicts)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_below_five_seeds_there_is_no_verdict_but_numbers(seeds: int) -> None:
    c = compare(cells(seeds=seeds), percent=["accuracy"])
    assert words(c) == {"no verdict"} and c.tested == 0
    assert "No verdict" in str(c) and f"from {seeds} seed" in str(c)
    assert next(r for r in c.rules if r.name == "seeds").kept == (seeds >= 3)


def test_holm_counts_every_comparison() -> None:
    one = cells({"new": [-0.15, -0.35, -0.02, -0.4, -0.2]}, asked=(0.9,))  # p between 0.05 / 3 and 0.05
    c = compare(one)
    verdict = c.verdicts[0]
    assert c.tested == 3 and verdict.word == "better" and verdict.p is not None and 0.05 / 3 < verdict.p < 0.05
    assert verdict.holm, "the two others are clearer, and leave it a bar of 0.05"
    many = cells({f"new {i}": [-0.15, -0.35, -0.02, -0.4, -0.2] for i in range(9)}, asked=(0.9,))
    c = compare(many)
    assert c.tested == 11 and not any(v.holm for v in c.verdicts if v.method.startswith("new"))
    assert "Holm's correction for 11 comparisons keeps none of these 9." in str(c)


def test_the_front() -> None:
    assert front([(1.0, 90.0), (0.5, 90.0), (0.5, 91.0), (0.1, 80.0), (0.2, 70.0)]) == [False, False, True, True, False]
    assert front([(0.5, 1.0), (0.5, 1.0)]) == [True, True], "equals do not beat each other"
    c = compare(cells(), percent=["accuracy"])
    ahead = {(p.method, p.asked) for p in c.points if p.by_density}
    assert ahead == {("dense", 0.0), *(("new", a) for a in ASKED)}


def changed(which: Callable[[Cell], bool], **facts: Any) -> Callable[[list[Cell]], list[Cell]]:
    return lambda found: [replace(c, **facts) if which(c) else c for c in found]


def without(which: Callable[[Cell], bool]) -> Callable[[list[Cell]], list[Cell]]:
    return lambda found: [c for c in found if not which(c)]


def new(c: Cell) -> bool:
    return c.method == "new"


BROKEN: list[tuple[str, Callable[[list[Cell]], list[Cell]], str]] = [
    ("operating points", without(lambda c: c.asked == 0.5), "magnitude has 4, new has 4, random has 4 and small has 4"),
    ("parameters and FLOPs", changed(new, effective_flops=None), "unknown are FLOPs of 25 of 105 cells"),
    ("seeds", without(lambda c: c.seed > 1), "2 seeds everywhere: a spread needs 3, a verdict 5"),
    ("nothing missing", without(lambda c: new(c) and c.seed == 3 and c.asked == 0.9), "new at 0.9 lacks seed 3"),
    ("nothing missing", without(lambda c: new(c) and c.asked == 0.9), "new at 0.9 lacks seeds 0, 1, 2, 3 and 4"),
    ("nothing missing", changed(lambda c: new(c) and c.seed == 3, metrics={"accuracy": math.nan}), "new at 0.5 lacks seed 3"),
    ("random control", changed(lambda c: c.method == "random", control=""), "there are no weights pruned at random"),
    ("random control", without(lambda c: c.method == "random" and c.asked == 0.8), "pruned at random at 0.8"),
    ("small dense control", without(lambda c: c.method == "small"), "there are no dense networks of as many parameters"),
    ("small dense control", changed(lambda c: (c.method, c.asked) == ("small", 0.9), nonzero=180), "180 parameters at 0.9, "),
    ("same start and data order", changed(lambda c: new(c) and c.seed == 2, begins={"dense": "another"}),
     "seed 2 has one trained dense network for dense, magnitude and random and another for new"),
    ("same start and data order", changed(new, begins={"batch": "another"}), "seed 0 has one first batch for"),
    ("same start and data order", changed(lambda c: new(c) and c.seed == 1, begins={"init": "another"}), "seed 1 has one set of"),
    ("same start and data order", changed(new, begins={}), "not known of 25 of 105 cells"),
    ("same training budget", changed(new, epochs=20), "new was trained for 20 epochs, magnitude for 8"),
    ("last step, not the best", changed(new, whole=False), "new ended before the last update"),
    ("last step, not the best", changed(new, whole=None), "not known of 25 of 105 cells"),
    ("absolute and relative values", without(lambda c: c.method == "dense" and c.seed == 4), "the dense network lacks seed 4"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "text"), BROKEN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BROKEN)])
def test_a_broken_rule_is_told(rule: str, change: Callable[[list[Cell]], list[Cell]], text: str) -> None:
    sound = compare(cells(), seeds=range(5))
    assert all(r.kept for r in sound.rules) and len({r.name for r in sound.rules}) == len(sound.rules)
    c = compare(change(cells()), seeds=range(5))
    found = next(r for r in c.rules if r.name == rule)
    assert not found.kept and text in found.said
    assert f"BROKEN {rule}: " in str(c) and f"BROKEN {rule}: " not in str(sound)


def test_fewer_seeds_than_were_asked_for_are_told() -> None:
    c = compare(cells(seeds=4), seeds=[0, 1, 2, 3, 4])
    assert words(c) == {"no verdict"} and c.seeds == (0, 1, 2, 3, 4)
    assert any(not r.kept and "lacks seed 4" in r.said for r in c.rules)
    some = compare(cells(), seeds=[0, 1, 2])
    assert all(v.difference is not None and v.difference.n == 3 for v in some.verdicts)


def test_what_is_not_finite_is_left_out_and_told() -> None:
    bad = changed(lambda c: new(c) and c.asked == 0.9 and c.seed < 2, metrics={"accuracy": math.nan})(cells())
    c = compare(bad)
    assert {v.asked: v.word for v in c.verdicts if v.method == "new"} == {
        0.5: "better", 0.8: "better", 0.9: "no verdict", 0.95: "better", 0.98: "better"
    }  # fmt: skip
    assert "2 of 105 cells have no finite accuracy; they are left out." in c.warnings


def test_a_metric_that_does_not_move_is_warned_of() -> None:
    both = [replace(c, metrics={"accuracy": c.metrics["accuracy"], "steady": 1.0 + SPENT[c.seed]}) for c in cells()]
    c = compare(both)
    (warning,) = c.warnings
    assert warning.startswith(
        "steady does not move: at the highest sparsity, 0.98, it tells no method apart from dense."
    )
    noisy = [replace(c, metrics={"steady": 1.0 + 0.1 * (-1) ** (c.seed + len(c.method))}) for c in cells()]
    assert any("may hide damage" in w for w in compare(noisy).warnings)
    assert not compare(cells()).warnings


def test_one_operating_point_is_compared_and_told() -> None:
    c = compare(cells(asked=(0.9,)))
    assert words(c) == {"better"} and not c.rules[0].kept


@pytest.mark.parametrize(
    ("change", "more", "text"),
    [
        (lambda f: [], {}, "no cells to compare"),
        (
            lambda f: f,
            {"baseline": "LAMP"},
            "'LAMP' is none of the methods: name the baseline, one of 'magnitude', 'new'",
        ),
        (without(lambda c: c.method == "magnitude"), {}, "no method's name begins with 'magnitude'"),
        (without(lambda c: c.method not in ("magnitude", "dense")), {}, "no method but 'magnitude'"),
        (without(lambda c: c.method != "dense"), {}, "none, since none prunes"),
        (lambda f: f, {"metric": "loss"}, "'loss' is no metric of these cells: there are accuracy"),
        (lambda f: [*f, f[-1]], {}, "'small' at 0.98 with seed 4 is there twice"),
        (changed(new, recipe="s"), {}, "these cells are of 2 recipes"),
        (changed(lambda c: True, metrics={"accuracy": math.nan}), {}, "no cell has a finite accuracy"),
        (changed(lambda c: True, metrics={}), {}, "these cells hold no metric"),
        (lambda f: f, {"seeds": [7]}, "none of the seeds that were asked for"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        compare(change(cells()), **more)


def test_the_first_method_called_magnitude_is_the_baseline_unless_one_is_named() -> None:
    renamed = [
        replace(c, method={"magnitude": "magnitude, global", "new": "magnitude, uniform"}.get(c.method, c.method))
        for c in cells()
    ]
    assert compare(renamed).baseline == "magnitude, global"
    assert compare(renamed, "magnitude, uniform").baseline == "magnitude, uniform"
    assert words(compare(renamed, "magnitude, uniform"), "magnitude, global") == {"worse"}


def test_results_of_an_older_version_are_read(tmp_path: Path) -> None:
    old = [
        {"seed": c.seed, "method": c.method, "asked": c.asked, "sparsity": c.sparsity, "metrics": c.metrics, "epochs": c.epochs,
         "layers": {}}
        for c in cells()
    ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(old))
    for place in (tmp_path, tmp_path / "results.json"):
        c = compare(place)
        assert words(c) == {"better"} and c.points[0].density is None and c.points[0].compression is None
        assert {r.name for r in c.rules if not r.kept} == {
            "parameters and FLOPs", "random control", "small dense control", "same start and data order",
            "last step, not the best",
        }  # fmt: skip
    for wrong, text in (
        ("{}", "no list of cells"),
        ('[{"a": 1}]', "something else than cells"),
        ("[", "cannot be read"),
    ):
        (tmp_path / "results.json").write_text(wrong)
        with pytest.raises(BadInput, match=text):
            compare(tmp_path)
    with pytest.raises(BadInput, match="holds no finished cell"):
        compare(tmp_path / "nowhere")


def test_it_becomes_json_and_text() -> None:
    spent = [Cost(c.seed, c.method, c.asked, 10.0, 0.5, 20.0 + c.seed, 10**8 + c.seed, 2) for c in cells()]
    c = compare(cells(), costs=spent, percent=["accuracy"])
    facts = json.loads(c.to_json())
    assert (
        facts["baseline"] == "magnitude" and facts["tested"] == 15 and len(facts["points"]) == 21 and facts["jobs"] == 2
    )
    assert facts["verdicts"][0] == {
        "method": "new", "asked": 0.5, "word": "better", "difference": {**facts["verdicts"][0]["difference"], "n": 5},
        "p": facts["verdicts"][0]["p"], "holm": True,
    }  # fmt: skip
    assert facts["points"][3]["training"] == 22.0 and facts["points"][3]["peak"] == 10**8 + 4
    text = str(c)
    assert "magnitude is beaten by new at 50%, 80%, 90%, 95% and 98%." in text
    assert "new: beats magnitude at 50% by 1.00 ± 0.20 points, at 80% by" in text
    assert "random: loses to magnitude at 50% by 9.00 ± 0.00 points" in text
    assert "not beaten for fewer parameters: dense; new at 50%, 80%, 90%, 95% and 98%" in text
