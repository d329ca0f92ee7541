"""What the command line says to arguments that it refuses."""

from __future__ import annotations

import pytest

from lightning_async.cli import main

__all__ = ["refused_in_one_line"]


def refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line says to them, with exit status 2."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)

    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert len(message.splitlines()) == 1
    return message
