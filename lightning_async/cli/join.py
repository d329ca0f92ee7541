"""`lightning-async join`: starts a command whose fit joins a run that is under way, on this machine or another one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lightning_async.runtime.admission import Invitation
from lightning_async.runtime.handshake import Address

__all__ = ["join_main", "join_variables"]


def join_main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs `lightning-async join`: becomes the command, which joins the run.

    Args:
        args: arguments without the program's name and `join`; `None` takes those of the process.

    Raises:
        SystemExit: with status 2 when the arguments are wrong or the command cannot be run, with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-async join",
        usage="lightning-async join FILE [--address HOST:PORT] [--local-rank N] -- COMMAND ...",
        description="Add a worker to a fit that is under way. FILE is what its rank 0 has left there "
        '(strategy argument join_file, with on_worker_failure="continue"); copy it to this machine if its folder is '
        "not shared, and keep it secret: it has the run's token. COMMAND is what the run was started with.",
        epilog="example: lightning-async join join.json -- python train.py",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the file that rank 0 has left")
    parser.add_argument("--address", metavar="HOST:PORT", help="where rank 0 is reached from here, if not as it says")
    parser.add_argument("--local-rank", metavar="N", type=int, default=0, help="which of this machine's devices; 0")
    given = list(sys.argv[2:] if args is None else args)
    own, command = (given, []) if "--" not in given else (given[: given.index("--")], given[given.index("--") + 1 :])
    options = parser.parse_args(own)
    if not command:
        parser.error("the command is missing: lightning-async join FILE -- python train.py")
    try:
        variables = join_variables(options.file.read_text(), options.address, options.local_rank)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.file} is not what a run has left to join it with: {error}")
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, os.environ | variables)
    except OSError as error:
        parser.error(f"{command[0]} cannot be run: {error}")


def join_variables(text: str, address: str | None = None, local_rank: int = 0) -> dict[str, str]:
    """What stands in the environment of a process that joins, for schedulers that start it themselves.

    Args:
        text: the file's.
        address: ``HOST:PORT`` in place of what stands there.
        local_rank: which of the machine's devices it computes on.

    Raises:
        ValueError: if the text is nothing of the kind, or the address has no port.

    Examples:
        >>> text = '{"host": "10.0.0.1", "port": 4711, "token": "abc"}'
        >>> sorted(join_variables(text))
        ['LIGHTNING_ASYNC_JOIN', 'LOCAL_RANK', 'NODE_RANK', 'RANK']
        >>> "10.9.9.9" in join_variables(text, "10.9.9.9:80")["LIGHTNING_ASYNC_JOIN"]
        True
    """
    found = Address(**json.loads(text))
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{address!r} is not HOST:PORT")
        found = replace(found, host=host.strip("[]"), port=int(port))
    # The number of a rank comes from rank 0; until then it must be none of those that there are, and not 0.
    ranks = {"LOCAL_RANK": str(local_rank), "NODE_RANK": "1", "RANK": "1"}
    return Invitation(found, None).variables() | ranks
