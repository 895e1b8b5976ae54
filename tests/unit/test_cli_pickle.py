"""Pickled checkpoints are read only where the user says so, and never run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.cli.pickled import convert
from secateur.errors import BadInput
from tests.unit.conftest import Run, tensors, tree


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_needs_permission(command: Run, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"):
        source, out = tmp_path / name, tmp_path / f"{name}.safetensors"
        torch.save(tensors(), source)
        before = source.read_bytes()
        done = command("prune", source, "--sparsity", ".5", "-o", out)
        assert done.code == 3
        assert (
            f"{name} is a pickled checkpoint, and a pickle can run code. If you trust it, say --allow-pickle"
            in done.err
        )
        assert not out.exists()
        done = command("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle", "--json")
        assert (done.code, done.err) == (0, "")
        want = tensors()
        report = secateur.prune(want, 0.5)
        assert (done.facts["zeros"], done.facts["total"]) == (report.zeros, report.total)
        assert all(torch.equal(load_file(out)[n], t) for n, t in want.items())
        assert command("inspect", out, "--json").facts["zeros"] == report.zeros
        assert name != "model.pt" or command("inspect", source, "--allow-pickle", "--json").facts["zeros"] == 0
        assert source.read_bytes() == before
        assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_malicious_pickle_does_not_run(command: Run, tmp_path: Path) -> None:
    source, harm, out = tmp_path / "evil.bin", tmp_path / "harm", tmp_path / "out.safetensors"
    files: list[Callable[[], object]] = [
        lambda: torch.save({"w": torch.ones(2, 2), "x": Evil(harm)}, source),
        lambda: source.write_bytes(pickle.dumps(Evil(harm))),
        lambda: torch.save(Evil(harm), source, _use_new_zipfile_serialization=False),
    ]  # fmt: skip
    for write in files:
        write()
        for args in (["inspect", source], ["prune", source, "--sparsity", ".5", "-o", out])[: 1 + (write is files[0])]:
            assert command(*args).code == 3
            done = command(*args, "--allow-pickle")
            assert (done.code, done.out) == (3, "")
            assert "evil.bin cannot be read with weights_only=True" in done.err
            assert done.err.count("\n") == 1
            assert not harm.exists()
            assert not out.exists()
    harm_by_hand = torch.load  # the pickle does what it is feared for, if it is read carelessly
    torch.save(Evil(harm), source)
    harm_by_hand(source, weights_only=False)
    assert harm.exists()


def test_what_may_lie_in_a_pickle(command: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "a.bin", tmp_path / "out.safetensors"
    args = ("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle", "--overwrite")
    tied = {**tensors(), "head.weight": tensors()["fc2.weight"]}
    tied["fc2.weight"] = tied["head.weight"]
    strided = {"fc.weight": torch.randn(8, 4).t()}
    torch.save({"state_dict": tensors(), "epoch": 3}, source)
    done = command(*args)
    assert (done.code, done.err) == (0, "")
    torch.save([torch.ones(2)], source)
    before = tree(tmp_path)
    done = command(*args)
    assert (done.code, done.out) == (3, "")
    assert "does not hold a dict of tensors" in done.err
    assert tree(tmp_path) == before
    # The rest as the process of its own does it, whose start takes seconds.
    for holds in ({"model": tensors()}, {"model_state_dict": tensors()}, tied, strided):
        torch.save(holds, source)
        convert(source, out)
        found, want = load_file(out), next((v for v in holds.values() if isinstance(v, dict)), holds)
        assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in want.items()}
    for odd in ({"epoch": 3}, {}, {"w": [1.0]}, torch.ones(2, 2), {"optimizer": {"state": {}}}, nn.Linear(2, 2)):
        torch.save(odd, source)
        with pytest.raises(BadInput):
            convert(source, out)
    torch.save(tensors(), source)
    for raw in (source.read_bytes()[:-100], b""):
        source.write_bytes(raw)
        with pytest.raises(BadInput, match="cannot be read"):
            convert(source, out)


def test_a_pickle_goes_to_a_safetensors_file_that_is_free(command: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    torch.save(tensors(), source)
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    before = tree(tmp_path)
    for out, code, text in (
        (tmp_path / "b.bin", 3, "out must be the name of a .safetensors file"),
        (tmp_path / "b", 3, "out must be the name of a .safetensors file"),
        (taken, 4, "already there"),
        (source, 4, "already there"),
    ):
        done = command("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle")
        assert (done.code, done.out) == (code, "")
        assert text in done.err
        assert tree(tmp_path) == before
    done = command("prune", source, "--sparsity", "1.5", "-o", tmp_path / "b.safetensors", "--allow-pickle")
    assert done.code == 3
    assert tree(tmp_path) == before
    done = command("prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors", "--allow-pickle", "--dry-run")
    assert "nothing written" in done.out
    assert tree(tmp_path) == before
