"""The diagnosis' estimate of what lock step would take, beside what DDP takes.

Run ``python -m benchmarks.lock_step``. Each scenario is trained with async_amsgrad, whose run gives the estimate, and
with DDP. Some ranks sleep, as on hardware of their own; others compute, and some of these share cores.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.emulated import LENET5_PARAMETERS, Step, measure
from benchmarks.record import save
from lightning_async.monitoring.lock_step import estimate
from lightning_async.runtime.cores import usable_cores

EQUAL, SLOWER = Step(products=100), Step(products=300)
SCENARIOS: dict[str, list[Step]] = {
    "equal, asleep": [Step(sleep_s=0.02)] * 4,
    "uneven, asleep": [Step(sleep_s=0.02)] * 3 + [Step(sleep_s=0.08)],
    "noisy, asleep": [Step(sleep_s=0.02, noise=0.5)] * 4,
    "equal, a core each": [EQUAL] * 2,
    "uneven, a core each": [EQUAL, SLOWER],
    "noisy, a core each": [Step(products=100, noise=0.5)] * 2,
    "equal, two a core": [EQUAL] * 4,
    "uneven, two a core": [EQUAL] * 3 + [SLOWER],
    "short steps, two a core": [Step(products=20)] * 4,
    "one sleeps, two a core": [EQUAL] * 3 + [Step(products=100, sleep_s=0.08)],
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each run lasts")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{usable_cores()} cores; how many times as long as async_amsgrad's the same batches take")
    print("scenario                   estimate        DDP  estimate / DDP")
    found = {
        name: compare(name, steps, arguments.seconds) for name, steps in SCENARIOS.items() if arguments.only in name
    }
    save("lock_step", vars(arguments), found)


def compare(name: str, steps: list[Step], seconds: float) -> dict[str, Any]:
    """One scenario, printed and returned."""
    first = measure("async_amsgrad_fork", steps, 100, LENET5_PARAMETERS)
    batches = max(200, int(first["batches_per_second"] * seconds))
    asynchronous = measure("async_amsgrad_fork", steps, batches, LENET5_PARAMETERS, with_facts=True)
    in_lock_step = measure("ddp_fork", steps, batches, LENET5_PARAMETERS)
    measured = asynchronous["batches_per_second"] / in_lock_step["batches_per_second"]
    found = estimate(asynchronous["facts"])
    told = f"{found.factor:.2f}" if found.known else "none"
    ratio = f"{found.factor / measured:.2f}" if found.known else ""
    print(f"{name:<26} {told:>8} {measured:>10.2f} {ratio:>15}   ({found.low:.2f} to {found.high:.2f})", flush=True)
    return {"low": found.low, "high": found.high, "known": found.known, "measured": measured}


if __name__ == "__main__":
    main()
