"""Where a result goes, and that nothing is lost when writing it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur
from secateur.errors import BadInput, OutputExists, SecateurError
from secateur.files import Files
from secateur.stores import disk, staging
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.stage import MANIFEST
from tests.unit.hub import hub_folder, one_file, refused, tree

# ---------------------------------------------------------------------------- where the result goes


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    mine, dangling = tmp_path / "mine.safetensors", tmp_path / "link.safetensors"
    mine.write_text("mine")
    dangling.symlink_to("nowhere")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for source, out in ((file, mine), (file, dangling), (folder, taken), (folder, mine)):
        refused(
            OutputExists,
            r"already there; choose another path, or say overwrite=True \(--overwrite\)",
            source,
            out,
            tmp_path,
        )
    with pytest.raises(FileExistsError):
        secateur.apply(secateur.plan(file, 0.5), file, out=mine)


def test_overwrite_replaces_what_is_there(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    kept = tmp_path / "kept.safetensors"
    kept.write_text("kept")
    link = tmp_path / "link.safetensors"
    link.symlink_to(kept)
    for source, out in ((file, tmp_path / "a.safetensors"), (file, link), (folder, tmp_path / "b")):
        for s in (0.5, 0.9):
            report = secateur.prune(source, s, out=out, overwrite=True)
            assert secateur.inspect(out).zeros == report.zeros
    assert kept.read_text() == "kept"
    assert not link.is_symlink()
    (tmp_path / "b" / "stale.txt").write_text("x")
    secateur.prune(folder, 0.5, out=tmp_path / "b", overwrite=True)
    assert set(tree(tmp_path / "b")) == {*tree(folder), MANIFEST}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    file, folder = one_file(tmp_path), hub_folder(tmp_path / "in")
    alias = tmp_path / "alias.safetensors"
    alias.symlink_to(file)
    around = tmp_path / "a" / "b"
    inner = hub_folder(around / "inner")
    (around / "precious.txt").write_text("mine")
    text = "is the source, or one lies inside the other; the source is never written"
    for source, out in (
        (file, file), (file, alias), (alias, file), (folder, folder), (folder, folder / "out"), (inner, around),
        (inner, tmp_path / "a"), (folder, tmp_path / "in" / ".." / "in"),
    ):  # fmt: skip
        refused(BadInput, text, source, out, tmp_path, overwrite=True)


def test_outputs_of_the_wrong_kind(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    text = "the source is a file, so out must be the name of a .safetensors file; got"
    refused(BadInput, text, file, tmp_path / "out", tmp_path)
    refused(BadInput, text, file, tmp_path / "out.bin", tmp_path)
    refused(BadInput, text, file, tmp_path / "folder.safetensors", tmp_path, overwrite=True)
    refused(
        BadInput,
        "the folder .*no/such does not exist; make it first",
        file,
        tmp_path / "no/such/out.safetensors",
        tmp_path,
    )


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = one_file(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(BadInput, r"has 1000 bytes free, and the result needs \d+", file, tmp_path / "out.safetensors", tmp_path)


# ----------------------------------------------------------------------- faults while it is written


OPERATIONS = [
    (os, "open"), (os, "fsync"), (os, "link"), (shutil, "copyfile"), (Path, "replace"), (Path, "mkdir"), (os, "write"),
    (os, "pwrite"), (disk, "exchange"),
]  # fmt: skip


def failing_at(n: int, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> list[str]:
    """Makes the n-th file operation from now on fail, once; returns the list of operations seen."""
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == n:
                raise error()
            return real(*args, **kwargs)

        return operation

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))
    return seen


@pytest.mark.parametrize(
    "error", [lambda: OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt], ids=["full", "^C"]
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, old: bool, error: Callable[[], BaseException]
) -> None:
    """The n-th file operation fails, for every n until none does: the old output or the new one is there, whole."""
    small = {"a.weight": torch.arange(1.0, 9).view(2, 4), "b.weight": torch.arange(1.0, 9).view(4, 2)}
    source = one_file(tmp_path, small) if kind == "file" else small_folder(tmp_path / "in", small)
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    secateur.prune(source, 0.75, out=out)
    finished = tree(tmp_path)
    clear(tmp_path)
    if old:
        secateur.prune(source, 0.25, out=out)
    before = tree(tmp_path)
    for n in range(1, 300):
        with monkeypatch.context() as patch:
            seen = failing_at(n, patch, error)
            try:
                secateur.prune(source, 0.75, out=out, overwrite=old)
                failed = False
            except (OSError, SecateurError, KeyboardInterrupt):
                failed = True
        after = tree(tmp_path)
        if not failed and len(seen) < n:
            assert after == finished
            assert n > 5, "no operation of the writer was seen"
            return
        stray = {name for name in after if name.startswith(".")}
        assert {name: b for name, b in after.items() if name not in stray} in (before, finished), (n, seen[n - 1])
        if stray and kind == "file":  # only where clearing up failed, after the result was in place
            assert {**finished, **after} == after, (n, seen[n - 1], sorted(after))
        if stray:
            secateur.prune(source, 0.75, out=out, overwrite=True, files=Files(resume=True))
            assert tree(tmp_path) == finished, (n, seen[n - 1])
        clear(tmp_path)
        for name, raw in before.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(raw)
    pytest.fail("it never came through")


def small_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Two shards, an index, a config, and nothing else."""
    folder.mkdir()
    table = {n: f"model-{n[0]}.safetensors" for n in tensors}
    for name, file in table.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text("{}")
    return folder


