"""Lets the docstrings' reStructuredText mathematics through to Markdown, where arithmatex renders it."""

import re
import textwrap

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig

_INLINE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\n|\1 +.*(?:\n|\Z))+)", re.MULTILINE)


class _RstMath(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = _BLOCK.sub(_displayed, "\n".join(lines))
        return _INLINE.sub(lambda match: f"${' '.join(match[1].split())}$", text).split("\n")


def _displayed(match: re.Match[str]) -> str:
    indent, formula = match[1], textwrap.dedent(match[2]).strip()
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", indent) + "\n"


class _RstMathExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # Before everything else: arithmatex and code blocks must see the result.
        md.preprocessors.register(_RstMath(md), "rst_math", priority=1000)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension to every Markdown text of the site, docstrings included."""
    config.markdown_extensions.append(_RstMathExtension())
    return config
