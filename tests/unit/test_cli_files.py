"""Pruning in two steps, holding a result against its manifest, and an orderly stop: as commands."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.core.profile import Budget
from secateur.files import Files
from secateur.stores.stage import MANIFEST
from tests.unit.conftest import Run, tree
from tests.unit.test_cli_process import process

GATED = """
import os, time
from secateur.stores import disk
seen = []
def before(what, path):
    if what == "write" and path.endswith(".safetensors") and not seen:
        seen.append(path)
        print("writing", flush=True)
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.01)
disk.before = before
from secateur.cli import main
main()
"""


def test_a_plan_is_carried_out_to_the_bytes_that_prune_writes(command: Run, model_folder: Path, tmp_path: Path) -> None:
    plan, one, other = tmp_path / "plan.json", tmp_path / "one", tmp_path / "other"
    assert command("plan", model_folder, "--sparsity", ".5", "-o", plan).code == 0
    assert command("apply", plan, model_folder, "-o", one).code == 0
    assert command("prune", model_folder, "--sparsity", ".5", "-o", other).code == 0
    assert tree(one) == tree(other)
    assert command("apply", plan, model_folder, "-o", one).code == 4
    assert command("apply", plan, model_folder).code == 2


def test_a_result_is_held_against_its_manifest(command: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("prune", model_folder, "--sparsity", ".5", "-o", out).code == 0
    done = command("verify", out)
    assert done.code == 0
    assert "files are as they were written; 72 of 144 pruned weights zero, 50.00%" in done.out
    shard, vocabulary, manifest = sorted(out.glob("*.safetensors"))[0], out / "vocab.txt", out / MANIFEST
    whole = {p: p.read_bytes() for p in (shard, vocabulary, manifest)}
    zeros = json.loads(manifest.read_text())
    zeros["zeros"][next(iter(zeros["zeros"]))] += 1
    for path, raw, said in (
        (shard, whole[shard][:-1] + b"\x55", f"{shard.name} has the sha256"),
        (shard, None, f"{shard.name} is not there"),
        (vocabulary, b"other", "vocab.txt has the sha256"),
        (out / "more.safetensors", whole[shard], "more.safetensors is not in the manifest"),
        (manifest, json.dumps(zeros).encode(), "zeros, and the manifest says"),
    ):
        path.unlink(missing_ok=True)
        if raw is not None:
            path.write_bytes(raw)
        done = command("verify", out)
        assert (done.code, done.out) == (3, "")
        assert said in done.err
        path.unlink(missing_ok=True)
        if path in whole:
            path.write_bytes(whole[path])
    assert command("verify", out).code == 0
    assert command("verify", model_folder).code == 3


def test_in_place(command: Run, model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert command("prune", model_folder, "--sparsity", ".5", "-o", other).code == 0
    assert command("prune", model_folder, "--sparsity", ".5", "--in-place").code == 0
    assert tree(model_folder) == tree(other)
    assert command("prune", model_folder, "--sparsity", ".5", "--in-place", "-o", tmp_path / "third").code == 2


def stopped(folder: Path, out: Path, go: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Sends SIGTERM while the first file is written, and then lets it be written."""
    monkeypatch.setenv("GO", str(go))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = process("prune", folder, "--sparsity", ".5", "-o", out, code=GATED, **pipes)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGTERM)
    go.touch()
    return child.wait(60), child.communicate()[1]


def test_sigterm_ends_between_two_files_and_what_is_done_is_gone_on_with(
    command: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    code, said = stopped(model_folder, out, tmp_path / "go", monkeypatch)
    assert code == 75
    assert "stopped after 1 of 2 files, which are kept: --resume goes on with them." in said
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert command("prune", model_folder, "--sparsity", ".6", "-o", out, "--resume").code == 3  # another request
    assert command("prune", model_folder, "--sparsity", ".5", "-o", out, "--resume").code == 0
    assert command("prune", model_folder, "--sparsity", ".5", "-o", alone).code == 0
    assert tree(out) == tree(alone)
    assert not list(tmp_path.glob(".out.partial-*"))


def test_what_is_left_is_cleaned(
    command: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(model_folder, tmp_path / "out", tmp_path / "go", monkeypatch)[0] == 75
    before = tree(model_folder)
    assert "removed .out.partial-" in command("clean", tmp_path).out
    assert not list(tmp_path.glob(".out.partial-*"))
    assert tree(model_folder) == before
    assert "nothing was left" in command("clean", tmp_path).out
    assert command("clean", tmp_path / "nowhere").code == 3


def test_half_of_the_memory_is_for_counts(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def budget(left: int) -> Budget:
        seen.append(left)
        return Budget(left)

    monkeypatch.setattr("secateur.core.make.Budget", budget)
    secateur.plan(model_folder, 0.5, files=Files(memory="64MiB"))
    assert seen == [32 << 20]
