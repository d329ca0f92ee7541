"""What the launchers say: what cannot be started here, and what else a rank may wait for."""

from __future__ import annotations

import os
import re

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async.strategies.protocols import LaunchedStrategy
from lightning_async.strategies.registration import STRATEGIES

__all__ = ["describe_own_start", "describe_refused_peer", "no_script_here", "refuse_rank_without_device"]


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


def describe_refused_peer(error: str, num_nodes: int) -> str | None:
    """What to set where torch's process group of another host cannot be reached; None for any other error.

    Args:
        error: what torch said.
        num_nodes: number of hosts.

    Examples:
        >>> print(describe_refused_peer("Gloo connectFullMesh failed: refused, remote=[127.0.1.1]:1783", num_nodes=2))
        this rank was told to reach another one at 127.0.1.1, which leads back to this host: that host's own name \
stands for it there, as Debian's /etc/hosts has it. Set GLOO_SOCKET_IFNAME to the interface that the hosts share, such \
as eth0, on every host (docs/cluster.md)
        >>> describe_refused_peer("out of memory", num_nodes=2)
    """
    if num_nodes == 1 or "connectFullMesh" not in error:
        return None
    advice = "Set GLOO_SOCKET_IFNAME to the interface that the hosts share, such as eth0, on every host"
    remote = re.search(r"remote=\[([^\]]*)\]", error)
    if remote is not None and remote[1].startswith(("127.", "::1", "::ffff:127.")):
        return (
            f"this rank was told to reach another one at {remote[1]}, which leads back to this host: that host's own "
            f"name stands for it there, as Debian's /etc/hosts has it. {advice} (docs/cluster.md)"
        )
    where = "" if remote is None else f" at {remote[1]}"
    return (
        f"this rank cannot reach another one's process group{where}: that rank has ended, a firewall is between them, "
        f"or it listens at an interface that this host does not share. {advice} (docs/cluster.md)"
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
