"""The command line: what it prints, where it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
import pty
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app as cli
from secateur.errors import BadInput

NAMES = ["fc1.weight", "fc2.weight"]


class Done(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Done]


@pytest.fixture
def secateur_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, exit codes and all."""

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, args)])
        capsys.readouterr()
        code = 0
        with warnings.catch_warnings():
            try:
                cli.run()
            except SystemExit as e:
                code = int(e.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "emb.weight": torch.randn(10, 8, generator=g), "fc1.weight": torch.randn(12, 8, generator=g),
        "fc1.bias": torch.randn(12, generator=g), "fc2.weight": torch.randn(4, 12, generator=g),
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model with a config, a tokenizer, and the same weights in another format."""
    path = tmp_path / "hub"
    path.mkdir()
    table = {n: f"model-0000{1 + i // 2}-of-00002.safetensors" for i, n in enumerate(tensors())}
    for shard in set(table.values()):
        save_file({n: t for n, t in tensors().items() if table[n] == shard}, path / shard, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (path / name).write_text(name)
    (path / "pytorch_model.bin").write_bytes(b"unpruned")
    return path


def tree(where: Path) -> dict[str, bytes]:
    return {str(p.relative_to(where)): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file()}


def zeros(found: Mapping[str, Tensor]) -> int:
    return sum(int((found[n] == 0).sum()) for n in NAMES)


# ------------------------------------------------------------------------------------- commands


def test_prune_a_file(secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    before, out = file.read_bytes(), tmp_path / "pruned.safetensors"
    done = secateur_cli("prune", file, "--sparsity", ".5", "-o", out)
    assert (done.code, done.err) == (0, "")
    want = tensors()
    report = secateur.prune(want, 0.5)
    found = load_file(out)
    assert all(torch.equal(found[n], want[n]) for n in want)
    assert file.read_bytes() == before
    for said in ("sparsity 0.5, magnitude, global, unstructured", "fc1.weight", "12x8", f"{report.zeros} of 144 chosen",
                 "left alone: an embedding (1), a bias (1)", f"written to {out}"):  # fmt: skip
        assert said in done.out, said


def test_only_zeros_are_new_in_the_file(secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    """The header and every tensor that is not pruned are the same bytes."""
    out = tmp_path / "pruned.safetensors"
    assert secateur_cli("prune", file, "--sparsity", ".5", "-o", out).code == 0
    before, after = file.read_bytes(), out.read_bytes()
    size = 8 + int.from_bytes(before[:8], "little")
    assert len(before) == len(after)
    assert before[:size] == after[:size]
    for name, entry in json.loads(before[8:size]).items():
        if name in ("emb.weight", "fc1.bias"):
            a, b = (size + at for at in entry["data_offsets"])
            assert before[a:b] == after[a:b]


def test_prune_a_folder(secateur_cli: Run, folder: Path, tmp_path: Path) -> None:
    before, out = tree(folder), tmp_path / "pruned"
    done = secateur_cli("prune", folder, "--sparsity", "0.5", "-o", out, "--allocation", "local")
    assert done.code == 0
    assert tree(folder) == before
    after = tree(out)
    assert set(after) == set(before) - {"pytorch_model.bin"}
    assert {n for n in after if after[n] != before[n]} == {n for n in after if n.endswith(".safetensors")}
    found = {n: t for shard in out.glob("*.safetensors") for n, t in load_file(shard).items()}
    assert [int((found[n] == 0).sum()) for n in NAMES] == [48, 24]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "pruned"]


def test_two_of_four(secateur_cli: Run, tmp_path: Path) -> None:
    """For linear and convolution weights, seen in the file."""
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(
        {
            "fc.weight": torch.randn(6, 8),
            "conv.weight": torch.randn(5, 8, 3, 3),
            "stem.weight": torch.randn(4, 3, 3, 3),
        },
        source,
    )
    done = secateur_cli("prune", source, "--pattern", "2:4", "-o", out)
    assert done.code == 0
    assert "cannot carry 2:4" in done.out
    found = load_file(out)
    for name in ("fc.weight", "conv.weight"):
        assert ((found[name].movedim(1, -1).reshape(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(found["stem.weight"], load_file(source)["stem.weight"])


def test_filters_caps_and_the_rest_reach_the_function(secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    table: list[tuple[list[str], dict[str, Any]]] = [
        (["--sparsity", ".5", "--include", "fc1"], {"sparsity": 0.5, "include": "fc1"}),
        (["--sparsity", ".5", "--include", "fc1", "--include", "emb.weight"],
         {"sparsity": 0.5, "include": ["fc1", "emb.weight"]}),
        (["--sparsity", ".5", "--ignore", "fc2"], {"sparsity": 0.5, "ignore": "fc2"}),
        (["--threshold", "0.5"], {"threshold": 0.5}),
        (["--sparsity", ".5", "--criterion", "random"], {"sparsity": 0.5, "criterion": "random"}),
        (["--sparsity", ".5", "--allocation", "lamp"], {"sparsity": 0.5, "allocation": "lamp"}),
        (["--sparsity", ".5", "--allocation", "erk"], {"sparsity": 0.5, "allocation": "erk"}),
        (["--sparsity", ".5", "--pattern", "4x4"], {"sparsity": 0.5, "pattern": "4x4"}),
        (["--sparsity", ".5", "--pattern", "channel:in"], {"sparsity": 0.5, "pattern": "channel:in"}),
        (["--sparsity", ".5", "--max-sparsity", ".6"], {"sparsity": 0.5, "max_sparsity": 0.6}),
        (["--sparsity", ".5", "--min-keep", "30"], {"sparsity": 0.5, "min_keep": 30}),
        (["--sparsity", "0"], {"sparsity": 0.0}),
    ]  # fmt: skip
    for i, (args, asked) in enumerate(table):
        out = tmp_path / f"{i}.safetensors"
        done = secateur_cli("prune", file, *args, "-o", out, "--json")
        assert (done.code, done.err) == (0, ""), args
        want = tensors()
        report = secateur.prune(want, **asked)
        assert done.facts["zeros"] == report.zeros
        assert {n: t.numpy().tobytes() for n, t in load_file(out).items()} == {
            n: t.numpy().tobytes() for n, t in want.items()
        }, args


def test_nonfinite_values(secateur_cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"fc.weight": torch.tensor([[torch.nan, torch.inf, 1.0, 2.0]])}, source)
    done = secateur_cli("prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors")
    assert done.code == 3
    assert "'fc.weight' (shape (1, 4), float32) holds 2 NaN or infinite weights" in done.err
    for mode, left in (("keep", [True, True, False, False]), ("prune", [False, False, True, True])):
        out = tmp_path / f"{mode}.safetensors"
        assert secateur_cli("prune", source, "--sparsity", ".5", "--nonfinite", mode, "-o", out).code == 0
        assert (load_file(out)["fc.weight"] != 0).view(-1).tolist() == left


def test_inspect(secateur_cli: Run, file: Path, folder: Path) -> None:
    for path in (file, folder):
        before = tree(path.parent)
        done = secateur_cli("inspect", path)
        assert (done.code, done.err) == (0, "")
        assert "0 of 144 chosen weights are zero" in done.out
        assert "left alone: an embedding (1), a bias (1)" in done.out
        facts = secateur_cli("inspect", path, "--json", "--ignore", "fc2").facts
        assert (facts["total"], facts["model_total"]) == (96, 80 + 96 + 12 + 48)
        assert {r["name"]: r["skip"] for r in facts["rows"]} == {
            "emb.weight": "an embedding", "fc1.bias": "a bias", "fc1.weight": None, "fc2.weight": "ignored by the filter",
        }  # fmt: skip
        assert tree(path.parent) == before


def test_a_dry_run_writes_nothing(secateur_cli: Run, file: Path, folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for path in (file, folder):
        for more in ([], ["-o", tmp_path / "out.safetensors"]):
            done = secateur_cli("prune", path, "--sparsity", ".5", "--dry-run", *more)
            assert (done.code, done.err) == (0, "")
            assert "72 of 144 chosen weights will be zero (50.0000%); nothing written" in done.out
        plan = secateur.Plan.from_json(secateur_cli("prune", path, "--sparsity", ".5", "--dry-run", "--json").out)
        assert plan == secateur.plan(path, 0.5)
    assert tree(tmp_path) == before


def test_json_is_json_alone(secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    done = secateur_cli(
        "prune", file, "--sparsity", ".9", "-o", tmp_path / "b.safetensors", "--json", "--pattern", "4x4"
    )
    assert done.err == ""
    assert done.facts["asked"] == {
        "sparsity": 0.9, "threshold": None, "criterion": "magnitude", "allocation": "global", "pattern": "4x4",
    }  # fmt: skip
    assert done.facts["out"] == str(tmp_path / "b.safetensors")
    assert done.facts["zeros"] == zeros(load_file(tmp_path / "b.safetensors"))


def test_warnings_are_part_of_the_report(secateur_cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.ones(1, 2), "b.weight": torch.full((10, 2), 5.0)}, source)
    done = secateur_cli("prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors")
    assert (done.code, done.err) == (0, "")
    assert "warning: left with nothing: a.weight" in done.out
    facts = secateur_cli("prune", source, "--sparsity", ".5", "-o", tmp_path / "c.safetensors", "--json").facts
    assert "left with nothing: a.weight" in facts["warnings"][0]


def test_help_and_version() -> None:
    runner = CliRunner()
    assert f"secateur {secateur.__version__}" in runner.invoke(cli.app, ["--version"]).output
    for command in ([], ["prune"], ["inspect"]):
        shown = runner.invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        for code in ("0 done", "2 the command", "3 refused", "4 the output", "130 interrupted"):
            assert code in " ".join(shown.output.replace("│", " ").split()), (command, code)
    assert "Usage" in runner.invoke(cli.app, []).output


# ----------------------------------------------------------------------------------- exit codes

REFUSED: dict[str, tuple[list[str], str]] = {
    "per cent": (["--sparsity", "90"], r"got 90.0. Did you mean 0.9?"),
    "all": (["--sparsity", "1"], "1 would prune every weight"),
    "negative": (["--sparsity", "-0.5"], "0 <= sparsity < 1; got -0.5"),
    "NaN": (["--sparsity", "nan"], "0 <= sparsity < 1; got nan"),
    "nothing asked": ([], "say how much to prune"),
    "two amounts": (["--sparsity", ".5", "--threshold", ".1"], "two answers to one question"),
    "a threshold of zero": (["--threshold", "0"], "0 < threshold < inf"),
    "an unknown pattern": (["--sparsity", ".5", "--pattern", "4:2"], "1 <= N < M"),
    "an unknown allocation": (["--sparsity", ".5", "--allocation", "best"], "allocation must be one of global"),
    "an unknown criterion": (["--sparsity", ".5", "--criterion", "l1"], "criterion must be"),
    "an unknown mode": (["--sparsity", ".5", "--nonfinite", "drop"], "nonfinite must be one of error, keep, prune"),
    "another sparsity than the pattern's": (["--sparsity", ".6", "--pattern", "2:4"], "2:4 means sparsity 0.5"),
    "a filter that matches nothing": (["--sparsity", ".5", "--include", "lm_head"], "include='lm_head' matches nothing"),
    "everything ignored": (["--sparsity", ".5", "--ignore", "*"], "nothing to prune"),
    "caps": (["--sparsity", ".9", "--max-sparsity", ".5"], "130 of 144 weights are to go, but"),
    "min_keep": (["--sparsity", ".5", "--min-keep", "-1"], "min_keep is a count"),
    "layers without order": (["--sparsity", ".5", "--allocation", "uniform_plus"], "needs the order of the layers"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_ends_with_3_and_one_line(what: str, secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    args, text = REFUSED[what]
    before = tree(tmp_path)
    for more in (["-o", tmp_path / "out.safetensors"], ["--dry-run"], ["-o", tmp_path / "out.safetensors", "--json"]):
        done = secateur_cli("prune", file, *args, *more)
        assert (done.code, done.out) == (3, "")
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert text in done.err
        assert tree(tmp_path) == before


def test_paths_that_cannot_be_used(secateur_cli: Run, file: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()
    out = tmp_path / "out.safetensors"
    for args, text in (
        (["inspect", tmp_path / "gone"], "gone does not exist"),
        (["inspect", folder], "names files that are not there: model-00001-of-00002.safetensors"),
        (["prune", folder, "--sparsity", ".5", "-o", out], "names files that are not there"),
        (["prune", file, "--sparsity", ".5", "-o", file, "--overwrite"], "the source is never written"),
        (["prune", file, "--sparsity", ".5", "-o", tmp_path / "no" / "out.safetensors"], "does not exist; make it first"),
        (["prune", file, "--sparsity", ".5", "-o", tmp_path / "out"], "must be the name of a .safetensors file"),
    ):  # fmt: skip
        before = tree(tmp_path)
        done = secateur_cli(*args)
        assert (done.code, done.out) == (3, "")
        assert text in done.err
        assert tree(tmp_path) == before


def test_commands_that_cannot_be_read_end_with_2(secateur_cli: Run, file: Path, tmp_path: Path) -> None:
    for args in (
        ["prune"], ["prune", file, "--sparsity", "half", "-o", "x"], ["prune", file, "--sparsity", "True", "-o", "x"],
        ["prune", file, "--sparsity", ".5"], ["prune", file, "--nosuch"], ["grow", file], ["inspect"],
        ["prune", file, "--sparsity", ".5", "-o", "x", "--min-keep", "1.5"],
    ):  # fmt: skip
        done = secateur_cli(*args)
        assert done.code == 2, args
        assert done.out == ""
    assert "-o" in secateur_cli("prune", file, "--sparsity", ".5").err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_an_output_that_is_there_ends_with_4(secateur_cli: Run, file: Path, folder: Path, tmp_path: Path) -> None:
    out, taken = tmp_path / "out.safetensors", tmp_path / "taken"
    out.write_text("mine")
    taken.mkdir()
    for source, where in ((file, out), (folder, taken), (folder, out)):
        before = tree(tmp_path)
        done = secateur_cli("prune", source, "--sparsity", ".5", "-o", where)
        assert (done.code, done.out) == (4, "")
        assert "already there; choose another path, or say overwrite=True (--overwrite)" in done.err
        assert tree(tmp_path) == before
    assert secateur_cli("prune", file, "--sparsity", ".5", "-o", out, "--overwrite").code == 0
    assert zeros(load_file(out)) == 72
    assert secateur_cli("prune", folder, "--sparsity", ".5", "-o", taken, "--overwrite").code == 0
    assert (taken / "config.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_names_from_a_file_do_not_steer_the_terminal(secateur_cli: Run, tmp_path: Path) -> None:
    """Escapes, and what rich would read as markup."""
    source = tmp_path / "a.safetensors"
    save_file({"\x1b[31mred.weight": torch.ones(2, 2), "[bold]x[/nope].weight": torch.ones(2, 2)}, source)
    out = tmp_path / "b.safetensors"
    shown = [
        secateur_cli("inspect", source), secateur_cli("prune", source, "--sparsity", ".5", "-o", out, "--allocation", "uniform"),
        secateur_cli("prune", source, "--sparsity", ".5", "--dry-run", "--pattern", "4x4"),
        secateur_cli("prune", source, "--sparsity", ".5", "--dry-run", "--include", "none"),
    ]  # fmt: skip
    assert [d.code for d in shown] == [0, 0, 3, 3]
    for done in shown:
        assert "\x1b" not in done.out + done.err
        assert "[bold]x[/nope].weight" in done.out + done.err
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "\x1b[31m.safetensors"}}))
    assert "\x1b" not in secateur_cli("inspect", hub).err


# ------------------------------------------------------------------------------------- pickles


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_needs_permission(secateur_cli: Run, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"):
        source, out = tmp_path / name, tmp_path / f"{name}.safetensors"
        torch.save(tensors(), source)
        before = source.read_bytes()
        done = secateur_cli("prune", source, "--sparsity", ".5", "-o", out)
        assert done.code == 3
        assert (
            f"{name} is a pickled checkpoint, and a pickle can run code. If you trust it, say --allow-pickle"
            in done.err
        )
        assert not out.exists()
        done = secateur_cli("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle", "--json")
        assert (done.code, done.err) == (0, "")
        want = tensors()
        report = secateur.prune(want, 0.5)
        assert (done.facts["zeros"], done.facts["total"]) == (report.zeros, report.total)
        assert all(torch.equal(load_file(out)[n], t) for n, t in want.items())
        assert secateur_cli("inspect", out, "--json").facts["zeros"] == report.zeros
        assert secateur_cli("inspect", source, "--allow-pickle", "--json").facts["zeros"] == 0
        assert source.read_bytes() == before
        assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_malicious_pickle_does_not_run(secateur_cli: Run, tmp_path: Path) -> None:
    source, harm, out = tmp_path / "evil.bin", tmp_path / "harm", tmp_path / "out.safetensors"
    files: list[Callable[[], object]] = [
        lambda: torch.save({"w": torch.ones(2, 2), "x": Evil(harm)}, source),
        lambda: source.write_bytes(pickle.dumps(Evil(harm))),
        lambda: torch.save(Evil(harm), source, _use_new_zipfile_serialization=False),
    ]  # fmt: skip
    for write in files:
        write()
        for args in (["inspect", source], ["prune", source, "--sparsity", ".5", "-o", out]):
            assert secateur_cli(*args).code == 3
            done = secateur_cli(*args, "--allow-pickle")
            assert (done.code, done.out) == (3, "")
            assert "evil.bin cannot be read with weights_only=True" in done.err
            assert done.err.count("\n") == 1
            assert not harm.exists()
            assert not out.exists()
    harm_by_hand = torch.load  # the pickle does what it is feared for, if it is read carelessly
    torch.save(Evil(harm), source)
    harm_by_hand(source, weights_only=False)
    assert harm.exists()


def test_what_may_lie_in_a_pickle(secateur_cli: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "a.bin", tmp_path / "out.safetensors"
    args = ("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle", "--overwrite")
    tied = {**tensors(), "head.weight": tensors()["fc2.weight"]}
    tied["fc2.weight"] = tied["head.weight"]
    strided = {"fc.weight": torch.randn(8, 4).t()}
    for holds in (
        {"state_dict": tensors(), "epoch": 3},
        {"model": tensors()},
        {"model_state_dict": tensors()},
        tied,
        strided,
    ):
        torch.save(holds, source)
        done = secateur_cli(*args)
        assert (done.code, done.err) == (0, ""), list(holds)
    for holds in ([torch.ones(2)], {"epoch": 3}, {}, {"w": [1.0]}, torch.ones(2, 2), {"optimizer": {"state": {}}}):  # type: ignore[assignment]
        torch.save(holds, source)
        before = tree(tmp_path)
        done = secateur_cli(*args)
        assert (done.code, done.out) == (3, ""), holds
        assert tree(tmp_path) == before
    torch.save(nn.Linear(2, 2), source)
    assert secateur_cli(*args).code == 3
    torch.save(tensors(), source)
    source.write_bytes(source.read_bytes()[:-100])
    assert "cannot be read" in secateur_cli(*args).err
    source.write_bytes(b"")
    assert "cannot be read" in secateur_cli(*args).err


def test_a_pickle_goes_to_a_safetensors_file_that_is_free(secateur_cli: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    torch.save(tensors(), source)
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    before = tree(tmp_path)
    for out, code, text in (
        (tmp_path / "b.bin", 3, "the output of a pickled checkpoint is a .safetensors file; got 'b.bin'"),
        (tmp_path / "b", 3, "is a .safetensors file; got 'b'"),
        (taken, 4, "already there"),
        (source, 3, ".safetensors file"),
    ):
        done = secateur_cli("prune", source, "--sparsity", ".5", "-o", out, "--allow-pickle")
        assert (done.code, done.out) == (code, "")
        assert text in done.err
        assert tree(tmp_path) == before
    done = secateur_cli("prune", source, "--sparsity", "1.5", "-o", tmp_path / "b.safetensors", "--allow-pickle")
    assert done.code == 3
    assert tree(tmp_path) == before
    done = secateur_cli(
        "prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors", "--allow-pickle", "--dry-run"
    )
    assert "nothing written" in done.out
    assert tree(tmp_path) == before


# ----------------------------------------------------------------------------------- processes


def process(
    *args: object, code: str = "from secateur.cli import main; main()", **options: Any
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, text=True, env=environment, **options)


def test_a_process_is_silent_and_ends_with_its_code(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "secateur.cli"]
    out = tmp_path / "out.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "prune", file, "--sparsity", ".5", "-o", out],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert f"written to {out}" in done.stdout
    done = subprocess.run(
        [*command, "prune", file, "--sparsity", "90", "-o", out],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_terminal_sees_a_sign_of_life(file: Path) -> None:
    ours, theirs = pty.openpty()
    child = process("inspect", file, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    out, _ = child.communicate(timeout=120)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # what a terminal says when the other side has gone
        pass
    os.close(ours)
    assert child.returncode == 0
    assert b"counting zeros in model.safetensors" in shown
    assert "counting zeros in" not in out
    assert "\x1b" not in out


HELD = """
import time
from secateur.stores import staging
def hold(path):
    print("staged", flush=True)
    time.sleep(600)
staging.sync = hold
from secateur.cli import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_process_that_is_ended_leaves_the_old_output(name: str, folder: Path, tmp_path: Path) -> None:
    """Ended when all is written but nothing is in place yet."""
    out = tmp_path / "out"
    secateur.prune(folder, 0.25, out=out)
    before = tree(tmp_path)
    child = process(
        "prune", folder, "--sparsity", ".5", "-o", out, "--overwrite",
        code=HELD, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "staged\n"
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    child.send_signal(getattr(signal, name))
    _, err = child.communicate(timeout=60)
    after = tree(tmp_path)
    assert {n: b for n, b in after.items() if not n.startswith(".")} == before
    if name == "SIGINT":
        assert child.returncode == 130
        assert "Traceback" not in err
    if name in ("SIGINT", "SIGTERM"):
        assert after == before
    assert child.returncode != 0
    report = secateur.prune(folder, 0.5, out=out, overwrite=True)  # and what is left over is in nobody's way
    assert secateur.inspect(out).zeros == report.zeros == 72


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch, secateur_cli: Run, file: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(secateur, "inspect", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        secateur_cli("inspect", file)


def test_the_functions_behind_the_commands_are_the_public_ones(file: Path) -> None:
    """The runner of the framework sees the error itself: exit codes are made in one place."""
    result = CliRunner().invoke(cli.app, ["inspect", str(file), "--include", "none"])
    assert isinstance(result.exception, BadInput)
