"""`async_amsgrad_notebook` where it is meant for: in a Jupyter kernel, with a module that only the notebook knows."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

REFUSED_CELL = """
from lightning.pytorch.utilities.exceptions import MisconfigurationException

try:
    Trainer(**(arguments | {"strategy": "async_amsgrad"}))
except MisconfigurationException as error:
    refusal = str(error)
'strategy="async_amsgrad_notebook"' in refusal, 'AsyncAMSGradStrategy(start_method="fork", ...)' in refusal
"""

CELLS = [
    """
import os
import time
import torch
import lightning_async
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import RandomDataset
from torch.utils.data import DataLoader
""",
    """
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        time.sleep((0.001, 0.004)[self.global_rank])
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.001, amsgrad=True)

    def on_fit_start(self):
        with open("pids", "a") as file:
            print(os.getpid(), file=file)

data = DataLoader(RandomDataset(32, 256), batch_size=8)
arguments = {"accelerator": "cpu", "devices": 2, "strategy": "async_amsgrad_notebook", "logger": False,
             "enable_checkpointing": False, "enable_progress_bar": False}
""",
    """
module = Module()
before = Trainer(**arguments).validate(module, data, verbose=False)[0]["loss"]
trainer = Trainer(max_epochs=2, **arguments)
trainer.fit(module, data)
trainer.strategy.stats.updates, sum(trainer.strategy.stats.updates_by_rank.values())
""",
    """
# The notebook's own module has learned, and goes on in another cell's fit.
between = Trainer(**arguments).validate(module, data, verbose=False)[0]["loss"]
Trainer(max_epochs=2, **arguments).fit(module, data)
after = Trainer(**arguments).validate(module, data, verbose=False)[0]["loss"]
before > between > after
""",
    REFUSED_CELL,
]


@pytest.mark.compatibility("Tools", "async_amsgrad_notebook in a Jupyter kernel")
def test_cells_train_a_module_of_the_notebook_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of what Jupyter's own packages do.
    warnings.simplefilter("ignore")
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = new_notebook(cells=[new_code_cell(text) for text in CELLS])
    client = NotebookClient(
        notebook, timeout=90, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )

    client.execute()

    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell["outputs"]
        if output["output_type"] == "execute_result"
    ]
    assert results == ["(64, 64)", "True", "(True, True)"]
    ranks = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(set(ranks)) == 4
    assert gone(ranks)


def gone(processes: list[int]) -> bool:
    """Whether the processes end within a few seconds."""
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{process}").exists() for process in processes)
