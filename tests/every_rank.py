"""Runs a script in every rank, as torchrun does, but forked: without an import to pay for.

The launchers by fork and spawn run only the trainer's function in the ranks; here all of the user's script runs there,
and what it does before, between and after two calls of the trainer.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from lightning_async.runtime.listening import reserved

__all__ = ["run_on_every_rank"]


def run_on_every_rank(ranks: int, script: Callable[[], None]) -> None:
    """Calls ``script`` in ``ranks`` processes that Lightning takes for torchrun's; exits like the worst of them.

    Args:
        ranks: number of processes, one per rank.
        script: what each of them runs.
    """
    with reserved(0) as port:
        processes = [os.fork() or _run_rank(rank, ranks, port, script) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        sys.exit(f"the ranks exited with {codes}")


def _run_rank(rank: int, ranks: int, port: int, script: Callable[[], None]) -> int:
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        script()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No interpreter to finalize: the test process's exit handlers are not this one's.
        os._exit(code)
