"""Which job of a scheduler this process belongs to, and whether the scheduler has started that job again."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

__all__ = ["RESTARTS_VARIABLE", "RUN_VARIABLE", "Job"]

# What `lightning-async run` tells its command, and any scheduler can: a name that no other job has, and how often it
# was started again.
RUN_VARIABLE, RESTARTS_VARIABLE = "LIGHTNING_ASYNC_RUN", "LIGHTNING_ASYNC_RESTART_COUNT"

# What torchrun calls a run that was given no name.
_NAMELESS = ("", "none")
_RUN = "lightning-async run"


@dataclass(frozen=True, slots=True)
class Job:
    """The job that a process belongs to, as its environment tells it.

    Args:
        torchrun: torchrun's name of the run, which users may give again to another one.
        agent: what one start of torchrun on one host has and no other: the folder of its logs.
        host: the host's name.
        slurm: SLURM's number of the job and of its step.
        restarted_by: the schedulers that have started it again.
        run: what ``LIGHTNING_ASYNC_RUN`` calls it.

    Examples:
        >>> first = Job(slurm="17.0")
        >>> again = Job(slurm="17.0", restarted_by=("SLURM",))
        >>> again.continues(first), again.continues(Job(slurm="16.0")), first.continues(first)
        (True, False, False)
    """

    torchrun: str = ""
    agent: str = ""
    host: str = ""
    slurm: str = ""
    restarted_by: tuple[str, ...] = ()
    run: str = ""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """The job of a process with these variables."""
        # .../AGENT/RUN_xyz/attempt_0/0/error.json
        error_file = PurePath(environment.get("TORCHELASTIC_ERROR_FILE", ""))
        agent = "/".join(error_file.parts[-5:-3]) if len(error_file.parts) > 5 else ""
        job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
        counters = {
            "torchrun": "TORCHELASTIC_RESTART_COUNT",
            "SLURM": "SLURM_RESTART_COUNT",
            _RUN: RESTARTS_VARIABLE,
        }
        return cls(
            torchrun=environment.get("TORCHELASTIC_RUN_ID", ""),
            agent=agent,
            host=socket.gethostname(),
            slurm=f"{job}.{step}" if step else job,
            restarted_by=tuple(by for by, name in counters.items() if environment.get(name, "0") not in ("", "0")),
            run=environment.get(RUN_VARIABLE, ""),
        )

    def state(self) -> dict[str, str]:
        """What a snapshot keeps of it."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, str)}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Job:
        """The job that `state` has put into a snapshot."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in known})

    def continues(self, earlier: Job) -> bool:
        """Whether this process was started to go on with what ``earlier`` has begun."""
        torchrun = "torchrun" in self.restarted_by and self._has_same_run(earlier)
        named = _RUN in self.restarted_by and bool(self.run) and self.run == earlier.run
        return torchrun or named or ("SLURM" in self.restarted_by and bool(self.slurm) and self.slurm == earlier.slurm)

    def _has_same_run(self, earlier: Job) -> bool:
        if self.torchrun != earlier.torchrun:
            return False
        if self.agent and self.agent == earlier.agent:
            return True
        # Rank 0 may have moved to another host, whose torchrun is another. On the same host it would be the same one.
        return self.torchrun not in _NAMELESS and (self.host != earlier.host or not self.agent)
