"""A scan on disk: finished cells are skipped, other scans are not mixed in, a scan that was stopped ends as one left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from secateur.errors import BadInput
from secateur.evaluate.sensitivity import sensitivity
from secateur.evaluate.sensitivity_facts import Sensitivity
from tests.contract.nets import snapshot
from tests.unit.conftest import tree
from tests.unit.test_sensitivity import distance, net

Told = Callable[[nn.Module], dict[str, float]]


class Counted:
    """An evaluate that counts its calls, and may stop the scan at one of them."""

    def __init__(self, inner: Told, stop: int | None = None) -> None:
        self.inner, self.stop, self.calls = inner, stop, 0

    def __call__(self, m: nn.Module) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.inner(m)


def test_every_cell_is_a_small_file_and_is_skipped_next_time(tmp_path: Path) -> None:
    model = net()
    first = Counted(distance(model))
    scan = sensitivity(model, first, (0.5, 0.9), folder=tmp_path / "s")
    files = tree(tmp_path / "s")
    assert first.calls == 7 and sum(n.startswith("cells/") for n in files) == 7
    assert json.loads(files["cells/dense.json"])["mse"] == 0.0
    assert Sensitivity.from_json(files["sensitivity.json"].decode()) == scan
    assert files["report.html"].decode() == scan.to_html()
    again = Counted(distance(model))
    assert sensitivity(model, again, (0.5, 0.9), folder=tmp_path / "s") == scan
    assert again.calls == 0 and tree(tmp_path / "s") == files


@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_scan_that_was_stopped_ends_as_one_left_alone(stop: int, tmp_path: Path) -> None:
    model = net()
    before, inner = snapshot(model), distance(model)
    whole = sensitivity(model, Counted(inner), (0.5, 0.9), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, Counted(inner, stop), (0.5, 0.9), folder=tmp_path / "stopped")
    assert snapshot(model) == before
    rest = Counted(inner)
    assert sensitivity(model, rest, (0.5, 0.9), folder=tmp_path / "stopped") == whole
    assert rest.calls == 7 - (stop - 1)
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_sparsities_and_layers_may_be_added(tmp_path: Path) -> None:
    model = net()
    inner = distance(model)
    sensitivity(model, Counted(inner), (0.5,), include="2", folder=tmp_path)
    more = Counted(inner)
    scan = sensitivity(model, more, (0.5, 0.9), include=["2", "4"], folder=tmp_path)
    assert more.calls == 3 and scan == sensitivity(model, Counted(inner), (0.5, 0.9), include=["2", "4"])


def test_another_metric_is_read_without_measuring_again(tmp_path: Path) -> None:
    model = net()
    inner = distance(model)
    two = Counted(lambda m: {**inner(m), "accuracy": 50.0 - inner(m)["mse"]})
    first = sensitivity(model, two, (0.5,), folder=tmp_path)
    other = sensitivity(model, two, (0.5,), metric="accuracy", folder=tmp_path)
    assert two.calls == 4 and other.metric == "accuracy" and other.baseline == 50.0
    assert [other.drop(x, 0.5) for x in other] == pytest.approx([first.drop(x, 0.5) for x in first])
    with pytest.raises(BadInput, match="no metric 'f1'; there are 'mse', 'other', 'accuracy'"):
        sensitivity(model, two, (0.5,), metric="f1", folder=tmp_path)


def other_weights(model: nn.Module) -> dict[str, Any]:
    model[0].weight.data[0, 0] += 1  # type: ignore[index, operator]
    return {}


OTHER: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "weights": (other_weights, "weights: "),
    "criterion": (lambda m: {"criterion": "random"}, r"criterion: 'magnitude' then, 'random\(0\)' now"),
    "pattern": (lambda m: {"pattern": "4x4"}, "pattern: "),
    "groups": (lambda m: {"groups": {"g": "0"}}, "groups: "),
    "data": (lambda m: {"facts": {"data": "another"}}, "facts: .* then, .*another.* now"),
    "seed": (lambda m: {"seed": 1}, "seed: 0 then, 1 now"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_scan_is_not_mixed_in(what: str, tmp_path: Path) -> None:
    model = net()
    inner = distance(model)
    sensitivity(model, inner, (0.5,), folder=tmp_path)
    files = tree(tmp_path)
    change, words = OTHER[what]
    evaluate = Counted(inner)
    with pytest.raises(BadInput, match=f"other settings .*{words}"):
        sensitivity(model, inner, (0.5,), folder=tmp_path, **change(model))
    with pytest.raises(BadInput, match=r"other settings .*evaluate: .*Counted"):
        sensitivity(net(), evaluate, (0.5,), folder=tmp_path)
    assert tree(tmp_path) == files and evaluate.calls == 0


def test_a_broken_cell_is_named(tmp_path: Path) -> None:
    model = net()
    inner = distance(model)
    sensitivity(model, inner, (0.5,), folder=tmp_path)
    cell = next(tmp_path.glob("cells/2.weight-*.json"))
    for text in ("{", "[]", '{"layer": "2.weight"}'):
        cell.write_text(text)
        with pytest.raises(BadInput, match=f"{cell.name} .*Remove it, and it is measured again"):
            sensitivity(model, inner, (0.5,), folder=tmp_path)
    cell.unlink()
    sensitivity(model, inner, (0.5,), folder=tmp_path)


def test_names_that_are_no_names_of_files(tmp_path: Path) -> None:
    model = nn.Module()
    for name in ("a/b", "a_b", "ä" * 120, "..", " "):
        if "." not in name:
            model.add_module(name, nn.Linear(4, 4))
    folder = tmp_path / "s"
    values = iter(range(9))
    scan = sensitivity(model, lambda m: {"loss": next(values)}, (0.5,), folder=folder)
    assert len(scan.layers) == 4 and len(list((folder / "cells").iterdir())) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_page_or_a_text_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    model = net()
    scan = sensitivity(model, distance(model), (0.5,))
    scan.save(tmp_path / "a.html")
    scan.save(str(tmp_path / "a.json"))
    assert (tmp_path / "a.html").read_text() == scan.to_html() and (tmp_path / "a.json").read_text() == scan.to_json()
    with pytest.raises(BadInput, match=r"\.html or \.json"):
        scan.save(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="does not exist"):
        scan.save(tmp_path / "none" / "a.html")
