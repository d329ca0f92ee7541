"""What the site needs beyond Markdown: pages from the root, formulas as MathML, tables that fit a phone."""

import functools
import html
import posixpath
import re
import textwrap
import xml.etree.ElementTree as etree
from pathlib import Path

import latex2mathml.converter
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Files outside of docs/ that are pages of the site, and where.
_PAGES = {"recipes/README.md": "recipes.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(\))")

_RST_INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_RST_LINK = re.compile(r"`([^`<]+?)\s+<(https?://[^>]+)>`_")
_RST_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|\Z))+)", re.MULTILINE)
_PAGE_NAME = re.compile(r"docs/([\w-]+\.md)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)

# Of a table on a phone: its width, what a letter and a column's padding take; and letters that are a sentence.
_PHONE_PX, _LETTER_PX, _PADDING_PX, _PROSE = 358, 7.3, 8, 40


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extensions to every Markdown text of the site, docstrings included."""
    config.markdown_extensions.append(_SiteExtension())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose sources are outside of docs/."""
    root = Path(config.config_file_path).parent
    for source, page in _PAGES.items():
        relinked = functools.partial(_relinked, folder=posixpath.dirname(source), config=config)
        files.append(File.generated(config, page, content=_LINK.sub(relinked, (root / source).read_text())))
    return files


def on_page_content(content: str, page: Page, files: Files, **_: object) -> str:
    """Render the formulas that arithmatex has marked, and link the pages that docstrings name."""
    content = _FORMULA.sub(_rendered, content)
    return _PAGE_NAME.sub(lambda match: _linked(match[1], page, files), content) if page.url == "api/" else content


def _linked(source: str, page: Page, files: Files) -> str:
    """A link to a page that a docstring names by its file's name."""
    file = files.get_file_from_path(source)
    if file is None or file.page is None:
        raise PluginError(f"a docstring names docs/{source}, which is no page")
    return f'<a href="{file.url_relative_to(page.file)}">{file.page.title}</a>'


def _relinked(match: re.Match[str], folder: str, config: MkDocsConfig) -> str:
    target = posixpath.normpath(posixpath.join(folder, match[2]))
    if target in _PAGES:
        target = _PAGES[target]
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    else:
        target = f"{config.repo_url}/blob/main/{target}"
    return f"{match[1]}{target}{match[3] or ''}{match[4]}"


def _rendered(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    # The converter knows the outer environment alone.
    latex = html.unescape(match[3]).strip().replace("{aligned}", "{align*}")
    formula = latex2mathml.converter.convert(latex, display=display)
    return f'<{match[1]} class="arithmatex">{formula}</{match[1]}>'


class _RstText(Preprocessor):
    """Turns the docstrings' reStructuredText into Markdown: mathematics, which arithmatex finds then, and links."""

    def run(self, lines: list[str]) -> list[str]:
        text = _RST_LINK.sub(r"[\1](\2)", "\n".join(lines))
        text = _RST_BLOCK.sub(_displayed, text)
        return _RST_INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text).split("\n")


def _displayed(match: re.Match[str]) -> str:
    indent, formula = match[1], textwrap.dedent(match[2]).strip()
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", indent) + "\n"


class _PhoneTables(Treeprocessor):
    """Marks the tables that a phone cannot show: in extra.css a row of them becomes a card, with its columns' names."""

    def run(self, root: etree.Element) -> None:
        for table in root.iter("table"):
            headings, rows = table.findall("thead/tr/th"), table.findall("tbody/tr")
            labels = ["".join(heading.itertext()) for heading in headings]
            if _fits_phone([headings, *map(list, rows)]):
                continue
            table.set("data-cards", "")
            for row in rows:
                for label, cell in zip(labels, row, strict=True):
                    _label(cell, label)


def _fits_phone(rows: list[list[etree.Element]]) -> bool:
    if len(rows[0]) > 2 and any(len("".join(cell.itertext())) > _PROSE for row in rows for cell in row):
        return False
    letters = [max(_unbroken(cell) for cell in column) for column in zip(*rows, strict=True)]
    return sum(count * _LETTER_PX + _PADDING_PX for count in letters) <= _PHONE_PX


def _unbroken(cell: etree.Element) -> int:
    """The letters that stand on one line whatever the width: a word's, or a number's with its unit."""
    text = "".join(cell.itertext())
    is_number = cell.tag == "td" and "right" in cell.get("style", "")
    return len(text) if is_number else max(map(len, text.split()), default=0)


def _label(cell: etree.Element, label: str) -> None:
    if not cell.text and not len(cell):
        return
    # The content as one element beside the label.
    content = etree.Element("span")
    content.text, content[:] = cell.text, list(cell)
    cell.text, cell[:] = None, [content]
    cell.set("data-label", label)
    if "".join(cell.itertext()) == "–":
        cell.set("data-none", "")


class _SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before everything else: arithmatex and code blocks must see the result.
        md.preprocessors.register(_RstText(md), "rst_text", priority=1000)
        # After the inline patterns (20), so that a heading's code is text.
        md.treeprocessors.register(_PhoneTables(md), "phone_tables", priority=5)
