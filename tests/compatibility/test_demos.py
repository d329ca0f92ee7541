"""Lightning's own demos learn on synthetic text; they are as their authors wrote them, but for SGD."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer, WikiText2
from torch.utils.data import DataLoader

from tests.launch import launch, report
from tests.models import fork_trainer

RANKS = 2
WORDS = 12


class Watch(Callback):
    """Slows one rank down and reports the losses of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = torch.cat([parameter.detach().reshape(-1) for parameter in pl_module.parameters()])
        version = trainer.strategy.version  # type: ignore[attr-defined]
        report(self.folder, trainer.global_rank, losses=self.losses, parameters=parameters, version=version)


def write_text(folder: Path) -> None:
    """Text where the demos look for theirs: each word says which one comes next."""
    (folder / "data").mkdir()
    generator = random.Random(3)
    lines = [
        " ".join(f"w{(start + step) % WORDS}" for step in range(40)) for start in generator.choices(range(WORDS), k=30)
    ]
    (folder / "data" / "wikitext-2.txt").write_text("\n".join(lines))


def boring() -> tuple[LightningModule, Any]:
    return BoringModel(), BoringDataModule()


def transformer() -> tuple[LightningModule, Any]:
    text = WikiText2(download=False)
    module = LightningTransformer(vocab_size=text.vocab_size)
    module.model = Transformer(text.vocab_size, ninp=32, nhead=2, nhid=32, nlayers=1, dropout=0.0)
    return module, None


def lstm() -> tuple[LightningModule, Any]:
    text = WikiText2(download=False)
    module = LightningLSTM(vocab_size=text.vocab_size)
    module.model = SimpleLSTM(text.vocab_size, ninp=32, nhid=32, nlayers=1)
    return module, DataLoader(text, batch_size=4, drop_last=True)


@pytest.mark.compatibility(
    "Tools",
    "Lightning's demos: BoringModel, the Transformer, the LSTM",
    note="With Adam(amsgrad=True) in the place of their SGD.",
)
@pytest.mark.parametrize(("make", "lr"), [(boring, 1e-2), (transformer, 3e-3), (lstm, 1e-2)])
def test_a_demo_of_lightning_learns(tmp_path: Path, make: Callable[[], tuple[LightningModule, Any]], lr: float) -> None:
    write_text(tmp_path)

    def script(folder: Path) -> None:
        # Of torch's about the Transformer's fast path, and Lightning's about loaders without workers.
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        module, data = make()
        # The demos return SGD.
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=lr, amsgrad=True)
        trainer = fork_trainer(folder, RANKS, max_epochs=4, callbacks=[Watch(folder)], limit_val_batches=1)
        if isinstance(data, LightningDataModule):
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, data)

    run = launch(script, tmp_path)

    assert run.returncode == 0, run.output
    ranks = run.reports()
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert {rank["version"] for rank in ranks} == {sum(len(rank["losses"]) for rank in ranks)}
    first, last = (sum(sum(rank["losses"][part]) for rank in ranks) for part in (slice(4), slice(-4, None)))
    assert last < 0.5 * first
