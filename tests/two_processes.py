"""Runs a function in two gloo processes at once, for what torch.distributed shares between them."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=60)


def run_in_two_processes(work, folder: Path) -> list:
    """What ``work(0)`` and ``work(1)`` returned, each in a process of one group.

    ``work`` is a function of a module and returns tensors in plain containers; what it raises is raised here.
    A mismatch of collectives ends in a timeout.
    """
    mp.spawn(_process, (work, str(folder)), nprocs=2)
    return [torch.load(_result(str(folder), rank)) for rank in range(2)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"


def _process(rank: int, work, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=PATIENCE
    )
    torch.save(work(rank), _result(folder, rank))
    _leave(_result(folder, 1 - rank))


def _leave(others_result: Path) -> None:
    """Ends the process once neither needs the other.

    Gloo's threads abort a process whose peer leaves before them, and one whose interpreter is taken down
    while they run: so both wait for each other outside gloo, and neither takes its interpreter down.
    """
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not others_result.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the other process has not finished")
        time.sleep(0.01)
    os._exit(0)
