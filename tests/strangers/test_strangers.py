"""Other people's projects, as their documentation has them, with the strategy changed and nothing else.

Opt-in (``make strangers``): they come with large requirements. What they warn of is theirs.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_async import AsyncAMSGradStrategy
from recipes.callbacks import EmulatedStepTime
from tests.launch import launch
from tests.models import fork_trainer

pytestmark = [pytest.mark.strangers, pytest.mark.timeout(300)]

RANKS = 2
# Seconds that each rank sleeps in each of its batches.
UNEVEN = EmulatedStepTime([0.0, 0.03])


@pytest.mark.parametrize(
    ("name", "batches"), [("NBeats", "shared"), ("NBeats", "sharded"), ("TemporalFusionTransformer", "shared")]
)
def test_pytorch_forecasting_learns_an_autoregressive_series(tmp_path: Path, name: str, batches: Any) -> None:
    def script(folder: Path) -> None:
        warnings.simplefilter("ignore")
        import pytorch_forecasting
        from pytorch_forecasting.data import NaNLabelEncoder, TimeSeriesDataSet
        from pytorch_forecasting.data.examples import generate_ar_data

        series = generate_ar_data(seasonality=10.0, timesteps=60, n_series=20, seed=42)
        data = TimeSeriesDataSet(
            series,
            time_idx="time_idx",
            target="value",
            group_ids=["series"],
            categorical_encoders={"series": NaNLabelEncoder().fit(series.series)},
            time_varying_unknown_reals=["value"],
            max_encoder_length=20,
            max_prediction_length=5,
        )
        train = data.to_dataloader(train=True, batch_size=32, num_workers=0)
        validate = data.to_dataloader(train=False, batch_size=32, num_workers=0)
        model = getattr(pytorch_forecasting, name).from_dataset(data, learning_rate=1e-2)
        losses: list[float] = []
        for epochs in (0, 3):
            strategy = AsyncAMSGradStrategy(start_method="fork", batches=batches)
            arguments: Any = {"max_epochs": epochs, "gradient_clip_val": 0.1, "callbacks": [UNEVEN]}
            trainer = fork_trainer(folder, RANKS, strategy, **arguments)
            if epochs:
                trainer.fit(model, train, validate)
            (metrics,) = trainer.validate(model, validate)
            losses.append(metrics["val_loss"])
        result = {"losses": losses, "updates": trainer.strategy.stats.updates, "batches": len(train)}
        torch.save(result, folder / "result.pt")

    run = launch(script, tmp_path, timeout_s=240)

    assert run.returncode == 0, run.output
    result = torch.load(tmp_path / "result.pt")
    before, after = result["losses"]
    assert result["updates"] == 3 * result["batches"]
    assert after < before


def test_scvi_learns_synthetic_cells(tmp_path: Path) -> None:
    # scvi-tools knows a distributed strategy by its class or by "ddp" in its name, hence the object.
    def script(folder: Path) -> None:
        warnings.simplefilter("ignore")
        import scvi

        cells = scvi.data.synthetic_iid(batch_size=100, n_genes=50)
        scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.SCVI(cells, n_latent=5)
        strategy: Any = AsyncAMSGradStrategy(start_method="fork")
        errors: list[float] = []
        model.is_trained_ = True  # Else it does not evaluate what is untrained.
        errors.append(float(model.get_reconstruction_error()["reconstruction_loss"]))
        model.train(
            max_epochs=20,
            accelerator="cpu",
            devices=RANKS,
            strategy=strategy,
            callbacks=[UNEVEN],
            batch_size=32,
            train_size=0.8,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        errors.append(float(model.get_reconstruction_error()["reconstruction_loss"]))
        torch.save({"errors": errors, "updates": model.trainer.strategy.stats.updates}, folder / "result.pt")

    run = launch(script, tmp_path, timeout_s=240)

    assert run.returncode == 0, run.output
    result = torch.load(tmp_path / "result.pt")
    before, after = result["errors"]
    # 160 cells: 3 batches for each rank.
    assert result["updates"] == 20 * RANKS * math.ceil(160 / RANKS / 32)
    assert after < before
