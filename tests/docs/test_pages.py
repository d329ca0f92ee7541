"""What the pages say of the code and of one another is true."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# What a message leaves open: a field of an f-string, or of a logger's format.
OPEN = "…"


@functools.cache
def messages() -> str:
    """Every text in the package's code but its docstrings, with `OPEN` for what is filled in."""
    found: list[str] = []
    for path in sorted((ROOT / "lightning_async").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in alone:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else OPEN for part in node.values))
    return "\n\n".join(" ".join(re.sub(r"%[.\d]*[dfrs]", OPEN, text).split()) for text in found)


def quoted() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text()
    blocks = re.findall(r"^```{ .text .wrap }\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [" ".join(block.split()) for block in blocks]


def test_troubleshooting_names_errors_by_their_text() -> None:
    assert len(quoted()) > 10


@pytest.mark.parametrize("quote", quoted())
def test_an_error_that_troubleshooting_explains_is_one_that_the_package_raises(quote: str) -> None:
    assert quote in messages()


def test_the_evidence_is_the_same_on_the_landing_page_and_in_the_readme() -> None:
    assert (DOCS / "_evidence.md").read_text() in (ROOT / "README.md").read_text()


def test_nothing_says_to_install_the_project_from_an_index_that_does_not_have_it() -> None:
    files = [
        *DOCS.glob("*.md"),
        ROOT / "README.md",
        *ROOT.glob("recipes/**/*.*"),
        *ROOT.glob("lightning_async/**/*.py"),
    ]
    # A wheel's file is one that somebody has.
    asked = re.compile(r"pip install[^\n]*\blightning[-_]async(?!-\d)\b")
    found = [
        f"{path.name}: {match[0]}" for path in files if path.is_file() for match in asked.finditer(path.read_text())
    ]

    assert found == []


def test_the_repository_has_one_address() -> None:
    addresses = {
        "mkdocs.yml": re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE),
        "CITATION.cff": re.search(r"^repository-code: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE),
        "citation.md": re.search(r"\burl\s*= \{(https://github\.com\S+)\}", (DOCS / "citation.md").read_text()),
    }

    assert {name: match and match[1] for name, match in addresses.items()} == dict.fromkeys(
        addresses, "https://github.com/lightning-async/lightning-async"
    )


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md"])
def test_the_links_of_a_page_outside_of_the_site_lead_to_files(page: str) -> None:
    links = re.findall(r'(?:\]\(|src="|srcset=")(?!https?:|#)([^)#"\s]+)', (ROOT / page).read_text())

    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
