"""What the engines are asked for, and the programs they run: a program under ``torchrun``, and workers that are killed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.carry_files import planned_there
from secateur.carry_stage import Job, rewritten_there
from secateur.files import Files
from secateur.stores import checkpoint
from secateur.stores.rewrite import Done

ENDS = {"first": "conv.weight", "last": "fc2.weight"}
CASES: dict[str, dict[str, Any]] = {
    "global": {"sparsity": 0.6},
    "uniform": {"sparsity": 0.6, "allocation": "uniform"},
    "erk": {"sparsity": 0.5, "allocation": "erk"},
    "lamp": {"sparsity": 0.6, "allocation": "lamp"},
    "uniform_plus": {"sparsity": 0.5, "allocation": "uniform_plus"},
    "mapping": {"sparsity": 0.5, "allocation": {"conv": 0.25, "fc*": 0.75}},
    "2:4": {"pattern": "2:4"},
    "4x4": {"sparsity": 0.4, "pattern": "4x4"},
    "channel": {"sparsity": 0.4, "pattern": "channel"},
    "threshold": {"threshold": 0.75},
    "random": {"sparsity": 0.6, "criterion": secateur.random(3)},
}
FLAG = "SECATEUR_TEST_FLAG"
"""A file that whoever is killed makes before, so that it happens once."""


def cut_into(nbytes: int) -> int:
    """What makes pieces of tensors as small as this, of a store that may take 32 MiB."""
    return (32 << 20) // nbytes


def prune(source: Path, out: Path, case: str, **how: Any) -> secateur.Report:
    """Prunes files as a case says; it warns of layers that lose everything."""
    ends = ENDS if case == "uniform_plus" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.errors.SecateurWarning)
        return secateur.prune(source, out=out, files=Files(**{"memory": 32 << 20, **ends, **how}), **CASES[case])


def _once() -> bool:
    try:
        Path(os.environ[FLAG]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def planned_and_killed(*args: Any) -> Any:
    """`planned_there`, of which worker 1 is killed at its third sum; begun again, it is not."""
    *given, worker, workers, add = args
    asked = 0

    def counted(counts: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if worker == 1 and asked == 3 and _once():
            os.kill(os.getpid(), signal.SIGKILL)
        return add(counts)  # type: ignore[no-any-return]

    return planned_there(*given, worker, workers, counted)


def rewritten_and_killed(job: Job) -> Done:
    """`rewritten_there`, killed in the third file, when half of it is there."""
    if "00003" in job.file and _once():
        job.target.write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return rewritten_there(job)


def killed_at_writing(done: int, total: int, file: str) -> None:
    """Ends rank 1 when its first file is done."""
    if os.environ["RANK"] == "1" and done:
        os.kill(os.getpid(), signal.SIGKILL)


def main(source: Path, folder: Path, cases: list[str], pieces: int, kill: bool) -> None:
    """One of several ranks: prunes in each of the ways, together with the others."""
    checkpoint._SHARES = cut_into(pieces)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    how = {"progress": killed_at_writing} if kill else {}
    for case in cases:
        prune(source, folder / case.replace(":", "of"), case, engine="torch", **how)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[5:], int(sys.argv[3]), sys.argv[4] == "kill")
