"""When overlap pays: batches per second with and without it, by transport and size of the model.

Run ``python -m benchmarks.overlap``. Ranks of one speed sleep their step time, which leaves the processor to the
exchange, as an accelerator would.
"""

from __future__ import annotations

import argparse
import functools
import os

from benchmarks.emulated import LENET5_PARAMETERS, RESNET18_PARAMETERS, measure
from benchmarks.record import save
from lightning_async import AsyncAMSGradStrategy


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--parameters", type=int, nargs="+", default=[LENET5_PARAMETERS, RESNET18_PARAMETERS])
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    step_s = arguments.step_ms / 1000
    batches = int(arguments.ranks * arguments.seconds / step_s)
    found = []
    print("parameters transport  plain, batches/s  overlap, batches/s  ratio")
    for parameters in arguments.parameters:
        for transport in arguments.transports:
            rates = [
                measure(
                    functools.partial(AsyncAMSGradStrategy, transport=transport, overlap=overlap, start_method="fork"),
                    [step_s] * arguments.ranks,
                    batches,
                    parameters,
                )["batches_per_second"]
                for overlap in (False, True)
            ]
            print(
                f"{parameters:>10} {transport:>9} {rates[0]:>17.2f} {rates[1]:>19.2f} {rates[1] / rates[0]:>6.3f}",
                flush=True,
            )
            found.append({"parameters": parameters, "transport": transport, "plain": rates[0], "overlap": rates[1]})
    save("overlap", vars(arguments), found)


if __name__ == "__main__":
    main()
