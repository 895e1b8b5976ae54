"""Starts a program of these tests in several processes, as `torchrun` does, over gloo on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.guard.source import ROOT

TIMEOUT = 60
"""Seconds after which a process that waits for another gives up."""


def launch(program: str, world: int, folder: Path, *args: str) -> list[tuple[int, str]]:
    """Runs ``python -m program RANK WORLD FOLDER ARGS`` for every rank; the exit code and what each one said."""
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world):
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if rank == 3:  # counts by the torch twins, the others by the kernels
            env["SECATEUR_NATIVE"] = "0"
        command = [sys.executable, "-m", program, str(rank), str(world), str(folder), *args]
        log = (folder / f"log-{world}-{rank}").open("w")
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
        log.close()
    try:
        codes = [p.wait(timeout=1000) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(code, (folder / f"log-{world}-{rank}").read_text()) for rank, code in enumerate(codes)]


def join(rank: int, world: int, folder: Path) -> None:
    """Joins the group that processes of one folder form."""
    torch.set_num_threads(1)
    at = folder / f"port-{world}"
    if rank == 0:  # any free port, which the others read
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        at.with_suffix(".new").write_text(str(store.port))
        at.with_suffix(".new").rename(at)
    else:
        while not at.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(at.read_text()), world)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def run_all(cases: Mapping[str, Callable[[], None]]) -> dict[str, str]:
    """Runs cases in every process; of each, what went wrong in any, or nothing."""
    found = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        wrong, start = "", time.monotonic()
        try:
            case()
        except Exception:
            wrong = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        told = [""] * dist.get_world_size()
        dist.all_gather_object(told, wrong)
        found[name] = "\n".join(t for t in told if t)
        print(f"{time.monotonic() - start:6.2f} s {name}", flush=True)
    return found
