"""Part of the build: a package index shows the README, and resolves no link into the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LOCAL = r"(?!\w+:|#|//)"
_MARKDOWN = re.compile(rf"\]\({_LOCAL}([^)\s]+)\)")
_HTML = re.compile(rf"""\b(src|srcset|href)="{_LOCAL}([^"]+)\"""")
_PICTURES = (".gif", ".jpg", ".png", ".svg", ".webp")


def with_absolute_links(readme: str, home: str) -> str:
    """Make links into the repository absolute: Markdown's, and those of HTML in it.

    Args:
        readme: the text.
        home: address of the repository.

    Examples:
        >>> with_absolute_links("[Tuning](docs/tuning.md), ![](docs/a.png), [there](https://x.y)", "https://h/o/r")
        '[Tuning](https://h/o/r/blob/main/docs/tuning.md), ![](https://h/o/r/raw/main/docs/a.png), [there](https://x.y)'
        >>> with_absolute_links('<img src="docs/a.png">', "https://h/o/r")
        '<img src="https://h/o/r/raw/main/docs/a.png">'
    """

    def absolute(path: str) -> str:
        return f"{home}/{'raw' if path.endswith(_PICTURES) else 'blob'}/main/{path}"

    text = _MARKDOWN.sub(lambda link: f"]({absolute(link[1])})", readme)
    return _HTML.sub(lambda link: f'{link[1]}="{absolute(link[2])}"', text)


class ReadmeHook(MetadataHookInterface):
    """Gives the project its README."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README to the metadata.

        Args:
            metadata: the project's, which is changed.
        """
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(readme, metadata["urls"]["Homepage"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
