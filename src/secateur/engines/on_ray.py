"""Jobs on Ray: a cluster, or this machine."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import BadInput, SecateurError

Job = TypeVar("Job")
Result = TypeVar("Result")


def ray_results(
    function: Callable[[Job], Result], stages: Sequence[Sequence[Job]], workers: int, gpus: int = 0
) -> Iterator[Result]:
    """``function(job)`` for each job of each stage, in order, ``workers`` of them ahead.

    A job whose worker is killed is begun again by Ray. A worker finds this process's modules and working folder by their
    paths, so machines of a cluster share them.

    Raises:
        BadInput: Ray is not installed.
        SecateurError: Ray gave a job up.
    """
    with _connected(workers) as ray:
        yield from _results(ray, function, stages, workers, gpus)


@contextmanager
def _connected(workers: int) -> Iterator[Any]:
    """Ray, on the cluster that ``RAY_ADDRESS`` names or on this machine; its errors become ours."""
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise BadInput(
            "engine 'ray' needs the package ray, which is not installed: pip install 'secateur[ray]'."
        ) from None
    ours = not ray.is_initialized()
    if ours:
        here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **here)
    try:
        yield ray
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None
    except ray.exceptions.RayError as e:
        why = str(e).splitlines()[0]
        raise SecateurError(f"Ray gave a job up: {why} What was finished before is kept.") from e
    finally:
        if ours:
            ray.shutdown()


def _results(
    ray: Any, function: Callable[[Job], Result], stages: Sequence[Sequence[Job]], workers: int, gpus: int
) -> Iterator[Result]:
    work = ray.remote(num_cpus=1, num_gpus=gpus)(_there)
    waiting: list[Any] = []
    try:
        for jobs in stages:
            ahead = iter(jobs)
            for _ in jobs:
                for job in islice(ahead, workers - len(waiting)):
                    waiting.append(work.remote(pickle.dumps((function, job)), [*sys.path], str(Path.cwd())))
                yield ray.get(waiting[0])
                del waiting[0]
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _there(work: bytes, path: list[str], folder: str) -> Any:
    function, job = _opened(work, path, folder)
    return function(job)


def _opened(work: bytes, path: list[str], folder: str) -> Any:
    """What was sent to a worker, which finds modules and files where the sender does."""
    sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
    os.chdir(folder)
    return pickle.loads(work)  # only now, since what it names is found by the path


def together_on_ray(function: Callable[[int, int, Callable[[Any], Any]], Result], workers: int) -> Result:
    """`secateur.engines.sums.together`, with workers on Ray; one that is killed is begun again.

    Raises:
        BadInput: Ray is not installed.
        SecateurError: what a worker raised, or Ray gave it up.
    """
    with _connected(workers) as ray:
        ledger = ray.remote(num_cpus=0, max_concurrency=2 * workers)(_Sums).remote(workers)
        work = ray.remote(num_cpus=1, max_retries=3)(_adding)
        given = pickle.dumps(function), [*sys.path], str(Path.cwd())
        return ray.get([work.remote(ledger, w, workers, *given) for w in range(workers)])[0]


class _Sums:
    """The ledger of a plan, in a process of its own."""

    def __init__(self, workers: int) -> None:
        from threading import Condition

        from .sums import Ledger

        self._ledger, self._new = Ledger(workers), Condition()

    def add(self, number: int, worker: int, counts: Any) -> Any:
        """A worker's part of a sum; returns the sum as soon as it is there."""
        import torch

        with self._new:
            total = self._ledger.add(number, worker, torch.from_numpy(counts.copy()))
            if total is None:
                self._new.wait_for(lambda: len(self._ledger.sums) > number)
                total = self._ledger.sums[number]
            else:
                self._new.notify_all()
        return total.numpy()


def _adding(ledger: Any, worker: int, workers: int, work: bytes, path: list[str], folder: str) -> Any:
    function = _opened(work, path, folder)
    import ray
    import torch

    number = 0

    def add(counts: Any) -> Any:
        nonlocal number
        total = ray.get(ledger.add.remote(number, worker, counts.numpy()))
        number += 1
        return torch.from_numpy(total.copy())

    return function(worker, workers, add)
