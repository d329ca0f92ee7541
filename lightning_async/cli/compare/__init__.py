"""`lightning-async compare`: one recipe in several variants, with a table and plots.

Rooms, from the top: `command.py`, `plots.py`, `tables.py`, `results.py`, `epoch_plan.py`, `config.py`; `runner.py` and
`recorder.py` (which runs inside the training) stand by themselves.
"""

from lightning_async.cli.compare.command import compare_main, compare_parser
from lightning_async.cli.compare.config import Comparison, Plot, Sweep, Variant

__all__ = ["Comparison", "Plot", "Sweep", "Variant", "compare_main", "compare_parser"]