def clear(folder: Path) -> None:
    """Removes outputs and whatever was left beside them."""
    for path in folder.iterdir():
        if path.name.startswith((".", "out")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    source, out = hub_folder(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(OutputExists, match=r"does not look like a model \(it holds thesis.txt\)"):
        secateur.prune(source, 0.5, out=out, overwrite=True)
    assert tree(out) == {"thesis.txt": b"years"}
    (out / "thesis.txt").unlink()
    secateur.prune(source, 0.5, out=out, overwrite=True)  # an empty one holds nothing to lose
    assert secateur.prune(source, 0.25, out=out, overwrite=True).zeros == secateur.inspect(out).zeros


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_removed_and_what_a_live_one_builds_is_not(kind: str, tmp_path: Path) -> None:
    source = one_file(tmp_path) if kind == "file" else hub_folder(tmp_path / "in")
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    gone, live, here = int(done.stdout), os.getppid(), staging._home()
    names = {
        f".{out.name}.partial-{here}-{gone}-01234567": False,
        f".{out.name}.partial-{here}-{live}-01234567": True,
        f".{out.name}.partial-{here}-{os.getpid()}-01234567": True,
        f".{out.name}.partial-00000000-{gone}-01234567": True,  # another machine's, which may be alive there
        f".{out.name}.partial-{here}-{gone}-01234567.txt": True,
        f".other{out.name}.partial-{here}-{gone}-01234567": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    secateur.prune(source, 0.5, out=out)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_what_does_not_read_back_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = one_file(tmp_path), tmp_path / "out.safetensors"
    before = tree(tmp_path)
    real = disk.write_all

    def flip(fd: int, path: Any, data: memoryview) -> None:
        wrong = bytearray(data)
        wrong[-1:] = bytes(b ^ 1 for b in wrong[-1:])
        real(fd, path, memoryview(wrong))

    monkeypatch.setattr(disk, "write_all", flip)
    with pytest.raises(SecateurError, match="does not read back as it was written"):
        secateur.prune(source, 0.5, out=out)
    assert tree(tmp_path) == before


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = one_file(tmp_path)
    store = CheckpointStore(source)
    with source.open("r+b") as f:
        f.truncate(source.stat().st_size - 100)
    with pytest.raises(BadInput, match=r"ended inside .*changed while it was read"):
        for spec in store.specs():
            list(store.parts(spec, "whole"))
