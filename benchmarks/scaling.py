"""Many ranks of one speed: speed-up over one rank, and how long the ranks take to start, beside DDP.

Run ``python -m benchmarks.scaling``. Step times are emulated by sleeping, so ranks need no processor to compute with;
what is measured is how far the holder and the machine's cores carry Lightning's loops.
"""

from __future__ import annotations

import argparse
import os

from benchmarks.emulated import LENET5_PARAMETERS, measure
from benchmarks.record import save


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--step-ms", type=float, default=50.0, help="step time of every rank")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long each strategy runs")
    parser.add_argument("--parameters", type=int, default=LENET5_PARAMETERS)
    parser.add_argument("--ddp-ranks", type=int, nargs="*", default=[1, 4, 16])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    step_s = arguments.step_ms / 1000
    found = []
    print("strategy       ranks  batches/s  speed-up  in push and pull  start, s")
    for strategy, sizes in (("async_amsgrad_fork", arguments.ranks), ("ddp_fork", arguments.ddp_ranks)):
        alone = None
        for ranks in sizes:
            batches = int(ranks * arguments.seconds / step_s)
            result = measure(strategy, [step_s] * ranks, batches, arguments.parameters)
            rate = result["batches_per_second"]
            alone = alone or rate / ranks
            waiting = f"{result['waiting']:.2%}" if "waiting" in result else "-"
            name = strategy.removesuffix("_fork")
            print(
                f"{name:<14} {ranks:>5} {rate:>10.1f} {rate / alone:>9.2f} {waiting:>17} {result['start_s']:>9.1f}",
                flush=True,
            )
            found.append({"strategy": name, "ranks": ranks, "speed_up": rate / alone, **result})
    save("scaling", vars(arguments), found)


if __name__ == "__main__":
    main()
