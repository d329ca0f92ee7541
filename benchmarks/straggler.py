"""One slow rank of four: batches per second of async_amsgrad, of DDP, and the sum of what the ranks can do.

Run ``python -m benchmarks.straggler``. Step times are emulated by sleeping, so the result says how much of the ranks'
time the strategy gives away, not how fast this machine computes. There are two ideals: the sum of the sleeping rates,
which no training loop reaches, since the loop itself takes a while for each batch; and the sum of the rates that the
same loop reaches with each rank alone, on a single device with nobody to exchange anything with.
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
    asleep = sum(1 / seconds for seconds in step_s)
    lockstep = len(step_s) / max(step_s)
    rates = {
        one: measure("auto", [one], int(arguments.seconds / 2 / one), arguments.parameters)["batches_per_second"]
        for one in sorted(set(step_s))
    }
    alone = sum(rates[one] for one in step_s)
    asynchronous = measure("async_amsgrad_fork", step_s, int(asleep * arguments.seconds), arguments.parameters)
    ddp = measure("ddp_fork", step_s, int(lockstep * arguments.seconds), arguments.parameters)

    print(f"{arguments.parameters:,} parameters, step times {arguments.step_ms} ms")
    print("                                  batches/s  of asleep  of alone")
    rows = {
        "ideal, ranks only sleep": asleep,
        "ideal, each rank alone": alone,
        "async_amsgrad": asynchronous["batches_per_second"],
        "ddp": ddp["batches_per_second"],
    }
    for name, rate in rows.items():
        print(f"{name:<32} {rate:>10.2f} {rate / asleep:>10.3f} {rate / alone:>9.3f}")
    print(f"async_amsgrad / ddp              {rows['async_amsgrad'] / rows['ddp']:>10.2f}")
    print(f"time in push and pull            {asynchronous['waiting']:>10.2%} of a rank's time")


if __name__ == "__main__":
    main()
