"""Claims about what is built: the wheel, the source distribution, and the pages as they are read elsewhere."""

from __future__ import annotations

import email
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

import hatchling.build
import pytest

from hatch_build import with_absolute_links
from tests.wheel.pages import ROOT, commands, script

HOME = "https://github.com/lightning-async/lightning-async"


@contextmanager
def at_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    with at_root():
        return zipfile.ZipFile(folder / hatchling.build.build_wheel(str(folder)))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("sdist")
    with at_root(), tarfile.open(folder / hatchling.build.build_sdist(str(folder))) as files:
        return {name.partition("/")[2] for name in files.getnames()}


def test_the_wheel_says_that_it_is_typed_and_has_the_demo(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())

    assert {"lightning_async/py.typed", "lightning_async/cli/demo/digits.yaml"} <= names
    assert {name.partition("/")[0] for name in names} <= {"lightning_async", "lightning_async-0.1.0.dist-info"}


def test_nothing_of_the_wheel_imports_the_recipes(wheel: zipfile.ZipFile) -> None:
    importing = [
        name
        for name in wheel.namelist()
        if re.search(r"^\s*(from|import) recipes", wheel.read(name).decode(), re.MULTILINE)
    ]

    assert importing == []


def test_wandb_rich_matplotlib_and_scikit_learn_are_not_mandatory(metadata: Message) -> None:
    required = metadata.get_all("Requires-Dist", [])
    by_extra = {
        extra: {re.split(r"[\s\[<>=;]", line)[0] for line in required if f"extra == '{extra}'" in line}
        for extra in metadata.get_all("Provides-Extra", [])
    }

    mandatory = {re.split(r"[\s\[<>=;]", line)[0] for line in required if "extra ==" not in line}
    assert mandatory == {
        *("jsonargparse", "lightning", "numpy", "tabulate", "threadpoolctl", "torch", "torchmetrics", "tqdm")
    }
    assert by_extra["wandb"] == {"wandb"}
    assert by_extra["report"] == {"matplotlib"}
    assert by_extra["recipes"] == {"wandb", "matplotlib", "scikit-learn", "pillow"}
    assert by_extra["recipes"] | {"rich", "hatchling", "shtab"} < by_extra["dev"]


def test_the_index_page_has_addresses_and_no_link_that_leads_nowhere(metadata: Message) -> None:
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    page = str(metadata.get_payload())

    assert urls["Homepage"] == HOME
    assert {"Documentation", "Changelog", "Issues"} < urls.keys()
    assert "## Try it" in page
    links = [*re.findall(r"\]\(([^)\s]+)\)", page), *re.findall(r'(?:src|srcset|href)="([^"]+)"', page)]
    assert links and all(link.startswith(("https://", "#")) for link in links)
    local = [
        link.partition("/main/")[2].partition("#")[0] for link in links if link.startswith(HOME) and "/main/" in link
    ]
    assert local and all((ROOT / path).exists() for path in local)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](docs/a.md)", f"[a]({HOME}/blob/main/docs/a.md)"),
        ("[a](docs/a.md#b)", f"[a]({HOME}/blob/main/docs/a.md#b)"),
        ("[![a](docs/a.png)](docs/a.md)", f"[![a]({HOME}/raw/main/docs/a.png)]({HOME}/blob/main/docs/a.md)"),
        (
            '<a href="docs/a.md"><img src="a.svg"></a>',
            f'<a href="{HOME}/blob/main/docs/a.md"><img src="{HOME}/raw/main/a.svg"></a>',
        ),
        ("[a](https://b.c) [d](#e) [f](mailto:g@h.i)", "[a](https://b.c) [d](#e) [f](mailto:g@h.i)"),
    ],
)
def test_a_link_of_the_readme_becomes_absolute(written: str, shown: str) -> None:
    assert with_absolute_links(written, HOME) == shown


def test_the_source_distribution_has_what_the_makefile_and_the_tests_need(source: set[str]) -> None:
    needed = {
        "Makefile",
        "constraints.txt",
        "constraints-lowest.txt",
        ".ci/run",
        "mkdocs.yml",
        "CITATION.cff",
        "LICENSE",
    }
    needed |= {"hatch_build.py", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md", "docs/quickstart.md"}
    named = {word for word in re.findall(r"[\w./-]+", (ROOT / "Makefile").read_text()) if (ROOT / word).is_file()}

    assert needed | named <= source
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} < source
    assert {"tests/conftest.py", "tests/wheel/test_first_hour.py"} <= source


def test_no_message_or_page_installs_a_project_that_is_not_published() -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *(ROOT / "recipes").rglob("*.md")]
    sources = [*(ROOT / "lightning_async" / "cli").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]

    wrong = [path for path in [*pages, *sources] if re.search(r"pip install '?lightning.async\[", path.read_text())]

    assert wrong == []


def test_the_first_script_of_the_quick_start_needs_nothing_but_the_package() -> None:
    first = script("docs/quickstart.md", "First run")

    imported = set(re.findall(r"^(?:import|from) (\w+)", first.text, re.MULTILINE))
    assert imported == {"lightning", "torch", "lightning_async"}
    assert f"python {first.title}" in commands("docs/quickstart.md", "First run")
    assert len(first.text.splitlines()) < 55
    compile(first.text, first.title, "exec")


def test_the_completion_has_its_folder_made_first() -> None:
    lines = commands("docs/quickstart.md", "From the command line")

    making, writing = (
        next(i for i, line in enumerate(lines) if word in line) for word in ("mkdir -p", "--print_completion")
    )
    folder = lines[making].removeprefix("mkdir -p ")
    assert making < writing
    assert lines[writing].partition(" > ")[2].startswith(folder)
