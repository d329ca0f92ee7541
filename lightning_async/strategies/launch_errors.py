"""What the launchers say: what cannot be started here, and what else a rank may wait for."""

from __future__ import annotations

import os

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.strategies.protocols import LaunchedStrategy
from lightning_async.strategies.registration import STRATEGIES

__all__ = ["describe_own_start", "no_script_here", "refuse_rank_without_device"]


def no_script_here(strategy: LaunchedStrategy, how: str) -> MisconfigurationException:
    """The refusal of a strategy whose ranks run the script, in a session that has none.

    Args:
        strategy: the strategy.
        how: how it starts its ranks, behind "by".
    """
    kind, name = type(strategy).__name__, strategy.strategy_name
    by_name = f'strategy="{name}_notebook", or with options ' if STRATEGIES.get(name) == kind else ""
    return MisconfigurationException(
        f"{kind} starts its ranks by {how}, and in an interactive session (a notebook, python -i) there is none. Take "
        f'{by_name}strategy={kind}(start_method="fork", ...), or run the code as a script.'
    )


def refuse_rank_without_device(local_rank: int, devices: int) -> None:
    """Refuses a process that Lightning has no device for, which would end in an IndexError.

    Args:
        local_rank: this process's number on its host.
        devices: number of devices of the Trainer.

    Raises:
        MisconfigurationException: if there is none.

    Examples:
        >>> refuse_rank_without_device(local_rank=1, devices=2)
    """
    if local_rank >= devices:
        hint = ""
        if "SLURM_HET_SIZE" in os.environ:
            hint = (
                " Where the components of a heterogeneous job have unlike numbers of tasks, put the one with the most "
                "tasks on a host last: srun gives all of them its --ntasks-per-node."
            )
        raise MisconfigurationException(
            f"This is process {local_rank + 1} of its host, and Trainer(devices={devices}) has no device for it. "
            f"Set devices to the largest number of ranks on one host.{hint}"
        )


def describe_own_start(num_nodes: int) -> str:
    """Why ranks that are started from here may not be there yet.

    Args:
        num_nodes: number of hosts.
    """
    if num_nodes == 1:
        return "they are started from here and may still be importing"
    return (
        f"those of this host are started from here and may still be importing; the script must run on all {num_nodes} "
        "hosts, with the same MASTER_ADDR and MASTER_PORT and with a NODE_RANK of its own"
    )
