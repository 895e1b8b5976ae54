"""Reports: what they hold, and how they show it in text, in a terminal, in a notebook and as JSON."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import secateur
from secateur.report.report import Report, ReportRow
from secateur.report.tables import MOST_ROWS, as_text, asked_line, plan_renderables, skipped_line, summary


def row(name: str, **more: Any) -> ReportRow:
    return ReportRow(**{"name": name, "shape": (2, 5), "dtype": "float32", "role": "linear", "numel": 10, **more})


def report() -> Report:
    """Two chosen tensors, one bias, one tensor without figures."""
    rows = (
        row("fc1.bias", shape=(2,), role="bias", numel=2, zeros=1, threshold=0.5, skip="a bias"),
        row("fc1.weight", zeros=4, threshold=0.25, asked=4, aliases=("tied.weight",)),
        row("fc2.weight", zeros=10, threshold=None, asked=9),
        row("ids", shape=(3,), dtype="int64", role="buffer", numel=3, skip="not a parameter"),
    )
    asked = {
        "sparsity": 0.65,
        "threshold": None,
        "criterion": "magnitude",
        "allocation": "erk",
        "pattern": "unstructured",
    }
    return Report(rows, asked, ("left with nothing: fc2.weight",))


def test_figures_by_hand() -> None:
    r = report()
    assert (r.zeros, r.total, r.sparsity) == (14, 20, 0.7)
    assert (r.model_zeros, r.model_total, r.model_sparsity) == (15, 22, 15 / 22)  # the bias counts, the integers do not
    assert r.compression_ratio == 22 / 7
    assert [x.sparsity for x in r] == [0.5, 0.4, 1.0, None]
    assert [x.name for x in r.chosen] == ["fc1.weight", "fc2.weight"]


def test_figures_where_there_is_nothing() -> None:
    empty = Report((), {})
    assert (empty.zeros, empty.total, empty.sparsity, empty.model_sparsity) == (0, 0, 0.0, 0.0)
    assert empty.compression_ratio == math.inf
    assert Report((row("w", zeros=10),), {}).compression_ratio == math.inf
    assert Report((row("w", zeros=0),), {}).compression_ratio == 1.0
    assert row("w", shape=(0, 5), numel=0, zeros=0).sparsity is None


def test_rows_are_found_by_any_of_their_names() -> None:
    r = report()
    assert r["fc1.weight"] is r["tied.weight"] is r.rows[1]
    assert [x.name for x in r] == ["fc1.bias", "fc1.weight", "fc2.weight", "ids"]
    with pytest.raises(KeyError, match=r"fc3.weight"):
        _ = r["fc3.weight"]


def test_a_report_is_a_value() -> None:
    r = report()
    assert copy.deepcopy(r) == r == pickle.loads(pickle.dumps(r)) == copy.copy(r)
    assert r != Report(r.rows, {}, ())
    with pytest.raises(AttributeError):
        r.out = "elsewhere"  # type: ignore[misc]


def test_a_repr_is_a_line() -> None:
    assert repr(report()) == (
        "Report(sparsity=0.7, zeros=14, total=20, 2 of 4 tensors, 1 warning; print(report) for the table)"
    )
    assert repr(Report((), {}, out="a.safetensors")) == (
        "Report(sparsity=0, zeros=0, total=0, 0 of 0 tensors, out='a.safetensors'; print(report) for the table)"
    )


def test_biases_that_went_with_their_channels_are_listed() -> None:
    r = secateur.prune(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 0.5, include="0", pattern="channel")
    bias = r["0.bias"]
    assert (bias.zeros, bias.goes_with, bias.skip) == (2, "0.weight", "goes with its layer's channels")
    assert (r.zeros, r.total) == (8, 16)  # the bias is no chosen weight
    lines = str(r).splitlines()
    assert [line.split()[:5] for line in lines[2:4]] == [
        ["0.bias", "4", "bias", "2", "4"], ["0.weight", "4x4", "linear", "8", "16"],
    ]  # fmt: skip
    assert "went with their layers' channels, beside the chosen weights: a bias (1); left alone: " in str(r)
    assert "a bias (1), not in the filter (1)" in str(r)
    assert "<code>0.bias</code>" in r._repr_html_()
    assert r["2.bias"].goes_with is None


def test_text() -> None:
    assert str(report()).splitlines() == [
        "sparsity 0.65, magnitude, erk, unstructured",
        "tensor      shape  role    zero  of  sparsity  smallest |w| left",
        "fc1.weight    2x5  linear     4  10    40.00%               0.25",
        "fc2.weight    2x5  linear    10  10   100.00%            nothing",
        "14 of 20 chosen weights are zero (70.0000%); 15 of all 22 parameters (68.1818%), 3.14x fewer non-zero parameters",
        "left alone: a bias (1), not a parameter (1)",
        "warning: left with nothing: fc2.weight",
    ]


def test_text_of_what_is_not_finite_and_of_where_it_went() -> None:
    r = Report((row("w", zeros=4, threshold=0.25, nonfinite=2),), {}, out="pruned.safetensors")
    assert "w (2 NaN or Inf)" in str(r)
    assert str(r).splitlines()[-1] == "written to pruned.safetensors"
    assert "scalar" in str(Report((row("s", shape=(), numel=1, zeros=0, threshold=1.0),), {}))


def test_long_reports_are_cut_and_say_so() -> None:
    r = Report(tuple(row(f"w{i}", zeros=1, threshold=0.5) for i in range(MOST_ROWS + 7)), {})
    text = str(r)
    assert f"w{MOST_ROWS - 1} " in text
    assert f"w{MOST_ROWS} " not in text
    assert "and 7 more (to_json() has all)" in text
    assert len(json.loads(r.to_json())["rows"]) == MOST_ROWS + 7


def test_long_names_are_folded_not_cut() -> None:
    name = "encoder." * 30 + "weight"
    text = as_text(Report((row(name, zeros=1, threshold=0.5),), {}), width=100)
    assert "".join(re.findall(r"^\S+", text, re.M)).replace("tensor", "", 1).startswith(name)


def test_json() -> None:
    facts = json.loads(report().to_json())
    assert (facts["zeros"], facts["total"], facts["sparsity"]) == (14, 20, 0.7)
    assert facts["rows"][1] == {
        "name": "fc1.weight", "shape": [2, 5], "dtype": "float32", "role": "linear", "numel": 10, "zeros": 4,
        "threshold": 0.25, "asked": 4, "nonfinite": 0, "aliases": ["tied.weight"], "skip": None, "goes_with": None,
        "units": None, "sparsity": 0.4,
    }  # fmt: skip
    assert facts["warnings"] == ["left with nothing: fc2.weight"]
    for odd in (
        Report((row("w", zeros=10),), {}),
        Report((), {}),
        secateur.inspect(torch.tensor([math.nan, math.inf])),
    ):
        json.loads(odd.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_a_terminal_and_a_notebook_show_the_same_figures() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(report())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    html = report()._repr_html_()
    for said in ("fc1.weight", "40.00%", "nothing", "left with nothing", "left alone: a bias (1)", "0.25"):
        assert said in re.sub(r"\x1b\[[0-9;]*m", "", shown), said
        assert said in html, said
    assert "14 of 20 chosen weights" in html


def test_html_escapes_names() -> None:
    r = Report((row("<script>x</script>.weight", zeros=1, threshold=0.5, role="<i>"),), {}, ("<b>bold</b>",))
    html = r._repr_html_()
    assert "<script>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;x&lt;/script&gt;.weight" in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_html_is_well_formed() -> None:
    from xml.etree import ElementTree

    for r in (report(), Report((), {}), secateur.prune(nn.Linear(4, 4), 0.5)):
        ElementTree.fromstring(r._repr_html_().replace("&nbsp;", " "))


@pytest.mark.parametrize(
    "name", ["\x1b[31mred", "bell\x07", "line\nbreak", "back\b\b\b", "\x9b31m", "\u202ereversed", "tab\t"]
)
def test_names_do_not_steer_the_terminal(name: str) -> None:
    r = Report((row(name, zeros=1, threshold=0.5, skip=None),), {}, (f"left with nothing: {name}",))
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(r)
    for text in (str(r), console.file.getvalue(), r._repr_html_()):  # type: ignore[attr-defined]
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text), repr(text)
    assert json.loads(r.to_json())["rows"][0]["name"] == name


def test_markup_in_names_is_text() -> None:
    text = str(Report((row("[red]w[/blue]", zeros=1, threshold=0.5),), {}))
    assert "[red]w[/blue]" in text


def test_lines_on_their_own() -> None:
    asked = report().asked
    assert asked_line({**asked, "sparsity": None, "threshold": 1e-3}) == "threshold 0.001, magnitude, erk, unstructured"
    assert asked_line({**asked, "sparsity": None}) == "magnitude, erk, unstructured"
    assert skipped_line([]) == ""
    assert summary(Report((), {})) == (
        "0 of 0 chosen weights are zero (0.0000%); 0 of all 0 parameters (0.0000%), infx fewer non-zero parameters"
    )


def test_plans_show_what_would_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for plan in (
        secateur.plan(model, 0.5), secateur.plan(model, allocation={"*": 0.5}), secateur.plan(model, threshold=1e-3),
        secateur.plan(model, pattern="2:4"), secateur.plan(model, 0.5, criterion=lambda weight: -weight),
    ):  # fmt: skip
        console = Console(file=io.StringIO(), width=120, color_system=None)
        for part in plan_renderables(plan):
            console.print(part)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert f"{plan.prune} of 32 chosen weights will be zero" in shown
        assert "nothing written" in shown
        assert "left alone: a bias (2)" in shown
        assert f"{plan.prune} of 32 weights" in str(plan)
        assert "0.weight" in str(plan)
