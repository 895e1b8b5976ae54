"""On a machine without a compiler the install succeeds, without the extension, and the package works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.guard.source import ROOT
from tests.integration.prune_a_model import results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# -S leaves out site-packages with its .pth files, and with them the finder of the editable install; what the
# package needs is then found by path, after the folder under test.
RUN = """
import runpy, sys
sys.path[:0] = {folders!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def install(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Installs the package into a folder, with a compiler that always fails."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--target", str(folder)]
    env = os.environ | {"CC": "/bin/false", "CXX": "/bin/false", "SECATEUR_REQUIRE_NATIVE": "0"} | environ
    return subprocess.run([*pip, str(ROOT)], env=env, capture_output=True, text=True, check=False)


def test_it_installs_and_prunes(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("secateur-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in wheel.read_text()
    assert not list((tmp_path / "secateur").rglob("*.so"))
    for data in (
        "py.typed",
        "report/run_page.html.j2",
        "report/compare_page.html.j2",
        "report/macros.html.j2",
        "report/page.css",
    ):
        assert (tmp_path / "secateur" / data).exists()

    folders = [str(tmp_path), sysconfig.get_path("purelib")]
    code = RUN.format(folders=folders, script=str(ROOT / "tests/integration/prune_a_model.py"))
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert Path(said["file"]).is_relative_to(tmp_path)
    assert said["native"] is False
    assert said["masks"] == results()


def test_it_fails_where_the_extension_is_required(tmp_path: Path) -> None:
    done = install(tmp_path, SECATEUR_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not (tmp_path / "secateur").exists()
