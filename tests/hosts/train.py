"""What a user's script would be, for the engines that start it; each rank leaves which samples it was trained on.

``python -m tests.hosts.train --devices 2 --nodes 2``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["SAMPLES", "seen_by_ranks", "trained_samples"]

SAMPLES = 64


def main(*words: str) -> None:
    """Trains as the command line says, and says so when it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", default="2")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--sleep-s", type=float, default=0.0)
    parser.add_argument("--strategy", default="{}", help="the strategy's arguments, as JSON")
    parser.add_argument("--faults", default="[]", help="what goes wrong, as JSON")
    parser.add_argument("--folder", type=Path, default=Path())
    train(parser.parse_args(list(words) or None))


def train(arguments: argparse.Namespace) -> None:
    """Trains with what the command line says."""
    import lightning as L

    from lightning_async import AsyncAMSGradStrategy
    from lightning_async.chaos import Fault, FaultInjector
    from tests.models import TinyClassifier, loader

    class Classifier(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # An epoch that is gone on with has no start.
            self.seen = self.seen or [[]]
            return super().training_step(batch, batch_idx)

    module = Classifier(sleep_s=(arguments.sleep_s,) * 16)
    recorder = record()
    strategy = AsyncAMSGradStrategy(**json.loads(arguments.strategy))
    strategy.observers.append(recorder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=arguments.devices if arguments.devices == "auto" else int(arguments.devices),
        num_nodes=arguments.nodes,
        strategy=strategy,
        max_epochs=arguments.epochs,
        callbacks=[recorder, FaultInjector([Fault(**fault) for fault in json.loads(arguments.faults)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=arguments.folder,
    )
    trainer.fit(module, loader(SAMPLES), loader(samples=24))
    left = {
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "local_rank": trainer.local_rank,
        "host": os.uname().nodename,
        "seen": module.seen,
        "applied": recorder.applied,
        "began": recorder.began,
        "ended": strategy.version,
    }
    (arguments.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(left))
    print(f"rank {trainer.global_rank} of {trainer.world_size} is done", flush=True)


def record() -> Any:
    """A callback and observer: the version that training began at, and on rank 0 the tickets of the updates made."""
    import lightning as L

    class Record(L.Callback):
        began = 0

        def __init__(self) -> None:
            self.applied: list[int] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.began = trainer.strategy.version
            print(f"rank {trainer.global_rank} trains", flush=True)

        def __call__(self, update: Any, tickets: tuple[int, ...]) -> None:
            self.applied += tickets

    return Record()


def seen_by_ranks(folder: Path) -> list[dict[str, Any]]:
    """What the ranks left, in their order."""
    left = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    return sorted(left, key=lambda one: int(one["rank"]))


def trained_samples(folder: Path, epoch: int = 0) -> Counter[int]:
    """How often each sample was trained on in an epoch, over all ranks."""
    return Counter(sample for one in seen_by_ranks(folder) for sample in one["seen"][epoch])


if __name__ == "__main__":
    main()
