"""The command line: what it prints, where it writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import secateur
from secateur.cli import app as cli
from tests.unit.conftest import NAMES, Run, tensors, tree, zeros

# ----------------------------------------------------------------------------------------- commands


def test_prune_a_file(command: Run, model_file: Path, tmp_path: Path) -> None:
    before, out = model_file.read_bytes(), tmp_path / "pruned.safetensors"
    done = command("prune", model_file, "--sparsity", ".5", "-o", out)
    assert (done.code, done.err) == (0, "")
    want = tensors()
    report = secateur.prune(want, 0.5)
    found = load_file(out)
    assert all(torch.equal(found[n], want[n]) for n in want)
    assert model_file.read_bytes() == before
    for said in ("sparsity 0.5, magnitude, global, unstructured", "fc1.weight", "12x8", f"{report.zeros} of 144 chosen",
                 "left alone: an embedding (1), a bias (1)", f"written to {out}"):  # fmt: skip
        assert said in done.out, said


def test_only_zeros_are_new_in_the_file(command: Run, model_file: Path, tmp_path: Path) -> None:
    """The header and every tensor that is not pruned are the same bytes."""
    out = tmp_path / "pruned.safetensors"
    assert command("prune", model_file, "--sparsity", ".5", "-o", out).code == 0
    before, after = model_file.read_bytes(), out.read_bytes()
    size = 8 + int.from_bytes(before[:8], "little")
    assert len(before) == len(after)
    assert before[:size] == after[:size]
    for name, entry in json.loads(before[8:size]).items():
        if name in ("emb.weight", "fc1.bias"):
            a, b = (size + at for at in entry["data_offsets"])
            assert before[a:b] == after[a:b]


def test_prune_a_folder(command: Run, model_folder: Path, tmp_path: Path) -> None:
    before, out = tree(model_folder), tmp_path / "pruned"
    done = command("prune", model_folder, "--sparsity", "0.5", "-o", out, "--allocation", "local")
    assert done.code == 0
    assert tree(model_folder) == before
    after = tree(out)
    assert set(after) == {*before, "pruning_manifest.json"} - {"pytorch_model.bin"}
    changed = {n for n in after if after[n] != before.get(n)}
    assert changed == {n for n in after if n.endswith(".safetensors") or n == "pruning_manifest.json"}
    found = {n: t for shard in out.glob("*.safetensors") for n, t in load_file(shard).items()}
    assert [int((found[n] == 0).sum()) for n in NAMES] == [48, 24]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "pruned"]


def test_two_of_four(command: Run, tmp_path: Path) -> None:
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
    done = command("prune", source, "--pattern", "2:4", "-o", out)
    assert done.code == 0
    assert "cannot carry 2:4" in done.out
    found = load_file(out)
    for name in ("fc.weight", "conv.weight"):
        assert ((found[name].movedim(1, -1).reshape(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(found["stem.weight"], load_file(source)["stem.weight"])


def test_filters_caps_and_the_rest_reach_the_function(command: Run, model_file: Path, tmp_path: Path) -> None:
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
        done = command("prune", model_file, *args, "-o", out, "--json")
        assert (done.code, done.err) == (0, ""), args
        want = tensors()
        report = secateur.prune(want, **asked)
        assert done.facts["zeros"] == report.zeros
        assert {n: t.numpy().tobytes() for n, t in load_file(out).items()} == {
            n: t.numpy().tobytes() for n, t in want.items()
        }, args


def test_nonfinite_values(command: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"fc.weight": torch.tensor([[torch.nan, torch.inf, 1.0, 2.0]])}, source)
    done = command("prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors")
    assert done.code == 3
    assert "'fc.weight' (shape (1, 4), float32) holds 2 NaN or infinite weights" in done.err
    for mode, left in (("keep", [True, True, False, False]), ("prune", [False, False, True, True])):
        out = tmp_path / f"{mode}.safetensors"
        assert command("prune", source, "--sparsity", ".5", "--nonfinite", mode, "-o", out).code == 0
        assert (load_file(out)["fc.weight"] != 0).view(-1).tolist() == left


def test_inspect(command: Run, model_file: Path, model_folder: Path) -> None:
    for path in (model_file, model_folder):
        before = tree(path.parent)
        done = command("inspect", path)
        assert (done.code, done.err) == (0, "")
        assert "0 of 144 chosen weights are zero" in done.out
        assert "left alone: an embedding (1), a bias (1)" in done.out
        facts = command("inspect", path, "--json", "--ignore", "fc2").facts
        assert (facts["total"], facts["model_total"]) == (96, 80 + 96 + 12 + 48)
        assert {r["name"]: r["skip"] for r in facts["rows"]} == {
            "emb.weight": "an embedding", "fc1.bias": "a bias", "fc1.weight": None, "fc2.weight": "ignored by the filter",
        }  # fmt: skip
        assert tree(path.parent) == before


def test_a_dry_run_writes_nothing(command: Run, model_file: Path, model_folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for path in (model_file, model_folder):
        for more in ([], ["-o", tmp_path / "out.safetensors"]):
            done = command("prune", path, "--sparsity", ".5", "--dry-run", *more)
            assert (done.code, done.err) == (0, "")
            assert "72 of 144 chosen weights will be zero (50.0000%); nothing written" in done.out
        plan = secateur.Plan.from_json(command("prune", path, "--sparsity", ".5", "--dry-run", "--json").out)
        assert plan == secateur.plan(path, 0.5)
    assert tree(tmp_path) == before


def test_json_is_json_alone(command: Run, model_file: Path, tmp_path: Path) -> None:
    done = command(
        "prune", model_file, "--sparsity", ".9", "-o", tmp_path / "b.safetensors", "--json", "--pattern", "4x4"
    )
    assert done.err == ""
    assert done.facts["asked"] == {
        "sparsity": 0.9, "threshold": None, "criterion": "magnitude", "allocation": "global", "pattern": "4x4",
    }  # fmt: skip
    assert done.facts["out"] == str(tmp_path / "b.safetensors")
    assert done.facts["zeros"] == zeros(load_file(tmp_path / "b.safetensors"))


def test_warnings_are_part_of_the_report(command: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.ones(1, 2), "b.weight": torch.full((10, 2), 5.0)}, source)
    done = command("prune", source, "--sparsity", ".5", "-o", tmp_path / "b.safetensors")
    assert (done.code, done.err) == (0, "")
    assert "warning: left with nothing: a.weight" in done.out
    facts = command("prune", source, "--sparsity", ".5", "-o", tmp_path / "c.safetensors", "--json").facts
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


# --------------------------------------------------------------------------------------- exit codes


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
def test_what_is_refused_ends_with_3_and_one_line(what: str, command: Run, model_file: Path, tmp_path: Path) -> None:
    args, text = REFUSED[what]
    before = tree(tmp_path)
    for more in (["-o", tmp_path / "out.safetensors"], ["--dry-run"], ["-o", tmp_path / "out.safetensors", "--json"]):
        done = command("prune", model_file, *args, *more)
        assert (done.code, done.out) == (3, "")
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert text in done.err
        assert tree(tmp_path) == before


def test_paths_that_cannot_be_used(command: Run, model_file: Path, model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model-00001-of-00002.safetensors").unlink()
    out = tmp_path / "out.safetensors"
    for args, text in (
        (["inspect", tmp_path / "gone"], "gone does not exist"),
        (["inspect", model_folder], "names files that are not there: model-00001-of-00002.safetensors"),
        (["prune", model_folder, "--sparsity", ".5", "-o", out], "names files that are not there"),
        (["prune", model_file, "--sparsity", ".5", "-o", model_file, "--overwrite"], "the source is never written"),
        (["prune", model_file, "--sparsity", ".5", "-o", tmp_path / "no" / "out.safetensors"], "does not exist; make it first"),
        (["prune", model_file, "--sparsity", ".5", "-o", tmp_path / "out"], "must be the name of a .safetensors file"),
    ):  # fmt: skip
        before = tree(tmp_path)
        done = command(*args)
        assert (done.code, done.out) == (3, "")
        assert text in done.err
        assert tree(tmp_path) == before


def test_commands_that_cannot_be_read_end_with_2(command: Run, model_file: Path, tmp_path: Path) -> None:
    for args in (
        ["prune"], ["prune", model_file, "--sparsity", "half", "-o", "x"], ["prune", model_file, "--sparsity", "True", "-o", "x"],
        ["prune", model_file, "--sparsity", ".5"], ["prune", model_file, "--nosuch"], ["grow", model_file], ["inspect"],
        ["prune", model_file, "--sparsity", ".5", "-o", "x", "--min-keep", "1.5"],
    ):  # fmt: skip
        done = command(*args)
        assert done.code == 2, args
        assert done.out == ""
    assert "-o" in command("prune", model_file, "--sparsity", ".5").err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_an_output_that_is_there_ends_with_4(
    command: Run, model_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    out, taken = tmp_path / "out.safetensors", tmp_path / "taken"
    out.write_text("mine")
    taken.mkdir()
    for source, where in ((model_file, out), (model_folder, taken), (model_folder, out)):
        before = tree(tmp_path)
        done = command("prune", source, "--sparsity", ".5", "-o", where)
        assert (done.code, done.out) == (4, "")
        assert "already there; choose another path, or say overwrite=True (--overwrite)" in done.err
        assert tree(tmp_path) == before
    assert command("prune", model_file, "--sparsity", ".5", "-o", out, "--overwrite").code == 0
    assert zeros(load_file(out)) == 72
    assert command("prune", model_folder, "--sparsity", ".5", "-o", taken, "--overwrite").code == 0
    assert (taken / "config.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_names_from_a_file_do_not_steer_the_terminal(command: Run, tmp_path: Path) -> None:
    """Escapes, and what rich would read as markup."""
    source = tmp_path / "a.safetensors"
    save_file({"\x1b[31mred.weight": torch.ones(2, 2), "[bold]x[/nope].weight": torch.ones(2, 2)}, source)
    out = tmp_path / "b.safetensors"
    shown = [
        command("inspect", source), command("prune", source, "--sparsity", ".5", "-o", out, "--allocation", "uniform"),
        command("prune", source, "--sparsity", ".5", "--dry-run", "--pattern", "4x4"),
        command("prune", source, "--sparsity", ".5", "--dry-run", "--include", "none"),
    ]  # fmt: skip
    assert [d.code for d in shown] == [0, 0, 3, 3]
    for done in shown:
        assert "\x1b" not in done.out + done.err
        assert "[bold]x[/nope].weight" in done.out + done.err
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "\x1b[31m.safetensors"}}))
    assert "\x1b" not in command("inspect", hub).err


def test_caps_and_roles_for_some_tensors(command: Run, tmp_path: Path) -> None:
    save_file(
        {"a": torch.randn(8, 8), "b": torch.randn(8, 8), "fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors"
    )
    out, src = tmp_path / "o.safetensors", tmp_path / "m.safetensors"
    done = command(
        "prune", src, "--sparsity", ".5", "-o", out, "--roles", "[ab]=linear", "--max-sparsity", "a=0", "--max-sparsity", "b=.9",
        "--json",
    )  # fmt: skip
    assert done.code == 0
    found = load_file(out)
    assert int((found["a"] == 0).sum()) == 0 and sum(int((t == 0).sum()) for t in found.values()) == 96
    seen = {r["name"]: r["role"] for r in command("inspect", out, "--roles", "[ab]=linear", "--json").facts["rows"]}
    assert seen["a"] == seen["b"] == "linear"
    for wrong, text in (("a", "takes a number, or GLOB=NUMBER"), ("a=b", "'b'"), ("=.5", "GLOB=VALUE")):
        done = command("prune", src, "--sparsity", ".5", "--dry-run", "--max-sparsity", wrong)
        assert done.code == 3 and text in done.err
    done = command("prune", src, "--sparsity", ".5", "--dry-run", "--roles", "a=x", "--roles", "a=y")
    assert done.code == 3 and "is there twice" in done.err


def test_a_seed_for_the_random_control(command: Run, model_file: Path) -> None:
    def plan(criterion: str) -> dict[str, Any]:
        return command("prune", model_file, "--sparsity", ".5", "--dry-run", "--json", "--criterion", criterion).facts

    assert plan("random(0)") == plan("random") != plan("random(1)")
    assert plan("random(1)")["criterion"] == "random(1)"
