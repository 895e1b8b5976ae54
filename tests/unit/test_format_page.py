"""What docs/format.md shows reads what is written, with torch and safetensors alone."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.core.packed import DTYPES, encode
from secateur.runtime.codec import compress
from secateur.runtime.files import save_packed
from tests.guard.source import ROOT, text
from tests.unit.packing import ENCODED, bits_of, pruned, with_zstd

PAGE = text(ROOT / "docs" / "format.md")

# Whatever is imported besides, by torch or safetensors or on their behalf, it is not this package nor its other dependencies.
WITHOUT = """
import sys
for name in ("secateur", "zstandard", "pydantic", "yaml", "typer", "rich", "transformers"):
    sys.modules[name] = None
{reader}
from safetensors.torch import save_file
save_file(read(sys.argv[1]), sys.argv[2])
"""


def shown(fence: str) -> str:
    """The first block of a kind."""
    found = re.search(rf"^```{fence}\n(.*?)^```", PAGE, re.M | re.S)
    assert found is not None
    return found.group(1)


def test_the_reader_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    report = save_packed(pruned(), tmp_path / "p.safetensors")
    assert {r.name: r.encoding for r in report.packed} == ENCODED
    code = WITHOUT.format(reader=shown("python"))
    paths = [str(tmp_path / "p.safetensors"), str(tmp_path / "b.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits_of(load_file(tmp_path / "b.safetensors")) == bits_of(pruned())


def test_the_reader_is_short() -> None:
    assert len(shown("python").splitlines()) < 35


@with_zstd
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_codec_by_the_page(dtype: torch.dtype) -> None:
    """Each part of each encoding, by the function that the page shows."""
    names: dict[str, Any] = {"torch": torch}
    exec(compile(shown("py"), "format.md", "exec"), names)
    for name, encoding in (*ENCODED.items(), ("full.weight", "dense")):
        packed = encode(pruned()[name].to(dtype), encoding)
        for part, raw in compress(packed).items():
            wanted = packed.parts[part].reshape(-1)
            got: Tensor = names["part"](raw, wanted.dtype)
            if part == "starts":
                wanted = wanted.diff()
            if part == "columns":
                rows = [got.int()[a:b].cumsum(0) for a, b in pairwise(packed.parts["starts"].tolist())]
                got, wanted = torch.cat(rows), wanted.int()
            assert torch.equal(got, wanted), (name, part)
