"""The environment of launched ranks.

One thread per process: ranks are forked from the test process, and OpenMP's thread pools do not survive a fork. And
little patience with name servers: torch's TCPStore asks for the name of ``::ffff:127.0.0.1``, five seconds each time
that the answer is lost.

And no compilers: where Triton is installed, torch starts a process for each core when its compiler is imported, which
outlives a forked child that imports it.

And the environment is each test's own: a launcher's variables that one test leaves behind make the ranks of the next
wait for others that nobody starts.
"""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
os.environ.setdefault("TORCH_WARM_POOL", "0")

import hypothesis
import pytest
import torch  # after the environment is set

from tests.large_pages import take_large_pages
from tests.warm_up import warm_up

torch.set_num_threads(1)

# Until all tests are collected little that is made is garbage, and very much is made.
gc.disable()

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# What Lightning and torch set in a process that trains with one rank, or that seeds; harmless to who comes after.
LEFT_BY_LIGHTNING = {
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes what was imported out of the garbage collector's sight, and so out of that of each forked rank.

    A collection would look at a million objects, and a fork's would copy the memory that they are in.
    """
    if session.items and not session.config.option.collectonly:
        warm_up()
    gc.collect()
    gc.freeze()
    gc.enable()
    if session.items and not session.config.option.collectonly:
        take_large_pages()


@pytest.fixture(autouse=True)
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the machine's GPUs, so that the tests do the same with them as without; tests/gpu overrides this."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def no_test_leaves_variables_behind() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    left = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    left.discard("PYTEST_CURRENT_TEST")
    for name in left:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    assert not left - LEFT_BY_LIGHTNING, f"the test leaves environment variables changed: {sorted(left)}"
