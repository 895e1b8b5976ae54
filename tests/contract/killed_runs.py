"""Runs a recipe to its end, and again with kills on the way; prints how each process ended.

A program of its own: it forks children that are ``secateur run`` and end by SIGKILL, after a random while or at their n-th
file operation.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cli import main
from tests.contract.killed import deadly

HERE = "tests.contract.killed_runs"
RECIPE = f"""
name: killed
folder: unnamed
seeds: [0]
data: "{HERE}:data"
model: "{HERE}:network"
train: {{epochs: 3, optimizer: {{call: "torch.optim:SGD", args: {{lr: 0.1, momentum: 0.9, weight_decay: 0.01}}}}}}
sparsities: [0.5, 0.75]
methods:
  one-shot: {{prune: {{}}, finetune: {{epochs: 2}}}}
  gradual:
    prune: {{schedule: gradual}}
    finetune: {{epochs: 1}}
    train: {{epochs: 2, regularize: {{kind: l1, strength: 0.001}}}}
  from dense: {{prune: {{schedule: gradual, start: dense}}, finetune: {{epochs: 2}}, train: {{epochs: 2}}}}
  tickets: {{iterate: {{rewind: 4, rounds: 1, epochs: 2, controls: [reinit, random]}}}}
  rewound rates: {{iterate: {{rewind: lr, rounds: 1, epochs: 2, controls: [random]}}}}
  rigl: {{sparse: {{every: 2}}}}
export: {{method: gradual, sparsity: 0.75}}
"""


class Data:
    """Noise, and the sign of a part of it."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(96, 8, generator=g)
        self.y = (self.x[:, 0] > 0).long()
        self.test = self.x, self.y

    def train(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        return [(self.x[i], self.y[i]) for i in torch.randperm(len(self.y), generator=generator).split(16)]


def data(seed: int) -> Data:
    return Data(seed)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def begin(words: Sequence[str], first: Callable[[], None] | None) -> int:
    """``secateur`` in a child, without its output; its number. What comes ``first`` needs a fork of this process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    if first is None:
        actions = [(os.POSIX_SPAWN_DUP2, quiet, 1)]
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-m", "secateur.cli", *words], os.environ, file_actions=actions
        )
        os.close(quiet)
        return pid
    pid = os.fork()
    if pid:
        os.close(quiet)
        return pid
    code: Any = 1
    try:
        os.dup2(quiet, 1)
        first()
        sys.argv = ["secateur", *words]
        main()
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """How a child ended: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def lives(pid: int) -> bool:
    """Whether a child is still at work."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def sizes(folder: Path) -> dict[str, int]:
    """What lies in a folder, while others move it about."""
    found = {}
    for where, _, names in os.walk(folder):
        for path in (Path(where) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[str(path)] = path.stat().st_size
    return found


class Runs:
    """``secateur run --resume`` of one recipe into one folder, over and over."""

    def __init__(self, recipe: Path, folder: Path, fork: bool, jobs: int) -> None:
        self._folder, self._fork = folder, fork
        self._words = ["run", str(recipe), "--resume", "--json", "--set", f"folder={folder}", "--jobs", str(jobs)]

    def begin(self, first: Callable[[], None] = lambda: None) -> int:
        """A run; its number."""
        return begin(self._words, first if self._fork else None)

    def at_work(self) -> int:
        """A run that has written something."""
        before = sizes(self._folder)
        pid = self.begin()
        while sizes(self._folder) == before and lives(pid):
            time.sleep(0.001)
        return pid

    def killed_after(self, seconds: float) -> int:
        """How a run ended that is killed so long after it has written something, if it is not at its end by then."""
        pid = self.at_work()
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return end_of(pid)

    def at_operations(self) -> list[int]:
        """Kills the first at its first file operation, the next at its second, until one comes to its end."""
        endings: list[int] = []
        while not endings or endings[-1] == -signal.SIGKILL:
            endings.append(end_of(self.begin(partial(deadly, len(endings) + 1))))
        return endings


def told_of(root: Path, fork: bool, kills: int | None, seed: int, jobs: int) -> list[list[int]]:
    """Runs left alone into ``0``, and killed into ``1`` and, where that is at its end too soon, ``2`` and so on; how the
    processes for each ended. It kills so many times at random, or at file operations (``None``); those that are killed have
    so many workers, the one left alone has none."""
    (root / "recipe.yaml").write_text(RECIPE, "utf-8")

    def into(number: int) -> Runs:
        return Runs(root / "recipe.yaml", root / str(number), fork, jobs if number else 1)

    pid, started = into(0).at_work(), time.perf_counter()
    endings = [[end_of(pid)]]
    seconds = time.perf_counter() - started
    if kills is None:
        return [*endings, into(1).at_operations()]
    draw, left = random.Random(seed), kills
    while left and endings[-1][-1] in (0, -signal.SIGKILL):
        if endings[-1][-1] != -signal.SIGKILL:
            endings.append([])
        endings[-1].append(into(len(endings) - 1).killed_after(draw.uniform(0, 2 * seconds / kills)))
        left -= endings[-1][-1] == -signal.SIGKILL
    endings[-1].append(end_of(into(len(endings) - 1).begin()))
    return endings


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.SGD(network().parameters())  # imports, once for all, what takes seconds
    print(json.dumps(told_of(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
