"""One slow rank of four: batches per second of async_amsgrad, of DDP, and the sum of what the ranks can do.

Run ``python -m benchmarks.straggler``. Step times are emulated by sleeping, so the result says how much of the ranks'
time the strategy gives away, not how fast this machine computes. There are two ideals: the sum of the sleeping rates,
which no training loop reaches, since the loop itself takes a while for each batch; and the sum of the rates that the
same loop reaches with each rank alone, on a single device with nobody to exchange anything with.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.emulated import LENET5_PARAMETERS, RESNET18_PARAMETERS, measure
from benchmarks.record import save


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[50, 50, 50, 200], help="step time of each rank")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each strategy runs")
    parser.add_argument("--parameters", type=int, nargs="+", default=[LENET5_PARAMETERS, RESNET18_PARAMETERS])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = [compare(parameters, arguments.step_ms, arguments.seconds) for parameters in arguments.parameters]
    save("straggler", vars(arguments), found)


def compare(parameters: int, step_ms: list[float], seconds: float) -> dict[str, Any]:
    """Batches per second of each strategy and of the two ideals, printed and returned."""
    step_s = [milliseconds / 1000 for milliseconds in step_ms]
    asleep = sum(1 / one for one in step_s)
    lockstep = len(step_s) / max(step_s)
    rates = {
        one: measure("auto", [one], int(seconds / 2 / one), parameters)["batches_per_second"]
        for one in sorted(set(step_s))
    }
    alone = sum(rates[one] for one in step_s)
    asynchronous = measure("async_amsgrad_fork", step_s, int(asleep * seconds), parameters)
    ddp = measure("ddp_fork", step_s, int(lockstep * seconds), parameters)

    print(f"{parameters:,} parameters, step times {step_ms} ms")
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
    return {"parameters": parameters, "batches_per_second": rows, "waiting": asynchronous["waiting"]}


if __name__ == "__main__":
    main()
