"""What tests and CUDA have to do with each other: next to nothing, whichever build of torch is installed.

Ranks are forked from the test process, and torch counts every fork of a process that has asked for CUDA as a bad one,
GPU or not: Lightning then refuses to fork from it. Making a Trainer asks. So the test process asks nothing itself that
it can ask elsewhere, and its forks are told that nothing has been asked.
"""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["count_gpus", "forget_cuda"]


def count_gpus() -> int:
    """The number of GPUs that torch sees; asked in a fork, which takes the answer's consequences with it."""
    if not torch.backends.cuda.is_built():
        return 0
    process = os.fork()
    if process == 0:
        count = 0
        try:
            count = min(torch.cuda.device_count(), 255)
        finally:
            os._exit(count)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forget_cuda() -> None:
    """Makes this fork, if it is a bad one, a process that may fork ranks.

    Its own forks count as bad ones from now on, as those of a script that has made a Trainer do. Where torch sees a
    GPU, nothing is done: CUDA itself would fail here, and torch's own error says so.
    """
    cuda: Any = torch.cuda
    if not cuda._is_in_bad_fork() or cuda.is_available():
        return
    here = os.getpid()
    cuda._is_in_bad_fork = lambda: os.getpid() != here
