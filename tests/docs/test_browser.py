"""The check of the pages finds what is wrong with them. (make docs-check, with Chromium)"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import browser
from tests.docs.browser import NoBrowserError, check_site, find_browser, main

PAGE = """<!DOCTYPE html><meta name="viewport" content="width=device-width"><title>A page</title>
<body style="margin:0"><article style="padding:0 10px;overflow-wrap:anywhere">{}</article>"""


def problems(site: Path, **pages: str) -> list[tuple[str, int | None]]:
    """What is found on pages that have these texts: the problem's words, digits left out, and the width."""
    for name, text in pages.items():
        (site / f"{name}.html").write_text(PAGE.format(text))
    return [(finding.problem, finding.width) for finding in check_site(site, deadline_s=60)]


@pytest.mark.browser
def test_a_page_that_fits_and_whose_links_lead_somewhere_is_passed(tmp_path: Path) -> None:
    fine = '<h1 id="top">Fine</h1><p><a href="other.html#there">there</a> <a href="#top">up</a> <a href="https://a.b/">out</a></p>'

    assert problems(tmp_path, index=fine, other='<p id="there">There</p>') == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("text", "said", "widths"),
    [
        ('<div style="width:500px">wide</div>', "out of its column", [390]),
        ('<div style="width:1500px">wide</div>', "out of its column", [1280, 390]),
        ('<div style="overflow:auto"><table><td style="min-width:500px">a</table></div>', "px of content in", [390]),
        ('<pre style="overflow:auto">' + "x" * 300 + "</pre>", "px of content in", [1280]),
        (
            '<details><summary>more</summary><div style="width:1500px">wide</div></details>',
            "of content in",
            [1280, 390],
        ),
    ],
)
def test_what_is_wider_than_its_column_is_found(tmp_path: Path, text: str, said: str, widths: list[int]) -> None:
    found = [(problem, width) for problem, width in problems(tmp_path, index=text) if "sideways" not in problem]

    assert [width for _, width in found] == widths
    assert all(said in problem for problem, _ in found)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<a href="gone.html">gone</a>', "a link leads to /gone.html, which does not exist"),
        ('<a href="other.html#gone">gone</a>', "a link leads to /other.html#gone, which has no such place"),
        ('<img src="gone.png" width="10" height="10">', "the image gone.png does not load"),
        ('<span class="arithmatex">\\(x\\)</span>', "a formula is not rendered"),
        (
            '<link rel="stylesheet" href="https://example.org/a.css">',
            "it takes https://example.org/a.css from the network",
        ),
    ],
)
def test_what_is_broken_is_found(tmp_path: Path, text: str, said: str) -> None:
    (found,) = {problem for problem, _ in problems(tmp_path, index=text, other="<p>There</p>")}

    assert found.startswith(said)


def test_without_a_browser_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<p>A page</p>")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)

    assert main([str(tmp_path)]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err


def test_a_browser_that_is_named_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "no-such-browser")

    with pytest.raises(NoBrowserError, match="there is no no-such-browser"):
        find_browser()


def test_a_browser_that_ends_at_once_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<p>A page</p>")
    monkeypatch.setenv("CHROMIUM", "false")

    assert main([str(tmp_path)]) == 2
    assert "the browser ended with code 1" in capsys.readouterr().err


def test_a_site_that_was_not_built_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(browser, "find_browser", lambda: "chromium")

    assert main([str(tmp_path)]) == 2
    assert "run `mkdocs build` first" in capsys.readouterr().err
