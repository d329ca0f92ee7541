"""One slow rank of four: batches per second of async_amsgrad, of DDP, and the sum of what the ranks can do.

Run ``python -m benchmarks.straggler``. Step times are emulated by sleeping, so the result says how much of the ranks'
time the strategy gives away, not how fast this machine computes.
"""

from __future__ import annotations

import argparse
import os

from benchmarks.emulated import LENET5_PARAMETERS, measure


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[50, 50, 50, 200], help="step time of each rank")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each strategy runs")
    parser.add_argument("--parameters", type=int, default=LENET5_PARAMETERS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    step_s = [milliseconds / 1000 for milliseconds in arguments.step_ms]
    ideal = sum(1 / seconds for seconds in step_s)
    lockstep = len(step_s) / max(step_s)
    asynchronous = measure("async_amsgrad_fork", step_s, int(ideal * arguments.seconds), arguments.parameters)
    ddp = measure("ddp_fork", step_s, int(lockstep * arguments.seconds), arguments.parameters)

    rate, ddp_rate = asynchronous["batches_per_second"], ddp["batches_per_second"]
    print(f"{arguments.parameters:,} parameters, step times {arguments.step_ms} ms")
    print(f"ideal (sum of the ranks' rates)  {ideal:7.2f} batches/s")
    print(f"async_amsgrad                    {rate:7.2f} batches/s   {rate / ideal:.3f} of ideal")
    print(f"ddp                              {ddp_rate:7.2f} batches/s   {ddp_rate / ideal:.3f} of ideal")
    print(f"async_amsgrad / ddp              {rate / ddp_rate:7.2f}")
    print(f"time in push and pull            {asynchronous['waiting']:7.2%} of a rank's time")


if __name__ == "__main__":
    main()
