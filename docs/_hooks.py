"""What the site needs beyond Markdown: pages from the repository's root, formulas as MathML, tables that fit a phone."""

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
from mkdocs.structure.files import File, Files

# Files outside of docs/ that are pages of the site, and where.
_PAGES = {"recipes/README.md": "recipes.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(\))")

_RST_INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_RST_LINK = re.compile(r"`([^`<]+?)\s+<(https?://[^>]+)>`_")
_RST_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|\Z))+)", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extensions to every Markdown text of the site, docstrings included."""
    config.markdown_extensions.append(_SiteExtension())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose sources are outside of docs/."""
    root = Path(config.config_file_path).parent
    for source, page in _PAGES.items():
        text = _LINK.sub(lambda match: _relinked(match, posixpath.dirname(source), config), (root / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(content: str, **_: object) -> str:
    """Render the formulas that arithmatex has marked, so that a browser needs no script for them."""
    return _FORMULA.sub(_rendered, content)


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


class _LabelledTables(Treeprocessor):
    """Tells each cell its column's heading, which extra.css shows on a phone, where a row becomes a card."""

    def run(self, root: etree.Element) -> None:
        for table in root.iter("table"):
            labels = ["".join(heading.itertext()) for heading in table.findall("thead/tr/th")]
            table.set("data-columns", str(len(labels)))
            for row in table.findall("tbody/tr"):
                for label, cell in zip(labels, row, strict=True):
                    _label(cell, label)


def _label(cell: etree.Element, label: str) -> None:
    if not cell.text and not len(cell):
        return
    # The content as one element beside the label.
    content = etree.Element("span")
    content.text, content[:] = cell.text, list(cell)
    cell.text, cell[:] = None, [content]
    cell.set("data-label", label)


class _SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before everything else: arithmatex and code blocks must see the result.
        md.preprocessors.register(_RstText(md), "rst_text", priority=1000)
        # After the inline patterns (20), so that a heading's code is text.
        md.treeprocessors.register(_LabelledTables(md), "labelled_tables", priority=5)
