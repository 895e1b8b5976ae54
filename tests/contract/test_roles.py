"""Every verb takes roles: what one calls a layer, the others do too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur
from tests.contract.disk import load, save_one

ROLES = {"weird": "linear"}


def target() -> dict[str, torch.Tensor]:
    return {"weird": torch.arange(1.0, 13).view(3, 4), "bias": torch.ones(3)}


def test_a_dict_whose_names_tell_nothing() -> None:
    w = target()
    with pytest.raises(secateur.NothingChosen):
        secateur.masks(w)
    assert [(r.name, r.skip is None) for r in secateur.inspect(w, roles=ROLES).chosen] == [("weird", True)]
    plan = secateur.plan(w, 0.5, roles=ROLES)
    assert secateur.apply(plan, w, roles=ROLES)["weird"].role == "linear"
    found = secateur.masks(w, roles=ROLES)
    assert list(found) == ["weird"] and torch.equal(found["weird"], target()["weird"] > 6)
    again = target()
    assert secateur.apply(found, again, roles=ROLES)["weird"].role == "linear"
    assert torch.equal(again["weird"], w["weird"])
    report = secateur.inspect(w, roles=ROLES)
    assert (report.zeros, report.total) == (6, 12)


def test_a_file_whose_names_tell_nothing(tmp_path: Path) -> None:
    source, out = save_one(target(), tmp_path), tmp_path / "out.safetensors"
    found = {"weird": target()["weird"] > 6}
    assert secateur.apply(found, source, roles=ROLES, out=out)["weird"].role == "linear"
    assert torch.equal(secateur.masks(out, roles=ROLES)["weird"], found["weird"])
    assert secateur.inspect(out, roles=ROLES).zeros == int((load(out)["weird"] == 0).sum()) == 6


@pytest.mark.parametrize(
    "verb",
    [secateur.inspect, secateur.masks, lambda w, roles: secateur.apply({"weird": w["weird"] > 1}, w, roles=roles)],
)
def test_roles_that_cannot_be_are_refused(verb: object) -> None:
    w = target()
    for roles, error in (({"weird": "conv"}, secateur.BadInput), ({"x": "linear"}, secateur.NothingChosen)):
        with pytest.raises(error):
            verb(w, roles=roles)  # type: ignore[operator]
    assert torch.equal(w["weird"], target()["weird"])
