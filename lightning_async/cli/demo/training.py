"""One of the demo's trainings: fit and then test in one process, `python -m lightning_async.cli.demo.training`.

The subcommands of `lightning-async` do one of the two. What runs here takes the same options.
"""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_async.cli.app import AsyncCLI, add_working_directory_to_path
from lightning_async.cli.errors import told_in_one_line

__all__ = ["TestMetrics"]


class TestMetrics(Callback):
    """Write the metrics of a test as JSON.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, on rank 0."""
        if trainer.is_global_zero:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self.path.write_text(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    add_working_directory_to_path()
    with told_in_one_line():
        cli = AsyncCLI(run=False)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        cli.trainer.test(cli.model, datamodule=cli.datamodule)
