"""The command line as a process: silence, signs of life, and signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import secateur
from secateur.cli import app as cli
from secateur.errors import BadInput
from tests.unit.conftest import Run, tree


def process(
    *args: object, code: str = "from secateur.cli import main; main()", **options: Any
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    # A shell's background job ignores SIGINT, and a child would too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, text=True, env=environment, preexec_fn=heard, **options)


def test_a_process_is_silent_and_ends_with_its_code(model_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "secateur.cli"]
    out = tmp_path / "out.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "prune", model_file, "--sparsity", ".5", "-o", out],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert f"written to {out}" in done.stdout
    done = subprocess.run(
        [*command, "prune", model_file, "--sparsity", "90", "-o", tmp_path / "other.safetensors"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_terminal_sees_a_sign_of_life(model_file: Path) -> None:
    ours, theirs = pty.openpty()
    child = process("inspect", model_file, stdout=subprocess.PIPE, stderr=theirs)
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
from secateur.stores import disk
def hold(what, path):
    if what == "exchange":
        print("staged", flush=True)
        time.sleep(600)
disk.before = hold
from secateur.cli import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_process_that_is_ended_leaves_the_old_output(name: str, model_folder: Path, tmp_path: Path) -> None:
    """Ended when all is written but nothing is in place yet; SIGTERM would be heard after that (test_cli_files.py)."""
    out = tmp_path / "out"
    secateur.prune(model_folder, 0.25, out=out)
    before = tree(tmp_path)
    child = process(
        "prune", model_folder, "--sparsity", ".5", "-o", out, "--overwrite",
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
    assert child.returncode != 0
    report = secateur.prune(model_folder, 0.5, out=out, overwrite=True)  # and what is left over is in nobody's way
    assert secateur.inspect(out).zeros == report.zeros == 72


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch, command: Run, model_file: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(secateur, "inspect", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        command("inspect", model_file)


def test_the_functions_behind_the_commands_are_the_public_ones(model_file: Path) -> None:
    """The runner of the framework sees the error itself: exit codes are made in one place."""
    result = CliRunner().invoke(cli.app, ["inspect", str(model_file), "--include", "none"])
    assert isinstance(result.exception, BadInput)
