"""LeNet-5 on handwritten digits in Ray Train, with ranks that may be lost, come and go.

python recipes/ray_train.py --storage /shared/runs --workers 4
python recipes/ray_train.py --storage /shared/runs --workers 1-8 --max-failures 10
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

__all__ = ["main", "train"]

ROOT = Path(__file__).resolve().parents[1]


def train(config: dict[str, Any]) -> None:
    """What each of Ray's workers runs: an ordinary Trainer with the strategy for Ray.

    Args:
        config: the number of epochs, and the seconds that each rank sleeps in each of its batches.
    """
    import ray.train
    from lightning.pytorch import Trainer, seed_everything
    from ray.train.lightning import RayLightningEnvironment, prepare_trainer

    from lightning_async.ray import MidEpochReportCallback, RayAsyncAMSGradStrategy
    from recipes.callbacks import EmulatedStepTime
    from recipes.classifier import Classifier
    from recipes.digits import DigitsDataModule
    from recipes.models import LeNet5

    seed_everything(0)
    trainer = Trainer(
        max_epochs=config["epochs"],
        accelerator="auto",
        devices="auto",
        strategy=RayAsyncAMSGradStrategy(),
        plugins=[RayLightningEnvironment()],
        # A report after each validation: four in an epoch.
        val_check_interval=0.25,
        callbacks=[MidEpochReportCallback(), EmulatedStepTime(config["seconds_by_rank"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer = prepare_trainer(trainer)
    module, data = Classifier(LeNet5(), lr=2e-3), DigitsDataModule(batch_size=16)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.fit(module, data)
        return
    # Ray has started the ranks again, or others.
    with checkpoint.as_directory() as folder:
        trainer.fit(module, data, ckpt_path=os.path.join(folder, MidEpochReportCallback.CHECKPOINT_NAME))


def main() -> None:
    """Trains on the Ray cluster that there is, or on one that is started here."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="a folder or URI that all nodes can write to")
    parser.add_argument("--workers", default="4", help="how many, or a range of them such as 1-8")
    parser.add_argument("--max-failures", type=int, default=3, help="how often the run may be started again")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    options = parser.parse_args()
    least, _, most = options.workers.partition("-")

    # The workers find the recipes in this checkout.
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    result = TorchTrainer(
        train,
        train_loop_config={"epochs": options.epochs, "seconds_by_rank": [0.02, 0.02, 0.02, 0.08]},
        scaling_config=ScalingConfig(num_workers=(int(least), int(most)) if most else int(least), use_gpu=options.gpu),
        run_config=RunConfig(
            storage_path=options.storage, failure_config=FailureConfig(max_failures=options.max_failures)
        ),
    ).fit()
    print(result.metrics)


if __name__ == "__main__":
    main()
