"""A job goes on from what it has left itself, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_async.runtime.job import Job


def torchrun(restarts: int = 1, run: str = "none", agent: str = "torchelastic_a/none_a", host: str = "here") -> Job:
    variables = {
        "TORCHELASTIC_RUN_ID": run,
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_ERROR_FILE": f"/tmp/{agent}/attempt_{restarts}/0/error.json" if agent else "",
    }
    return on(host, Job.of_environment(variables))


def slurm(job: str, restarts: int = 1, **variables: str) -> Job:
    return Job.of_environment({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts), **variables})


def named(run: str, restarts: int = 1) -> Job:
    return Job.of_environment({"LIGHTNING_ASYNC_RUN": run, "LIGHTNING_ASYNC_RESTART_COUNT": str(restarts)})


def on(host: str, job: Job) -> Job:
    return replace(job, host=host)


@pytest.mark.parametrize(
    ("now", "earlier", "continues"),
    [
        # The agent starts its ranks again, and its folder of logs stays.
        (torchrun(1), torchrun(0), True),
        (torchrun(2), torchrun(1), True),
        # It counts the restarts that it has begun itself, not those that another host's has asked it for.
        (torchrun(0), torchrun(0), True),
        (torchrun(0), torchrun(0, agent="torchelastic_b/none_b"), False),
        # Another start of torchrun, whose runs are all called "none", or as the user likes.
        (torchrun(1), torchrun(0, agent="torchelastic_b/none_b"), False),
        (torchrun(1, run="mine"), torchrun(0, run="mine", agent="torchelastic_b/mine_b"), False),
        (torchrun(1, run="mine"), torchrun(0, run="other"), False),
        # Rank 0 is on another host than before.
        (torchrun(1, run="mine"), torchrun(0, run="mine", agent="torchelastic_b/mine_b", host="there"), True),
        (torchrun(1), torchrun(0, agent="torchelastic_b/none_b", host="there"), False),
        # An agent that keeps no logs.
        (torchrun(1, run="mine", agent=""), torchrun(0, run="mine", agent=""), True),
        (torchrun(1, agent=""), torchrun(0, agent=""), False),
        (slurm("17"), slurm("17", 0), True),
        (slurm("17", 0), slurm("17", 0), False),
        (slurm("17"), slurm("16", 0), False),
        (slurm("17", SLURM_STEP_ID="0"), slurm("17", 0, SLURM_STEP_ID="1"), False),
        (named("a"), named("a", 0), True),
        (named("a", 0), named("a", 0), False),
        (named("a"), named("b", 0), False),
        (named(""), named("", 0), False),
        # What is not of a job is no job's.
        (torchrun(1), Job(), False),
        (Job(restarted_by=("SLURM",)), Job(), False),
        (Job(), Job(), False),
    ],
)
def test_a_job_continues_itself_only(now: Job, earlier: Job, continues: bool) -> None:
    assert now.continues(Job.load(earlier.state())) is continues


def test_a_job_is_known_by_the_ranks_that_stay_when_a_host_is_replaced() -> None:
    there, here, new = (torchrun(0, run="mine", agent=f"a/{host}", host=host) for host in ("there", "here", "new"))
    earlier = Job.load(there.among([there, here]).state())

    # Rank 0's host is gone, and nobody has counted a restart.
    assert here.among([here, new]).continues(earlier)
    assert new.among([new, here]).continues(earlier)
    assert not new.among([new]).continues(earlier)


def test_a_torchrun_is_known_by_its_folder_of_logs_wherever_that_is() -> None:
    files = ("/tmp/torchelastic_a/none_b", "logs/none_b", "none_b")
    found = [Job.of_environment({"TORCHELASTIC_ERROR_FILE": f"{each}/attempt_0/0/error.json"}) for each in files]

    assert [job.agent for job in found] == ["torchelastic_a/none_b", "logs/none_b", "none_b"]


def test_what_one_rank_knows_of_a_restart_all_know() -> None:
    mine = torchrun(0, agent="a/here")

    assert mine.among([mine, torchrun(1, agent="a/there")]).restarted_by == ("torchrun",)


def test_a_run_of_torchrun_in_a_requeued_slurm_job_goes_on_from_before() -> None:
    both: dict[str, Any] = {"SLURM_JOB_ID": "17", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    before, now = Job.of_environment(both), Job.of_environment(both | {"SLURM_RESTART_COUNT": "1"})

    assert now.restarted_by == ("SLURM",)
    assert now.continues(before)


def test_what_a_later_version_has_noted_of_a_job_is_read_all_the_same() -> None:
    earlier = slurm("17", 0)

    assert slurm("17").continues(Job.load(earlier.state() | {"cloud": "nine"}))
