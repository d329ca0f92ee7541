"""README and quick start, followed literally in a fresh environment with what the build made: `make wheel-test`."""

from __future__ import annotations

import os
import subprocess
import tarfile
import venv
from pathlib import Path

import hatchling.build
import pytest

from tests.wheel.pages import ROOT, commands, script

QUICK_START = "docs/quickstart.md"

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(3000)]


class Reader:
    """Types what the pages say, in a shell with the environment activated, and reads what comes of it."""

    def __init__(self, environment: Path, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._variables = {**kept, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}

    def type(self, line: str, folder: Path) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=self._variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=1200,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout, f"{line}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has, by way of the source distribution."""
    folder = tmp_path_factory.mktemp("source")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        archive = hatchling.build.build_sdist(str(folder))
    finally:
        os.chdir(before)
    with tarfile.open(folder / archive) as files:
        files.extractall(folder)
    return folder / archive.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=True)
    (folder / "home").mkdir()
    return Reader(folder / "venv", folder / "home")


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


# In the order of the pages: each goes on where the one before has stopped.


def test_the_wheel_installs_as_the_quick_start_says(reader: Reader, checkout: Path) -> None:
    # The checkout itself comes last, on top of the wheel.
    install = [line for line in commands(QUICK_START, "Install") if line.startswith("pip")]
    wheel = [line for line in install if "dist" in line]
    assert len(wheel) == 2 and len(install) == 3

    for line in wheel:
        reader.type(line, checkout)

    assert reader.type("lightning-async --version", checkout).strip().startswith("lightning-async ")
    where = reader.type("python -c 'import lightning_async; print(lightning_async.__file__)'", checkout.parent)
    assert "site-packages" in where
    gone = (
        "import importlib.util as u; print([m for m in ('rich', 'wandb', 'sklearn', 'matplotlib') if u.find_spec(m)])"
    )
    assert reader.type(f'python -c "{gone}"', checkout.parent).strip() == "[]"


def test_the_demo_runs_in_an_empty_folder(reader: Reader, tmp_path: Path) -> None:
    (demo,) = (line for line in commands(QUICK_START, "Install") if line.startswith("lightning-async"))
    assert demo in commands("README.md", "Try it")

    said = reader.type(demo, tmp_path)

    assert "digits drawn for this demo" in said
    assert "training batches per second" in said
    assert last_line(said).startswith("report: pip install matplotlib")


def test_the_example_of_the_help_runs(reader: Reader, tmp_path: Path) -> None:
    text = " ".join(reader.type("lightning-async --help", tmp_path).split())
    example = text.partition("example: ")[2].partition(" (")[0]

    reader.type(example, tmp_path)


def test_the_first_run_and_the_command_line_do_what_they_say(reader: Reader, tmp_path: Path) -> None:
    first = script(QUICK_START, "First run")
    (tmp_path / first.title).write_text(first.text)

    for line in commands(QUICK_START, "First run"):
        reader.type(line, tmp_path)
    assert (tmp_path / "lightning_logs" / "version_0" / "report.html").exists()

    for line in commands(QUICK_START, "From the command line"):
        said = reader.type(line, tmp_path)
        if " fit --model=" in line and "ddp" not in line:
            assert last_line(said) == "report: lightning_logs/version_1/report.html"


def test_a_checkout_installs_and_its_recipe_trains(reader: Reader, checkout: Path) -> None:
    (plain,) = (line for line in commands(QUICK_START, "Install") if line.startswith("pip") and "dist" not in line)
    assert plain in commands("README.md", "Try it")

    reader.type(plain, checkout)
    for line in commands(QUICK_START, "Recipes"):
        said = reader.type(line, checkout)
        if " fit " in line and "ddp" not in line:
            assert last_line(said) == "report: runs/lenet5_digits/version_0/report.html"
