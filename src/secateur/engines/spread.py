"""One primitive: the results of a function over jobs, in the order of the jobs, whoever computes them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeVar

from secateur.errors import BadInput, SecateurError

Engine = Literal["serial", "processes", "ray"]
Job = TypeVar("Job")
Result = TypeVar("Result")
Told = tuple[Result, list[Warning]]


def spread(
    function: Callable[[Job], Result],
    stages: Sequence[Sequence[Job]],
    engine: Engine = "serial",
    workers: int = 1,
    gpus: int = 0,
) -> Iterator[Result]:
    """``function(job)`` for each job, in their order; what was warned of in a worker is warned of here.

    Args:
        function: of a module, so that a worker can import it; it gets a job that can be pickled.
        stages: what to do: the jobs of a stage do not depend on each other, and begin when the stage before is done.
        engine: ``"serial"``; ``"processes"``, begun afresh, none forked; ``"ray"``, on the cluster that ``RAY_ADDRESS`` names,
            or on this machine.
        workers: how many jobs run beside each other.
        gpus: GPUs that Ray sets aside for a job.

    Returns:
        The results, one by one; those that come early wait for their turn.

    Raises:
        BadInput: Ray is not installed; an unknown engine.
        SecateurError: what a job raised, once it is its turn; those that wait are not begun, those at work are ended. Also where
            a worker was killed from outside.

    Example:
        >>> list(spread(abs, [[3, -4], [-5]]))
        [3, 4, 5]
    """
    if engine not in ("serial", "processes", "ray") or workers < 1:
        raise BadInput(
            f"jobs run 'serial', in 'processes' or on 'ray', 1 or more at once; got {engine!r}, {workers!r}."
        )
    if engine == "serial":
        yield from map(function, chain.from_iterable(stages))
        return
    there = partial(told, function)
    if engine == "ray":
        from .on_ray import ray_results

        found = ray_results(there, stages, workers, gpus)
    else:
        found = _processes(there, stages, workers)
    for result, heard in found:
        for warning in heard:
            warnings.warn(warning, stacklevel=2)
        yield result


def told(function: Callable[[Job], Result], job: Job) -> Told[Result]:
    """A result and what was warned of, in a worker."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        result = function(job)
    return result, [w.message for w in heard if isinstance(w.message, Warning)]


def _processes(
    function: Callable[[Job], Told[Result]], stages: Sequence[Sequence[Job]], workers: int
) -> Iterator[Told[Result]]:
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin, ([*sys.path],))
    try:
        for jobs in stages:
            futures: list[Future[Told[Result]]] = [pool.submit(function, job) for job in jobs]
            for future in futures:
                yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise SecateurError(
            "a worker process was ended from outside, for want of memory perhaps; what was finished before is kept: go on with "
            "fewer at once."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in {*multiprocessing.active_children()} - others:
            child.terminate()


def begin(path: list[str]) -> None:
    """Readies a worker: it finds the modules that this process finds, and does not outlive it."""
    sys.path[:] = path
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
