"""Which job of a scheduler this process belongs to, and whether the scheduler has started that job again."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any

__all__ = ["NEW_STARTS_VARIABLE", "RESTARTS_VARIABLE", "RUN_VARIABLE", "Job"]

# What `lightning-async run` tells its command, and any scheduler can: a name that no other job has, and how often it
# was started again.
RUN_VARIABLE, RESTARTS_VARIABLE = "LIGHTNING_ASYNC_RUN", "LIGHTNING_ASYNC_RESTART_COUNT"
# How often what has started the ranks has started all of them anew.
NEW_STARTS_VARIABLE = "LIGHTNING_ASYNC_NEW_STARTS"

# What torchrun calls a run that was given no name.
_NAMELESS = ("", "none")
_RUN, _LAUNCHER = "lightning-async run", "its launcher"


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
        agents: what ``agent`` is for each rank, once the ranks have told each other.

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
    agents: tuple[str, ...] = ()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """The job of a process with these variables."""
        # .../AGENT/RUN_xyz/attempt_0/0/error.json, or LOGS/RUN_xyz/attempt_0/0/error.json
        error_file = PurePath(environment.get("TORCHELASTIC_ERROR_FILE", ""))
        agent = "/".join(error_file.parts[:-3][-2:])
        job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
        counters = {
            "torchrun": "TORCHELASTIC_RESTART_COUNT",
            "SLURM": "SLURM_RESTART_COUNT",
            _RUN: RESTARTS_VARIABLE,
            _LAUNCHER: NEW_STARTS_VARIABLE,
        }
        return cls(
            torchrun=environment.get("TORCHELASTIC_RUN_ID", ""),
            agent=agent,
            host=socket.gethostname(),
            slurm=f"{job}.{step}" if step else job,
            restarted_by=tuple(by for by, name in counters.items() if environment.get(name, "0") not in ("", "0")),
            run=environment.get(RUN_VARIABLE, ""),
        )

    def among(self, everyone: Sequence[Job]) -> Job:
        """This process's job, with what each of its ranks knows of it: a torchrun counts its own restarts only."""
        restarted_by = tuple(sorted({by for job in everyone for by in job.restarted_by}, key=str.lower, reverse=True))
        agents = tuple(sorted({job.agent for job in everyone if job.agent}))
        return replace(self, restarted_by=restarted_by, agents=agents)

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps of it."""
        kept = asdict(self) | {"agents": list(self.agents)}
        del kept["restarted_by"]
        return kept

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Job:
        """The job that `state` has put into a snapshot."""
        known = {field.name for field in fields(cls)}
        job = cls(**{name: value for name, value in state.items() if name in known})
        return replace(job, agents=tuple(job.agents))

    def continues(self, earlier: Job) -> bool:
        """Whether this process was started to go on with what ``earlier`` has begun."""
        torchrun = self._has_same_agent(earlier) or ("torchrun" in self.restarted_by and self._has_same_run(earlier))
        by_name = _RUN in self.restarted_by or _LAUNCHER in self.restarted_by
        named = by_name and bool(self.run) and self.run == earlier.run
        return torchrun or named or ("SLURM" in self.restarted_by and bool(self.slurm) and self.slurm == earlier.slurm)

    def _has_same_agent(self, earlier: Job) -> bool:
        """Whether one start of torchrun has started ranks of both, whether it counts that as a restart or not."""
        mine, theirs = {self.agent, *self.agents}, {earlier.agent, *earlier.agents}
        return self.torchrun == earlier.torchrun and bool(mine & theirs - {""})

    def _has_same_run(self, earlier: Job) -> bool:
        # Rank 0 may have moved to another host, whose torchrun is another. On the same host it would be the same one.
        named = self.torchrun == earlier.torchrun and self.torchrun not in _NAMELESS
        return named and (self.host != earlier.host or not self.agent)
