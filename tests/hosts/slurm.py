"""A SLURM cluster of two hosts: Debian's slurmctld and slurmd, without accounts and passwords."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.hosts.machines import Machines, two_machines

__all__ = ["Slurm", "slurm_cluster"]

_PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch")
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# A job that is requeued waits for as long.
AuthInfo=cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
MinJobAge=3600
KillWait=5
NodeName=node1 NodeAddr=10.77.0.1 CPUs=4
NodeName=node2 NodeAddr=10.77.0.2 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Runs jobs on two hosts.

    Args:
        machines: the hosts.
    """

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        folder = self._folder = machines.folder / "slurm"
        for each in ("state", "node1", "node2"):
            (folder / each).mkdir(parents=True)
        configuration = folder / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(folder=folder))
        machines.environment["SLURM_CONF"] = str(configuration)
        log = "slurm/daemons.log"
        machines.start("node1", "sh", "-c", "slurmctld -D & exec slurmd -D -N node1", output=log)
        machines.start("node2", "slurmd", "-D", "-N", "node2", output=log)
        assert eventually(self._is_ready, timeout_s=20.0), (folder / "daemons.log").read_text()

    def _is_ready(self) -> bool:
        return self._machines.run("node1", "sinfo", "--noheader", "--format", "%D %t")[1].strip() == "2 idle"

    def srun(self, *arguments: str, timeout_s: float = 120.0, **variables: str) -> tuple[int, str]:
        """Runs ``srun`` on node1; its status and what it has printed."""
        return self._machines.run("node1", "srun", *arguments, timeout_s=timeout_s, **variables)

    def submit(self, script: str, *options: str) -> str:
        """Hands in a batch script; the number of its job. What the job prints is in ``job.txt`` of the folder."""
        path = self._machines.folder / "job.sh"
        path.write_text("#!/bin/sh\n" + script)
        output = ("--output", str(self._machines.folder / "job.txt"), "--open-mode=append")
        status, printed = self._machines.run("node1", "sbatch", "--parsable", *output, *options, str(path))
        assert status == 0, printed
        return printed.strip().splitlines()[-1]

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job, such as ``JobState``."""
        _, printed = self._machines.run("node1", "scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", printed))

    def command(self, *command: str) -> str:
        """Runs one of SLURM's commands on node1; what it has printed."""
        status, printed = self._machines.run("node1", *command)
        assert status == 0, printed
        return printed


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[tuple[Slurm, Machines]]:
    """A cluster; skips the test where SLURM is not installed."""
    missing: Sequence[str] = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no SLURM here ({', '.join(missing)}): apt-get install slurm-wlm")
    with two_machines(folder) as machines:
        yield Slurm(machines), machines
