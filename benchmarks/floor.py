"""A round trip over shared memory against what it cannot do without: the update and one copy of the parameters.

Run ``python -m benchmarks.floor``. The floor is measured in the same run, in one thread: the fused AMSGrad kernel and
the copy. Beside it stand the bytes that they move (36 and 8 a parameter) and the memory bandwidth that this makes.
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks.ceiling import gradients_per_second
from benchmarks.kernel import floor_seconds
from benchmarks.processes import SHAPES
from benchmarks.record import save

_KERNEL_BYTES, _COPY_BYTES = 36, 8


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["44K", "11.2M", "100M"], choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found = []
    print("parameters  kernel, ms  copy, ms  GB/s  round trip, ms  over update + copy")
    for size in arguments.sizes:
        kernel_s, copy_s = floor_seconds(SHAPES[size])
        trip_s = 1 / gradients_per_second(SHAPES[size], 1, "shm", arguments.seconds)
        numel = sum(torch.Size(shape).numel() for shape in SHAPES[size])
        bandwidth = numel * (_KERNEL_BYTES + _COPY_BYTES) / (kernel_s + copy_s) / 1e9
        ratio = trip_s / (kernel_s + copy_s)
        print(
            f"{size:>10} {kernel_s * 1e3:>11.3f} {copy_s * 1e3:>9.3f} {bandwidth:>5.1f} {trip_s * 1e3:>15.3f} "
            f"{ratio:>19.2f}",
            flush=True,
        )
        found.append({"size": size, "kernel_s": kernel_s, "copy_s": copy_s, "round_trip_s": trip_s, "ratio": ratio})
    save("floor", vars(arguments), found)


if __name__ == "__main__":
    main()
