"""Headers, indices, plans and manifests changed at random: refused with an error of ours, or read for what they say."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.plan import Plan
from secateur.errors import SecateurError, SecateurWarning
from secateur.stores.verify import verify
from tests.contract.disk import load
from tests.contract.nets import bits
from tests.unit.hub import hub_folder

SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NUMBERS = [0, 1, -1, 2, 8, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, 1e308]
WORDS = [
    "",
    "F32",
    "F64",
    "U8",
    "F4",
    "F8_E8M0",
    "a.weight",
    "../x.safetensors",
    "/etc/passwd",
    "C:x.safetensors",
    "\0",
    "\ud800",
    "x" * 300,
]
ODD = (
    st.sampled_from([*NUMBERS, *WORDS, None, True, [], {}, [[]], [1 << 40] * 3, {"a": {}}])
    | st.integers()
    | st.text(max_size=9)
)


@st.composite
def damaged(draw: st.DrawFn, whole: Any) -> Any:
    """JSON with something in it replaced, dropped, renamed, doubled or swapped, once to three times."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = [(node, key) for node in nodes(found) for key in keys(node)]
        if not places:
            return copy.deepcopy(draw(ODD))
        node, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "drop", "rename", "swap", "add"]))
        if how == "drop":
            del node[key]
        elif how == "swap":
            other, place = draw(st.sampled_from(places))
            node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
        elif how == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(WORDS))] = node.pop(key)
        elif how == "add" and isinstance(node[key], int):
            node[key] += draw(st.sampled_from([-8, -1, 1, 8, 4096]))
        else:
            node[key] = copy.deepcopy(draw(ODD))
    return found


def nodes(node: Any) -> Iterator[Any]:
    if isinstance(node, (dict, list)):
        yield node
        for child in list(node.values() if isinstance(node, dict) else node):
            yield from nodes(child)


def keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


@st.composite
def text_of(draw: st.DrawFn, whole: Any) -> bytes:
    """Damaged JSON as bytes; now and then these are damaged too."""
    raw = json.dumps(draw(damaged(whole))).encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=3)) + raw[draw(st.integers(at, len(raw))) :]
    return raw


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 8, generator=g),
        "b.weight": torch.randn(4, 4, generator=g).bfloat16(),
        "c.bias": torch.ones(3),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hub_folder(tmp_path / "in", tensors())


def calmly(work: Callable[[], Any]) -> Any:
    """What it returns; ``None`` if it is refused, by an error of ours that can be printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        try:
            return work()
        except SecateurError as e:
            assert len(str(e)) < 5000
            return None


def pruned_or_refused(folder: Path) -> bool:
    """Whether it was pruned: to what the same tensors in memory are pruned to, and nothing is left else."""
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = calmly(lambda: secateur.prune(folder, 0.5, out=out))
    assert {p.name for p in folder.parent.iterdir()} <= {"in", "out"}
    assert out.exists() == (report is not None)
    if report is None:
        return False
    want = load(folder)
    calmly(lambda: secateur.prune(want, 0.5))
    assert {n: bits(t) for n, t in load(out).items()} == {n: bits(t) for n, t in want.items()}
    shutil.rmtree(out)
    return True


def test_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    whole = json.loads(file.read_text())
    seen = set()

    @SETTINGS
    @given(text_of(whole))
    def check(raw: bytes) -> None:
        file.write_bytes(raw)
        seen.add(pruned_or_refused(folder))

    check()
    assert seen == {True, False}


def test_header(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    raw = file.read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:size]), raw[size:]
    seen = set()

    @SETTINGS
    @given(text_of(header), st.sampled_from([0, 0, 0, -1, 1, 8, 2**40, -10]))
    def check(text: bytes, more: int) -> None:
        file.write_bytes(struct.pack("<Q", max(0, len(text) + more)) + text + data)
        seen.add(pruned_or_refused(folder))

    check()
    assert False in seen


def test_manifest(folder: Path) -> None:
    """What is changed in a manifest is seen, unless it is none of what is compared."""
    out = folder.parent / "out"
    secateur.prune(folder, 0.5, out=out)
    file = out / "pruning_manifest.json"
    whole = json.loads(file.read_text())

    @SETTINGS
    @given(text_of(whole))
    def check(raw: bytes) -> None:
        file.write_bytes(raw)
        found = calmly(lambda: verify(out))
        if found is not None and not found.wrong:
            told = json.loads(raw)
            assert told["zeros"] == whole["zeros"]
            assert (
                told["carried"].items() <= whole["carried"].items()
            )  # what lies beside weights may be more than is listed
            assert all(told["files"][f]["sha256"] == d["sha256"] for f, d in whole["files"].items())

    check()


@pytest.mark.parametrize("how", [{}, {"pattern": "2:4"}, {"allocation": "lamp"}, {"criterion": lambda weight: -weight}])
def test_plan(folder: Path, how: dict[str, Any]) -> None:
    """A plan that is not refused is carried out: exactly as many zeros as it says."""
    made = secateur.plan(folder, *([] if "pattern" in how else [0.5]), **how)
    path, out = folder.parent / "plan.json", folder.parent / "out"
    secateur.save_plan(made, path)
    whole, beside = json.loads(path.read_text()), {p.name for p in folder.parent.iterdir()}

    @SETTINGS
    @given(text_of(whole))
    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        shutil.rmtree(out, ignore_errors=True)
        plan = calmly(lambda: secateur.load_plan(path))
        if plan is None:
            return
        assert isinstance(plan, Plan)
        report = calmly(lambda: secateur.apply(plan, folder, out=out))
        if report is not None:
            assert report.zeros == plan.prune
            got = load(out)
            assert {r.name: int((got[r.name] == 0).sum()) for r in report.chosen} == {
                r.name: r.prune for r in plan.chosen
            }
            shutil.rmtree(out)
        assert {p.name for p in folder.parent.iterdir()} == beside

    check()
