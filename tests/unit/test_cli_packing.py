"""``secateur pack`` and ``unpack``: what they print, where they write, and how they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from secateur.cli import app as cli
from secateur.runtime.files import save_packed
from tests.unit.conftest import Run, tree
from tests.unit.hub import hub_folder
from tests.unit.packing import ENCODED, bits_of, codecs, pruned, with_zstd


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(pruned(), path, metadata={"format": "pt"})
    return path


def test_a_file_there_and_back(command: Run, source: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "p.safetensors", tmp_path / "b.safetensors"
    done = command("pack", source, "-o", packed)
    assert (done.code, done.err) == (0, "")
    ratio = source.stat().st_size / packed.stat().st_size
    for said in ("64x200   BF16  csr-u16", "bits a weight", f"{packed.stat().st_size:,} bytes packed",
                 f"({ratio:.2f}x)", "in the 5 of 19 tensors that are packed: bitmask (3)", "plain: 14 tensors",
                 f"written to {packed}"):  # fmt: skip
        assert said in done.out, said
    done = command("unpack", packed, "-o", back)
    assert (done.code, done.err) == (0, "")
    assert f"written to {back}" in done.out
    assert back.read_bytes() == source.read_bytes()


@codecs
def test_json_is_what_the_function_returns(command: Run, source: Path, tmp_path: Path, codec: str | None) -> None:
    more = [] if codec is None else ["--codec", codec]
    facts = command("pack", source, "-o", tmp_path / "p.safetensors", "--json", *more).facts
    report = save_packed(source, tmp_path / "q.safetensors", codec=codec)
    assert facts == {**report.facts(), "out": str(tmp_path / "p.safetensors")} | {"rows": facts["rows"]}
    assert [(r["name"], r["encoding"], r["codec"], tuple(r["shape"])) for r in facts["rows"]] == [
        (r.name, r.encoding, r.codec, r.shape) for r in report.rows
    ]
    assert codec is not None or {r["name"]: r["encoding"] for r in facts["rows"] if r["encoding"] != "dense"} == ENCODED
    back = command("unpack", tmp_path / "p.safetensors", "-o", tmp_path / "b.safetensors", "--json").facts
    assert (back["dense_bytes"], back["packed_bytes"]) == (facts["dense_bytes"], facts["packed_bytes"])


def test_a_folder_there_and_back(command: Run, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "in", pruned())
    assert command("pack", folder, "-o", tmp_path / "p").code == 0
    assert command("unpack", tmp_path / "p", "-o", tmp_path / "b").code == 0
    there = {n: t for p in (tmp_path / "b").glob("*.safetensors") for n, t in load_file(p).items()}
    assert bits_of(there) == bits_of(pruned())


def test_refusals_and_their_codes(command: Run, source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "p.safetensors"
    assert command("pack", source, "-o", packed).code == 0
    before = tree(tmp_path)
    for code, said, args in (
        (4, "already there", ["pack", source, "-o", packed]),
        (4, "already there", ["unpack", packed, "-o", source]),
        (3, "is packed already", ["pack", packed, "-o", tmp_path / "q.safetensors"]),
        (3, "is not packed", ["unpack", source, "-o", tmp_path / "q.safetensors"]),
        (3, "does not exist", ["unpack", tmp_path / "none.safetensors", "-o", tmp_path / "q.safetensors"]),
        (3, "codec must be one of zstd", ["pack", source, "-o", tmp_path / "q.safetensors", "--codec", "gzip"]),
        (3, "is packed; unpack it first", ["prune", packed, "--sparsity", "0.9", "-o", tmp_path / "q.safetensors"]),
        (2, "", ["pack", source]),
    ):
        done = command(*args)
        assert done.code == code, (args, done.err)
        assert said in done.err
    assert tree(tmp_path) == before
    assert command("pack", source, "-o", packed, "--overwrite").code == 0
    assert command("unpack", packed, "-o", tmp_path / "b.safetensors").code == 0
    assert command("unpack", packed, "-o", tmp_path / "b.safetensors", "--overwrite").code == 0


def test_a_model_without_zeros_is_told_so(command: Run, tmp_path: Path) -> None:
    save_file({"a": torch.ones(32, 32)}, tmp_path / "a.safetensors")
    done = command("pack", tmp_path / "a.safetensors", "-o", tmp_path / "p.safetensors")
    assert done.code == 0
    assert "no tensor is packed: none has zeros enough to gain by it" in done.out


def test_a_pickled_checkpoint_only_where_it_is_allowed(command: Run, tmp_path: Path) -> None:
    source, out = tmp_path / "pytorch_model.bin", tmp_path / "p.safetensors"
    torch.save(pruned(), source)
    assert command("pack", source, "-o", out).code == 3
    assert command("pack", source, "-o", out, "--allow-pickle").code == 0
    assert command("unpack", out, "-o", tmp_path / "b.safetensors").code == 0
    assert bits_of(load_file(tmp_path / "b.safetensors")) == bits_of(pruned())


@with_zstd
def test_names_of_a_file_do_not_reach_the_terminal_raw(command: Run, tmp_path: Path) -> None:
    save_file({"a\x1b[31m": torch.zeros(64, 64)}, tmp_path / "a.safetensors")
    done = command("pack", tmp_path / "a.safetensors", "-o", tmp_path / "p.safetensors", "--codec", "zstd")
    assert done.code == 0
    assert "\x1b" not in done.out
    assert r"a\x1b[31m" in done.out


def test_help() -> None:
    for name in ("pack", "unpack"):
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert "3 refused before anything was touched" in " ".join(shown.output.replace("│", " ").split())
