"""Pickled checkpoints, only where the user says so: they run code when they are opened carelessly."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import BadInput

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@contextmanager
def as_files(path: Path, allow_pickle: bool) -> Iterator[Path]:
    """The path itself, or for a pickled checkpoint a safetensors file of its tensors that is there inside the block.

    The pickle is read by another process, with ``weights_only=True``: what goes wrong there goes wrong there.

    Raises:
        BadInput: a pickled checkpoint without ``--allow-pickle``, or one that holds more than tensors.
    """
    if path.suffix not in PICKLED or not path.is_file():
        yield path
        return
    if not allow_pickle:
        raise BadInput(
            f"{path.name} is a pickled checkpoint, and a pickle can run code. If you trust it, say --allow-pickle (it is "
            "read with weights_only=True); the result is a .safetensors file either way."
        )
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        made = Path(folder) / f"{path.stem}.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(path), str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"the process that read it ended with {done.returncode}"]
            raise BadInput(lines[-1] if done.returncode == REFUSED else f"{path.name} cannot be read: {lines[-1]}")
        yield made


REFUSED = 3


def convert(path: Path, out: Path) -> None:
    """Writes the tensors of a pickled checkpoint as a safetensors file; tied tensors under each of their names.

    Raises:
        BadInput: it holds more than tensors, or cannot be read without running code.
    """
    import torch
    from safetensors.torch import save_file
    from torch import Tensor

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as e:
        raise BadInput(
            f"{path.name} cannot be read with weights_only=True: {(str(e) or repr(e)).splitlines()[0]}"
        ) from e
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise BadInput(
            f"{path.name} does not hold a dict of tensors; load it yourself and pass the model to secateur.prune."
        )
    save_file({n: t.detach().contiguous().clone() for n, t in found.items()}, out, metadata={"format": "pt"})


def _can_be_mapped(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(4) == b"PK\x03\x04"


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except BadInput as e:
        print(str(e).replace("\n", " "), file=sys.stderr)
        raise SystemExit(REFUSED) from None
