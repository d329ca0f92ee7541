"""Whether NCCL accepts two ranks on one GPU here: ``NCCL_MULTI_RANK_GPU_ENABLE=1 python -m tests.gpu.share_probe``.

Its version and the driver decide; nothing tells but an attempt. With ``--stand-in`` Gloo on the host takes its place.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["main"]


def main() -> None:
    """Exits with 0 if two ranks can add up and send on one device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stand-in", action="store_true")
    stand_in: bool = parser.parse_args().stand_in
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = mp.spawn
        spawn(_rank, args=(f"file://{folder}/store", stand_in), nprocs=2)
    print("two ranks on one device added up and sent")


def _rank(rank: int, store: str, stand_in: bool) -> None:
    device = torch.device("cpu" if stand_in else "cuda:0")
    if not stand_in:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if stand_in else "nccl", store, timedelta(seconds=20), rank=rank, world_size=2)
    total = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(total)
    assert total.eq(3).all(), total
    payload = torch.full((1 << 16,), float(rank), device=device)
    if rank == 0:
        dist.recv(payload, 1)
        assert payload.eq(1).all(), payload
    else:
        dist.send(payload, 0)
    if not stand_in:
        torch.cuda.synchronize()
        print(f"rank {rank}: NCCL {torch.cuda.nccl.version()}, {os.environ.get('NCCL_MULTI_RANK_GPU_ENABLE')=}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
