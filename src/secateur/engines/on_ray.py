"""Jobs on Ray: a cluster, or this machine."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
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
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None
    except ray.exceptions.RayError as e:
        why = str(e).splitlines()[0]
        raise SecateurError(f"Ray gave a job up: {why} What was finished before is kept.") from e
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _there(work: bytes, path: list[str], folder: str) -> Any:
    sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
    os.chdir(folder)
    function, job = pickle.loads(work)  # only now, since what it names is found by the path
    return function(job)
