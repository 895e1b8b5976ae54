"""What else can be wrong with files and where they go: each is refused by name, and nothing is left of a result."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import secateur
from secateur.errors import BadInput, BadTensor, PlanMismatch, SecateurError
from secateur.files import Files
from tests.contract.disk import load
from tests.guard.source import ROOT
from tests.unit.hub import hub_folder, one_file, refused, tree, write_raw

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("metadata", [None, {}, [], "x", {"total_size": -1}])
def test_what_an_index_says_beside_its_map_does_not_matter(metadata: Any, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in")
    table = json.loads((folder / INDEX).read_text())["weight_map"]
    text = json.dumps({"weight_map": table} | ({} if metadata is None else {"metadata": metadata}))
    (folder / INDEX).write_text(text)
    report = secateur.prune(folder, 0.5, out=tmp_path / "out")
    assert secateur.inspect(tmp_path / "out").zeros == report.zeros
    assert (tmp_path / "out" / INDEX).read_text() == text


def test_a_shard_that_the_index_forgets(tmp_path: Path) -> None:
    """It would be lost. Another form of the same weights is left out, as ever."""
    folder = hub_folder(tmp_path / "in")
    found = json.loads((folder / INDEX).read_text())
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")
    secateur.prune(folder, 0.5, out=tmp_path / "out")
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    left = {n: f for n, f in found["weight_map"].items() if "00001" in f}
    (folder / INDEX).write_text(json.dumps({**found, "weight_map": left}))
    text = r"model-00002-of-00002.safetensors is one of the shards by its name, and model.*index.json lists no tensor of it"
    refused(BadInput, text, folder, tmp_path / "two", tmp_path)


def test_tensors_that_hold_no_weights(tmp_path: Path) -> None:
    """Packed and scale dtypes are carried as they are, and refused where they are asked for."""
    header = {
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "q.weight": {"dtype": "F4", "shape": [4, 2], "data_offsets": [16, 20]},
        "q.scale": {"dtype": "F8_E8M0", "shape": [2, 2], "data_offsets": [20, 24]},
    }
    data = torch.tensor([1.0, 2, 3, 4]).numpy().tobytes() + bytes(range(1, 9))
    source, out = write_raw(tmp_path / "m.safetensors", header, data), tmp_path / "o.safetensors"
    report = secateur.prune(source, 0.5, out=out)
    assert (report.zeros, report.total) == (2, 4)
    assert out.read_bytes()[-8:] == bytes(range(1, 9))
    for name, error in (("q.weight", SecateurError), ("q.scale", BadTensor)):
        refused(error, name.replace(".", r"\."), source, tmp_path / "p.safetensors", tmp_path, include=name)


def test_bad_values_are_named_with_their_tensor_in_a_folder_too(tmp_path: Path) -> None:
    for value, text in ((torch.nan, "holds 1 NaN"), (torch.inf, "inf")):
        tensors = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}
        tensors["b.weight"][1, 2] = value
        folder = hub_folder(tmp_path / f"in{value}", tensors)
        refused(BadTensor, rf"(?i)'b.weight' \(shape \(4, 4\), float32\).*{text}", folder, tmp_path / "out", tmp_path)


def test_a_folder_of_nothing_but_empty_tensors(tmp_path: Path) -> None:
    source = one_file(tmp_path, {"a.weight": torch.empty(0, 4), "b.weight": torch.empty(3, 0)})
    report = secateur.prune(source, 0.5, out=tmp_path / "o.safetensors")
    assert (report.zeros, report.total) == (0, 0)
    assert (tmp_path / "o.safetensors").read_bytes() == source.read_bytes()


# ------------------------------------------------------------------------------------ where results go


def test_a_place_that_is_none(tmp_path: Path) -> None:
    """A file where a folder should be, and a folder that is not there."""
    folder, file = hub_folder(tmp_path / "in"), tmp_path / "file"
    file.write_text("mine")
    for out in (file / "out", tmp_path / "none" / "out", tmp_path / "in" / "out"):
        refused(BadInput, r"does not exist; make it first|lies inside the other", folder, out, tmp_path)
    refused(FileExistsError, "already there", folder, file, tmp_path)
    assert file.read_text() == "mine"


def test_a_place_that_nobody_can_write(tmp_path: Path) -> None:
    """Nobody makes a folder in /proc, whoever asks."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc")
    folder = hub_folder(tmp_path / "in")
    before = tree(tmp_path)
    for source, out in ((folder, "/proc/out"), (folder / "model-00001-of-00002.safetensors", "/proc/out.safetensors")):
        with pytest.raises((OSError, BadInput), match="/proc"):
            secateur.prune(source, 0.5, out=out)
    assert tree(tmp_path) == before


