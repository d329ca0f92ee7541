"""One thread per process: ranks are forked from the test process, and OpenMP's thread pools do not survive a fork."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  # after the environment is set

torch.set_num_threads(1)
