"""The environment of launched ranks.

One thread per process: ranks are forked from the test process, and OpenMP's thread pools do not survive a fork. And
little patience with name servers: torch's TCPStore asks for the name of ``::ffff:127.0.0.1``, five seconds each time
that the answer is lost.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import torch  # after the environment is set

torch.set_num_threads(1)
