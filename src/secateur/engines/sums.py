"""The other primitive: workers that all run the same function and add up counts on the way, each of its own share.

A sum is known by its number: the n-th that a worker asks for is the n-th of every other. So a worker that was killed can be
begun again: what was added up before is told to it at once, and its own part of that counts only once.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.errors import SecateurError

from .spread import begin, told

Result = TypeVar("Result")
Add = Callable[[Tensor], Tensor]
TRIES = 3
"""How often a worker is begun before it is given up."""
GONE = (
    f"a worker process ended {TRIES} times before it had anything to say: for want of memory perhaps, or because this program "
    'calls it outside of `if __name__ == "__main__":`.'
)


@dataclass
class Ledger:
    """Sums, by number, of what each of ``world`` workers adds.

    Example:
        >>> ledger = Ledger(2)
        >>> ledger.add(0, 1, torch.tensor([1, 2])), ledger.add(0, 0, torch.tensor([10, 20]))
        (None, tensor([11, 22]))
    """

    world: int
    sums: list[Tensor] = field(default_factory=list)
    _waiting: dict[int, Tensor] = field(default_factory=dict)

    def add(self, number: int, worker: int, counts: Tensor) -> Tensor | None:
        """Takes a worker's part of a sum; returns the sum if all parts are there.

        Raises:
            SecateurError: workers do not ask for the same sums.
        """
        if number < len(self.sums):
            return self.sums[number]
        if number > len(self.sums) or any(c.shape != counts.shape for c in self._waiting.values()):
            raise SecateurError("workers add up different things: a bug, or files that change meanwhile.")
        self._waiting[worker] = counts
        if len(self._waiting) < self.world:
            return None
        self.sums.append(torch.stack(list(self._waiting.values())).sum(0))
        self._waiting.clear()
        return self.sums[number]


def together(function: Callable[[int, int, Add], Result], workers: int) -> Result:
    """``function(worker, workers, add)`` in processes beside each other, of which all return the same; what the first returns.

    Args:
        function: of a module, or a ``partial`` of one, that can be pickled. ``add`` sums an int64 tensor over the workers, all
            of which ask for the same sums.
        workers: how many.

    Raises:
        SecateurError: what a worker raised; or one was killed time and again.
    """
    context = multiprocessing.get_context("spawn")
    ledger, running = Ledger(workers), {}

    def start(worker: int, tries: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(pickle.dumps(function), worker, workers, theirs, [*sys.path]), daemon=True
        )
        process.start()
        theirs.close()
        running[ours] = (worker, tries, process)

    answers: dict[int, Connection] = {}
    results: dict[int, Any] = {}
    try:
        for worker in range(workers):
            start(worker, 1)
        while len(results) < workers:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                worker, tries, _ = running[ready]
                kind, *rest = _said(ready)
                if kind == "ended":
                    del running[ready]
                    if worker not in results and tries == TRIES:
                        raise SecateurError(GONE)
                    if worker not in results:
                        start(worker, tries + 1)
                elif kind == "raised":
                    raise rest[0]
                elif kind == "result":
                    results[worker] = rest[0]
                else:
                    answers[worker] = ready
                    again = rest[0] < len(ledger.sums)  # of a worker that was begun again: the others are further on
                    if (total := ledger.add(rest[0], worker, torch.from_numpy(rest[1]))) is not None:
                        _answer(answers, [worker] if again else list(answers), total)
    finally:
        for _, _, process in running.values():
            process.terminate()
    return results[0]


def _said(pipe: Connection) -> tuple[Any, ...]:
    """What a worker says; that it ended, where it says nothing any more."""
    try:
        said: tuple[Any, ...] = pipe.recv()
    except (EOFError, OSError):
        return ("ended",)
    return said


def _answer(answers: dict[int, Connection], who: Sequence[int], total: Tensor) -> None:
    """Tells a sum to those who wait for it."""
    for worker in who:
        with suppress(OSError):  # it was killed meanwhile, and will ask again
            answers.pop(worker).send(total.numpy())


def _work(function: bytes, worker: int, workers: int, pipe: Connection, path: list[str]) -> None:
    begin(path)
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    number = 0

    def add(counts: Tensor) -> Tensor:
        nonlocal number
        pipe.send(("add", number, counts.numpy()))
        number += 1
        return torch.from_numpy(pipe.recv())

    try:
        result, _ = told(lambda f: f(worker, workers, add), pickle.loads(function))
        pipe.send(("result", result))
    except Exception as e:
        pipe.send(("raised", e))
    pipe.close()
