"""Two linked hosts with names and process tables of their own, for commands as they are typed there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network import HostThread
from tests.hosts.network import Link, two_hosts
from tests.launch import ENVIRONMENT

__all__ = ["Machines", "two_machines"]

# What a shell there finds, and which module of this interpreter's each is.
_COMMANDS = {"python": "", "torchrun": "torch.distributed.run", "lightning-async": "lightning_async"}
_TOOLS = ("unshare", "mount", "hostname")
# What runs the tests may itself be a job.
_JOBS = ("SLURM_", "TORCHELASTIC_", "PET_", "SKYPILOT_", "LIGHTNING_ASYNC_", "MASTER_", "GROUP_", "LOCAL_")


class Machines:
    """The two hosts of a link, ``node1`` and ``node2``, with a folder that they share.

    Args:
        link: between them.
        folder: working directory of what runs there.
        more_names: further names of the hosts, as a name server has them.
    """

    def __init__(self, link: Link, folder: Path, more_names: Sequence[Sequence[str]] = ((), ())) -> None:
        self.link = link
        self.folder = folder
        self._hosts: dict[str, HostThread] = {"node1": link.a, "node2": link.b}
        self._running: list[subprocess.Popen[str]] = []
        lines = ["127.0.0.1 localhost"]
        for number, (name, others) in enumerate(zip(self._hosts, more_names, strict=True), 1):
            lines.append(" ".join((f"10.77.0.{number}", name, *others)))
        self._names = folder / "etc-hosts"
        self._names.write_text("\n".join(lines) + "\n")
        self.environment = {
            name: value for name, value in os.environ.items() if name != "RANK" and not name.startswith(_JOBS)
        }
        self.environment["PATH"] = f"{self._tools()}:{os.environ['PATH']}"
        self.environment |= ENVIRONMENT

    def _tools(self) -> Path:
        tools = self.folder / "bin"
        tools.mkdir()
        for name, module in _COMMANDS.items():
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec {sys.executable}{f" -m {module}" if module else ""} "$@"\n')
            tool.chmod(0o755)
        return tools

    def start(self, name: str, *command: str, output: str | None = None, **variables: str) -> subprocess.Popen[str]:
        """Starts a command on a host; what it starts ends with it.

        Args:
            name: of the host.
            command: the command.
            output: file of the folder that all it prints goes to; a pipe without it.
            variables: of its environment.
        """
        setup = f'mount --bind {self._names} /etc/hosts && hostname {name} && exec "$@"'
        namespaces = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        arguments = ["unshare", *namespaces, "sh", "-c", setup, "sh", *command]
        options: dict[str, Any] = {"cwd": self.folder, "env": self.environment | variables}
        if output is None:
            process = self._hosts[name].start(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
            )
        else:
            with (self.folder / output).open("a") as file:
                process = self._hosts[name].start(
                    arguments, stdout=file, stderr=file, stdin=subprocess.DEVNULL, **options
                )
        self._running.append(process)
        return process

    def run(self, name: str, *command: str, timeout_s: float = 60.0, **variables: str) -> tuple[int, str]:
        """Runs a command on a host; its status and what it has printed."""
        process = self.start(name, *command, **variables)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{command} still ran after {timeout_s:g} s\n{output}") from None
        self._running.remove(process)
        return process.returncode, output

    def close(self) -> None:
        """Ends all that was started."""
        for process in self._running:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def two_machines(folder: Path, more_names: Sequence[Sequence[str]] = ((), ()), **options: Any) -> Iterator[Machines]:
    """Two hosts; skips the test where they cannot be made."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no hosts with names of their own here: {', '.join(missing)} is not installed")
    with two_hosts(**options) as link:
        machines = Machines(link, folder, more_names)
        try:
            yield machines
        finally:
            machines.close()
