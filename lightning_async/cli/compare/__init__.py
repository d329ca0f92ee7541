"""`lightning-async compare`: one recipe in several variants, with a table and plots.

Its callback `recorder.RunRecorder` runs inside the trainings; nothing but the command line imports the rest.
"""

from lightning_async.cli.compare.command import compare_main, compare_parser
from lightning_async.cli.compare.config import Comparison, Plot, Sweep, Variant

__all__ = ["Comparison", "Plot", "Sweep", "Variant", "compare_main", "compare_parser"]