FULL = """
import resource, sys
from secateur.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
main()
"""


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """The kernel refuses to write more: one line, exit code 1, nothing left, what was there is there; and going on works."""
    tensors = {"a.weight": torch.randn(4, 8), "z.weight": torch.randn(64, 64)}
    folder, out = hub_folder(tmp_path / "in", tensors), tmp_path / "out"
    secateur.prune(folder, 0.25, out=out)
    before = tree(out)
    command = [sys.executable, "-c", FULL, "prune", str(folder), "--sparsity", ".5", "-o", str(out), "--overwrite"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 27] File too large")
    assert "Traceback" not in done.stderr
    assert tree(out) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE) != (3000, 3000)
    assert ("go on with them by resume (--resume)" in done.stderr) == bool(list(tmp_path.glob(".out.*")))
    again = secateur.prune(folder, 0.5, out=out, overwrite=True, files=Files(resume=True))
    assert secateur.inspect(out).zeros == again.zeros
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


# --------------------------------------------------------------------------------- sources that change


def test_a_source_that_changed_since_its_plan_was_made(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in", {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)})
    made = secateur.plan(folder, 0.5)
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"]["b.weight"]
    whole = file.read_bytes()
    unnamed = replace(made, source=None)  # as of files of other names
    for other, plan, text in (
        (torch.randn(8, 8) * 9, unnamed, "weights of 'b.weight' .* would be zero, where the plan says"),
        (torch.randn(4, 16), unnamed, "the plan was made for 'b.weight'"),
        (torch.randn(8, 8).half(), unnamed, "the plan was made for 'b.weight'"),
        (torch.randn(8, 8).half(), made, "is not the file that the plan was made of"),
    ):
        save_file({"b.weight": other}, file)
        with pytest.raises(PlanMismatch, match=text):
            secateur.apply(plan, folder, out=tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    file.write_bytes(whole)
    assert secateur.apply(made, folder, out=tmp_path / "out").zeros == 64


@pytest.mark.parametrize("how", ["other bytes", "shorter", "gone"])
def test_a_source_that_changes_while_it_is_pruned(how: str, tmp_path: Path) -> None:
    """Seen at the latest before the result is put in its place."""
    folder = hub_folder(tmp_path / "in", {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)})
    first, second = sorted(folder.glob("*.safetensors"))
    raw = first.read_bytes()

    def change(done: int, total: int, file: str) -> None:
        if done == 0:
            if how == "gone":
                second.unlink()
            else:
                first.write_bytes(raw[:-4] if how == "shorter" else raw[:-4] + b"\x01\x02\x03\x04")

    with pytest.raises((SecateurError, OSError), match=r"changed|ended inside|No such file|read back"):
        secateur.prune(folder, 0.5, out=tmp_path / "out", files=Files(progress=change))
    assert not (tmp_path / "out").exists()
    if how == "other bytes":
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
        secateur.prune(folder, 0.5, out=tmp_path / "out", files=Files(resume=True))  # nothing was kept: it begins anew
        assert sorted(load(tmp_path / "out")) == ["a.weight", "b.weight"]
