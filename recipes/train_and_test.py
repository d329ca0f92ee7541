"""Fit and then test in one process: `python -m recipes.train_and_test --config FILE ...`.

The subcommands of `lightning-async` do one of the two. What runs here takes the same options.
"""

from lightning_async.cli.app import AsyncCLI

if __name__ == "__main__":
    cli = AsyncCLI(run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.test(cli.model, datamodule=cli.datamodule)
