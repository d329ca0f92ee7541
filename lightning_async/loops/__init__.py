"""Lightning's loops, callbacks and metrics in phases; private Lightning API is touched here and in the launchers only.

Lightning's public hooks cannot delimit the phases of an asynchronous epoch. The package pins Lightning's minor version,
and the canary tests fail when a name that is used here changes.
"""

from lightning_async.loops.installation import InstalledLoops, install
from lightning_async.loops.phase import Phase
from lightning_async.loops.protocols import Collectives, Coordinator

__all__ = ["Collectives", "Coordinator", "InstalledLoops", "Phase", "install"]
