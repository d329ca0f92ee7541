"""Time to a validation accuracy on digits, one of four ranks four times slower: async_amsgrad against DDP.

Run ``python -m benchmarks.time_to_accuracy``. The recipe, its learning rate and its seeds are the same for both, unless
``--ddp-lr`` gives DDP another learning rate: it makes one update where four ranks make four, and takes larger ones.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.record import save
from lightning_async.cli.compare.progress import RunsDisplay
from lightning_async.cli.demo.command import train

RECIPE = Path("recipes/lenet5_digits.yaml")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threshold", type=float, default=0.97)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--ddp-lr", type=float, help="learning rate of DDP; the recipe's by default")
    parser.add_argument("--out", type=Path, default=Path("demo_results/time_to_accuracy"))
    arguments = parser.parse_args()
    found = []
    for seed in arguments.seeds:
        out = arguments.out / f"seed{seed}"
        out.mkdir(parents=True, exist_ok=True)
        extra = [f"--seed_everything={seed}", f"--trainer.max_epochs={arguments.epochs}"]
        own = [] if arguments.ddp_lr is None else [f"--model.init_args.lr={arguments.ddp_lr}"]
        with RunsDisplay(2) as display:
            runs = {
                strategy: train(strategy, out, display, [*extra, *more], RECIPE, threshold=arguments.threshold)
                for strategy, more in (("async_amsgrad", []), ("ddp", own))
            }
        seconds = {strategy: run.seconds_to_threshold for strategy, run in runs.items()}
        found.append({"seed": seed, **seconds})
        ours, theirs = seconds.values()
        ratio = f"{ours / theirs:.2f}" if ours and theirs else "-"
        shown = ", ".join(f"{name} {value and round(value, 1)} s" for name, value in seconds.items())
        print(f"seed {seed}: {arguments.threshold:.0%} after {shown}; ratio {ratio}", flush=True)
    ratios = [row["async_amsgrad"] / row["ddp"] for row in found if row["async_amsgrad"] and row["ddp"]]
    if ratios:
        print(f"median ratio {statistics.median(ratios):.2f} over {len(ratios)} seeds")
    name = "time_to_accuracy" if arguments.ddp_lr is None else "time_to_accuracy_ddp_lr"
    save(name, {**vars(arguments), "out": str(arguments.out)}, found)


if __name__ == "__main__":
    main()
