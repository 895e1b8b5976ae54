"""Who may import whom: the house stands on the direction of its imports, so a test walks them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.guard.source import ROOT, SRC, Import, imports, module_name, modules, text

# A layer sees those with a higher number; layers of equal number see each other, but for the pairs in APART.
LAYERS = {
    "cli": 0,
    "recipe": 1,
    "": 2,  # secateur/__init__.py, the public names
    "api": 3,
    "pretrained": 3.4,  # the same on a folder that transformers loads
    "carry_files": 3.4,  # the verbs on files
    "carry_ranks": 3.5,
    "carry_stage": 3.6,
    "calibrated": 3.5,  # pruning with data, block by block
    "carry": 4,  # what the verbs of the api share
    "report": 5,
    "evaluate": 5,
    "runtime": 5,
    "train": 5,
    "stores": 6,
    "engines": 6,
    "core": 7,
    "native": 8,
    "_native": 9,  # the extension itself: native/ alone sees it, and knows what to do where it is missing
    "files": 9,  # how files are worked on, as data
    "errors": 10,  # the one thing all may see
}
APART = {("train", "runtime"), ("runtime", "train")}

# core/ is tensors in, tensors or integers out.
NOT_IN_CORE = (
    "torch.nn", "torch.distributed", "torch.load", "torch.save",
    "torch.manual_seed", "torch.Generator", "torch.rand", "torch.randn", "torch.randint", "torch.randperm",
    "torch.bernoulli", "logging", "random", "secrets", "safetensors", "pathlib", "os", "io", "shutil",
    "tempfile",
)  # fmt: skip

# Imported on `import secateur`, whatever is then done: these only.
EVERYWHERE = {"torch", "numpy", "safetensors"}
# Paid for by those who come to these places.
PLACES = {
    "typer": {"cli"}, "click": {"cli"}, "rich": {"cli", "report"},
    "pydantic": {"recipe"}, "yaml": {"recipe"},
}  # fmt: skip
WITH_TORCH = {"jinja2", "filelock"}
MODULE_OF = {"pyyaml": "yaml", "pytorch-lightning": "pytorch_lightning"}


def layer(module: str) -> str:
    """``secateur.core.plan`` -> ``core``; the package itself, and a name imported from it, -> ``""``."""
    head = module.split(".")[1:2]
    return head[0] if head and head[0] in LAYERS else ""


def pointing_back(found: list[Import]) -> list[str]:
    wrong = []
    for i in found:
        if i.name.split(".")[0] != "secateur":
            continue
        above, below = layer(i.by), layer(i.name)
        back = LAYERS[below] < LAYERS[above] or (above, below) in APART
        if back or (below == "_native" and above != "native"):
            wrong.append(f"{i} ({above or 'secateur'} must not see {below or 'the public names'})")
    return wrong


def impure(path: Path, src: Path = SRC) -> list[str]:
    """Uses of what core must not have, by import or by attribute."""
    used = [(i.line, i.name) for i in imports(path, src)]
    tree = ast.parse(text(path))
    used += [(n.lineno, ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    hits = {(line, b) for line, name in used for b in NOT_IN_CORE if name == b or name.startswith(b + ".")}
    calls = {(n.lineno, n.id) for n in ast.walk(tree) if isinstance(n, ast.Name)}
    hits |= {(line, name) for line, name in calls if name in ("open", "print")}
    return [f"{module_name(path, src)}:{line} uses {b}" for line, b in sorted(hits)]


def too_eager(found: list[Import]) -> list[str]:
    """Imports outside functions that not every user needs."""
    wrong = []
    for i in found:
        top = i.name.split(".")[0]
        if not i.eager or top == "secateur" or top in sys.stdlib_module_names or top in EVERYWHERE:
            continue
        if layer(i.by) not in PLACES.get(top, set()):
            wrong.append(f"{i} when it is itself imported: import it inside the function that needs it")
    return wrong


def undeclared(found: list[Import]) -> list[str]:
    """Imports of packages that pyproject.toml does not name."""
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    asked = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    names = {re.split(r"[\s<>=!~\[;]", d)[0].lower() for d in asked}
    known = {MODULE_OF.get(n, n.replace("-", "_")) for n in names} | WITH_TORCH | {"rich", "secateur"}
    tops = {(i.name.split(".")[0], str(i)) for i in found}
    return [where for top, where in sorted(tops) if top not in known and top not in sys.stdlib_module_names]


ALL = [i for path in modules() for i in imports(path)]


def test_every_folder_has_a_layer() -> None:
    entries = (SRC / "secateur").iterdir()
    names = {p.stem for p in entries if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__", "__main__"} <= set(LAYERS)


def test_nothing_points_back() -> None:
    assert not pointing_back(ALL)


def test_core_is_pure() -> None:
    assert not [use for path in modules() if layer(module_name(path, SRC)) == "core" for use in impure(path)]


def test_nothing_is_imported_that_not_everybody_needs() -> None:
    assert not too_eager(ALL)


def test_every_import_is_a_declared_dependency() -> None:
    assert not undeclared(ALL)


# What the checks above must see: a file, what it says, and the check that has to object.
BROKEN = [
    ("core/a.py", "from secateur.stores.base import Store", "back"),
    ("core/b.py", "from ..api import prune", "back"),
    ("core/c.py", "def f():\n    import secateur", "back"),
    ("stores/d.py", "from secateur import prune", "back"),
    ("native/e.py", "from secateur.core import select", "back"),
    ("core/e2.py", "from secateur._native import select", "back"),
    ("train/f.py", "from secateur.runtime import pack", "back"),
    ("runtime/g.py", "import secateur.train.pruner", "back"),
    ("report/h.py", "from secateur.api import plan", "back"),
    ("errors.py", "from secateur.core.types import Spec", "back"),
    ("core/i.py", "from torch import nn", "impure"),
    ("core/j.py", "import torch\nx = torch.nn.Linear(1, 1)", "impure"),
    ("core/k.py", "import torch\ndef f():\n    return torch.rand(3)", "impure"),
    ("core/l.py", "import os.path", "impure"),
    ("core/m.py", "def f(p):\n    return open(p)", "impure"),
    ("stores/n.py", "import transformers", "eager"),
    ("stores/o.py", "try:\n    import ray\nexcept ImportError:\n    ray = None", "eager"),
    ("stores/p.py", "from rich.table import Table", "eager"),
    ("api.py", "import pydantic", "eager"),
    ("stores/q.py", "def f():\n    import pandas", "undeclared"),
]
SOUND = [
    ("cli/a.py", "import secateur\nimport typer\nfrom rich.table import Table"),
    ("api.py", "from secateur.stores.base import Store\nfrom .core import plan\nfrom secateur import errors"),
    ("native/b.py", "from .. import _native\nfrom secateur import _native as n"),
    ("stores/b.py", "def f():\n    import transformers"),
    ("stores/c.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"),
    ("evaluate/d.py", "from secateur.report import table"),
    ("core/e.py", "import torch\nfrom secateur.native import select\nx = torch.zeros(1)\norigin = x.random"),
]


def complaints(folder: Path, name: str, source: str) -> dict[str, list[str]]:
    path = folder / "secateur" / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = imports(path, folder)
    core = layer(module_name(path, folder)) == "core"
    return {
        "back": pointing_back(found),
        "impure": impure(path, folder) if core else [],
        "eager": too_eager(found),
        "undeclared": undeclared(found),
    }


@pytest.mark.parametrize(("name", "source", "check"), BROKEN, ids=[f"{c}-{n}" for n, _, c in BROKEN])
def test_a_violation_is_seen(tmp_path: Path, name: str, source: str, check: str) -> None:
    assert complaints(tmp_path, name, source)[check]


@pytest.mark.parametrize(("name", "source"), SOUND, ids=[n for n, _ in SOUND])
def test_what_is_allowed_passes(tmp_path: Path, name: str, source: str) -> None:
    assert not any(complaints(tmp_path, name, source).values())
